"""Baichuan-Audio (arXiv 2502.17239): an LLM that reads and writes text and audio codes, with the parts that make codes and sound."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_baichuan_audio import BaichuanAudioConfig
from .generation_baichuan_audio import BaichuanAudioGenerationMixin, set_generation_defaults
from .hub_card import write_card
from .modeling_audio_head import BaichuanAudioHead
from .modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from .modeling_common import PART_KEYS_TO_IGNORE, BaichuanAudioPreTrainedModel, check_codes
from .modeling_waveform_decoder import BaichuanAudioDecodingMixin
from .pipeline_flow_matching_vocoder import CUSTOM_PIPELINES as VOCODER_PIPELINES
from .pipeline_speech import CUSTOM_PIPELINES as SPEECH_PIPELINES


# What a saved config.json tells the Auto classes and `pipeline`, for loading without this package (`trust_remote_code=True`).
_AUTO_MAP = {
    "AutoConfig": "configuration_baichuan_audio.BaichuanAudioConfig",
    "AutoModel": "modeling_baichuan_audio.BaichuanAudioModel",
    "AutoModelForCausalLM": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
    "AutoModelForMultimodalLM": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
    "AutoModelForTextToWaveform": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
    "AutoModelForAudioTokenization": "modeling_baichuan_audio.TokenizerOfCheckpoint",
    "AutoModelForTextToSpectrogram": "modeling_waveform_decoder.BaichuanAudioWaveformDecoder",
    "AutoFeatureExtractor": "feature_extraction_baichuan_audio.BaichuanAudioFeatureExtractor",
    "AutoProcessor": "processing_baichuan_audio.BaichuanAudioProcessor",
}
_CUSTOM_PIPELINES = {**VOCODER_PIPELINES, **SPEECH_PIPELINES}


@dataclass
class BaichuanAudioCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss (scalar, *optional*): text loss plus `config.audio_loss_weight` times audio loss, of those that labels were given for.
        text_loss, audio_loss (scalars, *optional*): the two apart, each a mean over its real targets.
        codebook_losses (`(num_codebooks,)`, *optional*): cross-entropy of each codebook, detached.
        logits (`(batch, kept, vocab_size)`): text logits of the last `logits_to_keep` positions.
        audio_logits (`tuple`, *optional*): with `output_audio_logits=True`, one `(batch, frames, codebook_size + 1)` tensor per
            codebook: teacher-forced logits of every audio frame of the input that has a position before it.
        past_key_values (`Cache`, *optional*): keys and values of the LLM.
        last_hidden_state (`(batch, time, hidden_size)`): the LLM's output after its last norm.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    audio_loss: torch.FloatTensor | None = None
    codebook_losses: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    audio_logits: tuple[torch.FloatTensor, ...] | None = None
    past_key_values: Cache | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BaichuanAudioModel(BaichuanAudioPreTrainedModel):
    """LLM backbone, embeddings of audio codes and speech tokenizer: text and speech in, hidden states out."""

    config: BaichuanAudioConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    output_modalities = ("text", "audio")
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
    _no_split_modules = ["BaichuanAudioTransformerLayer", "AudioHeadLayer", "EstimatorStage"]
    _supports_flash_attn = True

    def __init__(self, config: BaichuanAudioConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        hidden_size, sizes = config.text_config.hidden_size, config.audio_tokenizer_config.codebook_sizes
        # The last row of each table is the end-of-audio symbol.
        self.audio_embed_layers = nn.ModuleList([nn.Embedding(size + 1, hidden_size) for size in sizes])
        self.audio_tokenizer = BaichuanAudioTokenizerModel._from_config(config.audio_tokenizer_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """(rows, num_codebooks) int64 codes -> (rows, hidden_size): the sum over the codebooks."""
        return sum(table(column) for table, column in zip(self.audio_embed_layers, codes.unbind(1)))

    @torch.no_grad()
    def get_audio_codes(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> torch.LongTensor:
        """Mel features (chunks, num_mel_bins, mel_frames) -> codes (chunks, num_codebooks, frames), -1 past the end."""
        return self.audio_tokenizer.encode(input_features, input_features_mask).audio_codes

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        What the LLM reads in place of the audio tokens.

        Args:
            input_features (`(chunks, num_mel_bins, mel_frames)`), input_features_mask (`(chunks, mel_frames)`, *optional*).

        Returns:
            `last_hidden_state`: the encoder's output (chunks, time, width), with its `hidden_states` and `attentions` where asked
            for; `pooler_output`: the embedded frames of all chunks in order, (frames, hidden_size).
        """
        with torch.no_grad():
            encoded = self.audio_tokenizer.encode(input_features, input_features_mask, **kwargs)
        codes = encoded.audio_codes.transpose(1, 2)[encoded.audio_codes_mask]
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=self.embed_codes(codes),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None = None
    ) -> torch.BoolTensor:
        """(batch, time) True at the audio tokens that stand for a frame each; without ids, where their embedding is."""
        if input_ids is not None:
            return input_ids == self.config.audio_pad_token_id
        token = torch.tensor(self.config.audio_pad_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def resolve_audio_codes(
        self,
        input_ids: torch.LongTensor | None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
    ) -> torch.LongTensor | None:
        """
        One code frame for every audio token of the prompt, given as ids or as embeddings.

        `audio_codes` lists a row's frames in the order of its audio tokens. Frames left at -1 are filled, in order, with the codes of
        `input_features`; without `audio_codes` all of them come from there.

        Returns:
            `(batch, num_codebooks, frames)` int64, -1 past a row's last audio token, or None without audio.

        Raises:
            ValueError: more or fewer frames than audio tokens.
        """
        counts = self.get_placeholder_mask(input_ids, inputs_embeds).sum(-1)
        total, codebooks = int(counts.sum()), self.config.audio_tokenizer_config.num_codebooks
        if total == 0 and input_features is None and audio_codes is None:
            return None
        slots = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        codes = torch.full((len(counts), slots.shape[1], codebooks), -1, device=counts.device)
        if audio_codes is not None:
            check_codes(audio_codes, self.config.audio_tokenizer_config.codebook_sizes)
            if audio_codes.shape[0] != len(counts) or audio_codes.shape[2] < slots.shape[1]:
                raise ValueError(
                    f"`audio_codes` of shape {tuple(audio_codes.shape)} cannot fill the audio tokens of the prompt: "
                    f"{len(counts)} rows with {counts.tolist()} tokens."
                )
            codes = audio_codes.to(codes.device).transpose(1, 2)[:, : slots.shape[1]].masked_fill(~slots[..., None], -1)
        empty = slots & (codes < 0).any(-1)
        encoded = codes.new_zeros((0, codebooks))
        if input_features is not None:
            chunks = self.get_audio_codes(input_features, input_features_mask).transpose(1, 2)
            encoded = chunks[(chunks >= 0).all(-1)].to(codes.device)
        if int(empty.sum()) != len(encoded):
            raise ValueError(
                f"The prompt has {int(empty.sum())} audio tokens without codes, but `input_features` gives {len(encoded)} frames."
            )
        codes = codes.clone()
        codes[empty] = encoded
        return codes.transpose(1, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`(batch, time)`, int64): text, with one audio token per audio frame.
            attention_mask (`(batch, time)`, *optional*), position_ids, past_key_values, use_cache: as for any decoder.
            inputs_embeds (`(batch, time, hidden_size)`, *optional*): instead of `input_ids`. Audio that comes beside it takes the
                places of the audio token's embedding.
            input_features (`(chunks, num_mel_bins, mel_frames)`, *optional*): every chunk of every audio, in prompt order.
            input_features_mask (`(chunks, mel_frames)`, *optional*): 1 where a chunk has a frame.
            audio_codes (`(batch, num_codebooks, frames)`, *optional*): codes of the audio tokens; see `resolve_audio_codes`.

        Raises:
            ValueError: audio that does not match the audio tokens, or neither or both of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        has_audio = input_ids is not None or input_features is not None or audio_codes is not None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if has_audio:
            codes = self.resolve_audio_codes(input_ids, input_features, input_features_mask, audio_codes, inputs_embeds)
            if codes is not None:
                frames = codes.transpose(1, 2)
                embedded = self.embed_codes(frames[(frames >= 0).all(-1)])
                mask = self.get_placeholder_mask(input_ids, inputs_embeds)[..., None]
                inputs_embeds = inputs_embeds.masked_scatter(mask, embedded.to(inputs_embeds.dtype))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class BaichuanAudioForCausalLM(BaichuanAudioDecodingMixin, BaichuanAudioPreTrainedModel, BaichuanAudioGenerationMixin):
    """The whole model: speech and text in, text and speech out.

    Example:

    ```python
    >>> import torch
    >>> from modeling_baichuan_audio import BaichuanAudioForCausalLM
    >>> from modeling_baichuan_audio.conversion import tiny_config
    >>> model = BaichuanAudioForCausalLM(tiny_config()).eval()
    >>> codes = torch.zeros(1, 8, 25, dtype=torch.long)
    >>> model.decode_audio(codes, seed=0)[0].shape  # 99 mel frames of 480 samples
    torch.Size([47520])

    ```
    """

    config: BaichuanAudioConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _auto_class = "AutoModelForCausalLM"
    input_modalities = ("audio", "text")
    output_modalities = ("text", "audio")
    _no_split_modules = BaichuanAudioModel._no_split_modules
    # HiFT is small and integrates a phase: it stays in float32 whatever the rest is loaded in.
    _keep_in_fp32_modules_strict = ["vocoder"]
    _supports_flash_attn = True
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    # How the head is split over devices; the backbone brings plans of its own, and the audio parts are small enough to be copied.
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: BaichuanAudioConfig):
        super().__init__(config)
        self.model = BaichuanAudioModel(config)
        self.vocab_size = config.text_config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, self.vocab_size, bias=False)
        self.audio_head = BaichuanAudioHead._from_config(config.audio_head_config)
        self._add_decoders(config)
        self.post_init()
        set_generation_defaults(self.generation_config)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        loaded = super().from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        set_generation_defaults((loaded[0] if output_loading_info else loaded).generation_config)
        return loaded

    def set_auto_map(self) -> None:
        """Names every Auto class and every pipeline in the config, as saved folders carry the code files."""
        self.config.auto_map = dict(_AUTO_MAP)
        self.config.custom_pipelines = copy.deepcopy(_CUSTOM_PIPELINES)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """See [`~transformers.PreTrainedModel.save_pretrained`]; writes code files and a model card next to the weights."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):  # adapters alone are no checkpoint
            write_card(save_directory, self)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        write_card(working_dir, self)  # transformers has just put an empty card there, where the repository has none
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @property
    def audio_tokenizer(self) -> BaichuanAudioTokenizerModel:
        return self.model.audio_tokenizer

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_audio_codes(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> torch.LongTensor:
        """See [`BaichuanAudioModel.get_audio_codes`]."""
        return self.model.get_audio_codes(input_features, input_features_mask)

    def get_audio_features(self, input_features, input_features_mask=None, **kwargs):
        """See [`BaichuanAudioModel.get_audio_features`]."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    def _audio_logits(self, input_ids, audio_codes, last_hidden_state) -> tuple[torch.Tensor, ...]:
        """Teacher-forced audio logits of every audio token, scattered to (batch, frames, classes)."""
        is_frame = self.model.get_placeholder_mask(input_ids)
        if bool(is_frame[:, 0].any()):
            raise ValueError("`output_audio_logits` needs a position before the first audio token of every row.")
        frames = audio_codes.transpose(1, 2)
        slots = (frames >= 0).all(-1)
        before = last_hidden_state[:, :-1][is_frame[:, 1:]]
        tables = self.model.audio_embed_layers
        embedded = torch.stack([table(column) for table, column in zip(tables, frames[slots][:, :-1].unbind(1))], dim=1)
        logits = self.audio_head(before, embedded)
        return tuple(part.new_zeros(*slots.shape, part.shape[-1]).masked_scatter(slots[..., None], part) for part in logits)

    def _audio_loss(
        self, hidden: torch.Tensor, audio_labels: torch.Tensor, max_frames: int | None, num_items: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of every codebook through the audio head, teacher-forced (paper, section 3.2): the mean, and each apart."""
        codebooks = self.config.audio_tokenizer_config.num_codebooks
        if audio_labels.shape != (hidden.shape[0], codebooks, hidden.shape[1]):
            raise ValueError(
                f"`audio_labels` must be {(hidden.shape[0], codebooks, hidden.shape[1])}, got {tuple(audio_labels.shape)}."
            )
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"`audio_loss_frames` must be at least 1, got {max_frames}.")
        targets = audio_labels.transpose(1, 2)[:, 1:]
        learnt = targets[..., 0] != -100
        before, targets = hidden[:, :-1][learnt], targets[learnt]
        scale, no_target = 1.0, len(targets) == 0
        if no_target:  # every parameter still takes part, or data-parallel ranks would wait for one another
            before, targets = hidden[:1, 0], targets.new_full((1, codebooks), -100)
        elif self.training and max_frames is not None and len(targets) > max_frames:
            chosen = torch.randperm(len(targets), device=targets.device)[:max_frames]
            scale = len(targets) / max_frames
            before, targets = before[chosen], targets[chosen]
        tables = self.model.audio_embed_layers
        inputs = targets.clamp(min=0)
        embedded = torch.stack([table(column) for table, column in zip(tables, inputs[:, :-1].unbind(1))], dim=1)
        logits = self.audio_head(before, embedded)
        sums = torch.stack(
            [
                nn.functional.cross_entropy(part.float(), column, ignore_index=-100, reduction="sum")
                for part, column in zip(logits, targets.unbind(1))
            ]
        )
        if no_target:
            sums = sums + 0.0 * tables[-1](inputs[:, -1]).sum()
        counts = (targets != -100).sum(0).clamp(min=1) if num_items is None else num_items.to(sums.device).clamp(min=1) / scale
        losses = sums / counts
        weights = losses.new_tensor(self.config.codebook_loss_weights or [1.0] * codebooks)
        return (losses * weights).sum() / weights.sum(), losses.detach()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        audio_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_audio_logits: bool = False,
        audio_loss_frames: int | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_audio_items_in_batch: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaichuanAudioCausalLMOutputWithPast:
        """
        Args:
            labels (`(batch, time)`, *optional*): text targets, aligned with `input_ids` (shifted inside); -100 is ignored.
            audio_labels (`(batch, num_codebooks, time)`, *optional*): audio targets, aligned with `input_ids` (shifted inside): the
                code frame at each learnt audio token; the end-of-audio class for the first codebook where audio ends; else -100.
            audio_loss_frames (`int`, *optional*): in training, take the audio loss over that many of the frames, drawn at random.
            num_items_in_batch, num_audio_items_in_batch (*optional*): text targets, and audio targets of each codebook, of the whole
                gradient-accumulation window; sums are divided by them, so that accumulated losses are means over real targets.
            logits_to_keep (`int` or index tensor): compute text logits for the last positions only; 0 for all.
            output_audio_logits (`bool`): also run the audio head on every audio frame of the input.
            the others: as in [`BaichuanAudioModel.forward`].
        """
        if output_audio_logits:
            if input_ids is None:
                raise ValueError("`output_audio_logits` needs `input_ids`.")
            audio_codes = self.model.resolve_audio_codes(input_ids, input_features, input_features_mask, audio_codes)
            input_features = input_features_mask = None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            input_features=input_features,
            input_features_mask=input_features_mask,
            audio_codes=audio_codes,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        text_loss = audio_loss = codebook_losses = None
        if labels is not None:
            if num_items_in_batch is None:  # a batch may have no text target at all
                num_items_in_batch = (labels[:, 1:] != -100).sum().clamp(min=1)
            text_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if audio_labels is not None:
            audio_loss, codebook_losses = self._audio_loss(hidden, audio_labels, audio_loss_frames, num_audio_items_in_batch)
        loss = text_loss
        if audio_loss is not None:
            weighted = self.config.audio_loss_weight * audio_loss
            loss = weighted if text_loss is None else text_loss + weighted
        audio_logits = None
        if output_audio_logits and audio_codes is not None:
            audio_logits = self._audio_logits(input_ids, audio_codes, hidden)
        return BaichuanAudioCausalLMOutputWithPast(
            loss=loss,
            text_loss=text_loss,
            audio_loss=audio_loss,
            codebook_losses=codebook_losses,
            logits=logits,
            audio_logits=audio_logits,
            past_key_values=outputs.past_key_values,
            last_hidden_state=hidden,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenizerOfCheckpoint:
    """The tokenizer out of a whole checkpoint, for `AutoModelForAudioTokenization`: it refuses a class whose config is another one."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> BaichuanAudioTokenizerModel:
        return BaichuanAudioTokenizerModel.from_pretrained(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class=None) -> None:
        """Nothing to do: what is saved is a [`BaichuanAudioTokenizerModel`]."""


__all__ = ["BaichuanAudioCausalLMOutputWithPast", "BaichuanAudioForCausalLM", "BaichuanAudioModel"]
