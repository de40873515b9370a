"""Speech tokenizer: encoder, bridge and quantiser turn mel features into codes, the mel decoder turns codes into a mel."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_baichuan_audio import BaichuanAudioTokenizerConfig
from .modeling_common import (
    PART_KEYS_TO_IGNORE,
    BaichuanAudioAttention,
    BaichuanAudioPreTrainedModel,
    BaichuanAudioTransformerLayer,
    check_codes,
    frame_lengths,
    length_mask,
    sinusoidal_embedding,
)
from .modeling_mel_decoder import BaichuanAudioDecoderOutput, BaichuanAudioMelDecoder
from .modeling_rvq import EuclideanCodebook, ResidualVectorQuantizer
from .modeling_tokenizer_losses import TextLoss, tokenizer_losses
from .streaming_mel_decoder import MelDecoderStreamingMixin


@dataclass
class BaichuanAudioEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`(chunks, num_codebooks, frames)`, int64): codes at 12.5 Hz, -1 past the end of a chunk.
        audio_codes_mask (`(chunks, frames)`, bool): True where a chunk has a frame.
        last_hidden_state (`(chunks, time, hidden_size)`): encoder output at 50 Hz, zero past the end.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class BaichuanAudioTokenizerOutput(ModelOutput):
    """
    Codes of the encoder beside the mels of the decoder, as in the two outputs above; with labels, the losses too (float32 scalars).

    Args:
        loss: the weighted sum of reconstruction, text and commitment loss.
        reconstruction_loss: `coarse_loss` + `resampled_loss` + `refined_loss`, each L1 + L2: of the coarse mel at 100 Hz, of the
            coarse mel resampled to 62.5 Hz and of the refined mel.
        commitment_loss: summed over codebooks; `codebook_commitment` (`(num_codebooks,)`, detached): each codebook's.
        text_loss: of the frozen LLM.
        audio_codes: in training mode also -1 in codebooks that a clip did not use.
        perplexity, usage (`(num_codebooks,)`): see `QuantizerOutput`.
        replaced (`(chunks,)`, bool): clips that were decoded from their quantised vectors.
        hidden_states, attentions: the encoder's, where asked for with `output_hidden_states` or `output_attentions`.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    coarse_loss: torch.FloatTensor | None = None
    resampled_loss: torch.FloatTensor | None = None
    refined_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    codebook_commitment: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    coarse_mel: torch.FloatTensor | None = None
    refined_mel: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None
    perplexity: torch.FloatTensor | None = None
    usage: torch.FloatTensor | None = None
    replaced: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class BaichuanAudioEncoder(nn.Module):
    """Whisper's encoder (arXiv 2212.04356): two convolutions, sinusoidal positions, full attention inside each clip."""

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__()
        self.config = config
        width, padding = config.hidden_size, config.kernel_size // 2
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, config.kernel_size, padding=padding)
        self.conv2 = nn.Conv1d(width, width, config.kernel_size, stride=config.stride_size, padding=padding)
        self.layers = nn.ModuleList(
            [
                BaichuanAudioTransformerLayer(
                    config,
                    width,
                    config.encoder_attention_heads,
                    config.encoder_ffn_dim,
                    config.activation_function,
                    is_causal=False,
                )
                for _ in range(config.encoder_layers)
            ]
        )
        self.layer_norm = nn.LayerNorm(width)

    def output_lengths(self, mel_lengths: torch.Tensor) -> torch.Tensor:
        return (mel_lengths - 1) // self.config.stride_size + 1

    def forward(self, input_features: torch.Tensor, mel_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(chunks, mel_bins, mel_frames), (chunks,) -> (chunks, time, hidden_size) zero past the end, (chunks,) lengths."""
        mask = length_mask(mel_lengths, input_features.shape[-1])[:, None]
        states = nn.functional.gelu(self.conv1(input_features.masked_fill(~mask, 0.0)))
        # conv1's bias fills the padding: without this mask it would leak into the last frame of a clip of odd length.
        states = nn.functional.gelu(self.conv2(states.masked_fill(~mask, 0.0))).transpose(1, 2)
        lengths = self.output_lengths(mel_lengths)
        valid = length_mask(lengths, states.shape[1])
        positions = sinusoidal_embedding(torch.arange(states.shape[1], device=states.device), states.shape[2])
        states = states + positions.to(states.dtype)
        attention_mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=valid)
        for layer in self.layers:
            states = layer(states, attention_mask)
        return self.layer_norm(states).masked_fill(~valid[..., None], 0.0), lengths


class BaichuanAudioBridge(nn.Module):
    """Four encoder frames to one vector: a gated convolution beside the stacked frames themselves."""

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__()
        self.factor = config.downsample_factor
        width, inner = config.hidden_size, config.quantizer_size
        self.gate_proj = nn.Conv1d(width, inner, self.factor, stride=self.factor, bias=False)
        self.up_proj = nn.Conv1d(width, inner, self.factor, stride=self.factor, bias=False)
        self.down_proj = nn.Linear(inner, inner, bias=False)
        self.layer_norm = nn.LayerNorm(inner)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, time, hidden_size), zero past the end -> (batch, ceil(time / 4), 4 * hidden_size)."""
        states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % self.factor))
        stacked = states.unflatten(1, (-1, self.factor)).flatten(2)
        channels_first = states.transpose(1, 2)
        gated = nn.functional.silu(self.gate_proj(channels_first)) * self.up_proj(channels_first)
        return self.layer_norm(self.down_proj(gated.transpose(1, 2)) + stacked)


class BaichuanAudioTokenizerModel(MelDecoderStreamingMixin, BaichuanAudioPreTrainedModel, PreTrainedAudioTokenizerBase):
    """The speech tokenizer as a codec: mel features -> 12.5 Hz codes -> mel. A clip's result never depends on its batch."""

    config: BaichuanAudioTokenizerConfig
    base_model_prefix = "model.audio_tokenizer"
    _more_auto_classes = ("AutoModelForAudioTokenization",)
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
    main_input_name = "input_features"
    input_modalities = ("audio",)
    output_modalities = ("audio",)
    _no_split_modules = ["BaichuanAudioTransformerLayer"]
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["quantizer"]
    # Of the encoder: the mel decoder's layers are of the same class.
    _can_record_outputs = {
        "hidden_states": OutputRecorder(BaichuanAudioTransformerLayer, layer_name="encoder"),
        "attentions": OutputRecorder(BaichuanAudioAttention, index=1, layer_name="encoder"),
    }

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__(config)
        self.encoder = BaichuanAudioEncoder(config)
        self.bridge = BaichuanAudioBridge(config)
        self.quantizer = ResidualVectorQuantizer(
            config.codebook_sizes,
            config.quantizer_size,
            decay=config.codebook_decay,
            shrinkage=config.codebook_shrinkage,
            restart_threshold=config.codebook_restart_threshold,
            gumbel_temperature=config.gumbel_temperature,
            dropout=config.codebook_dropout,
        )
        self.mel_decoder = BaichuanAudioMelDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EuclideanCodebook):
            # The bridge ends in a layer norm: unit-variance entries are on its scale. Nothing is assigned to them yet, so training
            # begins by moving them to vectors of its first batches.
            init.normal_(module.embed)
            init.zeros_(module.cluster_size)
            init.copy_(module.embed_avg, module.embed * module.cluster_size[:, None])

    @capture_outputs
    def encode(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaichuanAudioEncoderOutput:
        """
        Mel features -> codes (paper, section 3.1).

        Args:
            input_features (`(chunks, num_mel_bins, mel_frames)`, float): log-mel chunks from the feature extractor.
            input_features_mask (`(chunks, mel_frames)`, *optional*): 1 where a chunk has a frame; everything by default.

        Raises:
            ValueError: wrong shapes, or chunks longer than `max_audio_seconds`.
        """
        return self._encode(input_features, input_features_mask)

    def _encode(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None) -> BaichuanAudioEncoderOutput:
        vectors, frames, states = self._encode_continuous(input_features, input_features_mask)
        codes = self.quantizer.encode(vectors)[..., : int(frames.max())]
        mask = length_mask(frames, codes.shape[-1])
        return BaichuanAudioEncoderOutput(
            audio_codes=codes.masked_fill(~mask[:, None], -1), audio_codes_mask=mask, last_hidden_state=states
        )

    def _encode_continuous(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bridge's vectors (chunks, at least frames, quantizer_size), valid frames (chunks,), encoder output."""
        config = self.config
        if input_features.dim() != 3 or input_features.shape[1] != config.num_mel_bins:
            raise ValueError(
                f"`input_features` must be (chunks, {config.num_mel_bins}, mel_frames), got {tuple(input_features.shape)}."
            )
        if input_features.shape[-1] > config.max_mel_frames:
            raise ValueError(
                f"`input_features` has {input_features.shape[-1]} mel frames, the tokenizer takes {config.max_mel_frames} at "
                f"most ({config.max_audio_seconds} s): let the feature extractor cut longer audio into chunks."
            )
        expected = (input_features.shape[0], input_features.shape[2])
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(expected, dtype=torch.bool)
        elif tuple(input_features_mask.shape) != expected:
            raise ValueError(f"`input_features_mask` must be {expected}, got {tuple(input_features_mask.shape)}.")
        mel_lengths = input_features_mask.sum(-1)
        features = input_features.to(self.encoder.conv1.weight.dtype)
        states, lengths = self.encoder(features, mel_lengths)
        return self.bridge(states), lengths // config.downsample_factor, states

    @property
    def max_code_frames(self) -> int:
        """Code frames of the longest clip that the mel decoder has positions for."""
        return (self.config.max_decoder_frames + 1) // self.config.downsample_factor

    def used_codebooks(self, num_codebooks: int | None) -> int:
        """`num_codebooks`, or all where it is None.

        Raises:
            ValueError: out of range.
        """
        used = self.config.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= used <= self.config.num_codebooks:
            raise ValueError(f"`num_codebooks` must be 1 to {self.config.num_codebooks}, got {num_codebooks}.")
        return used

    def decode(self, audio_codes: torch.Tensor, num_codebooks: int | None = None) -> BaichuanAudioDecoderOutput:
        """
        Codes -> hidden states for flow matching, coarse mel and refined mel.

        Args:
            audio_codes (`(batch, num_codebooks, frames)`, int64): -1 past the end of a clip.
            num_codebooks (`int`, *optional*): use only the first ones (the paper's Table 1).

        Raises:
            ValueError: codes of the wrong shape or range, an empty clip, or a clip longer than the position table was trained for.
        """
        check_codes(audio_codes, self.config.codebook_sizes)
        frames = frame_lengths(audio_codes)
        longest = self.max_code_frames
        if audio_codes.numel() == 0 or int(frames.min()) < 1 or int(frames.max()) > longest:
            raise ValueError(
                f"`audio_codes` needs clips of 1 to {longest} frames, got {frames.tolist()}: cut longer audio into clips."
            )
        used = self.used_codebooks(num_codebooks)
        vectors = self.quantizer.decode(audio_codes.clamp(min=0)[:, :used])
        return self.mel_decoder(vectors, frames)

    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        coarse_labels: torch.Tensor | None = None,
        mel_labels: torch.Tensor | None = None,
        text_labels: torch.Tensor | None = None,
        text_loss: TextLoss | None = None,
        replacement_share: float = 1.0,
        commitment_weight: float | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaichuanAudioTokenizerOutput:
        """
        Mel features -> codes -> mels, each chunk a clip; with mel labels, the losses too.

        With labels and in training mode the quantiser trains (see `ResidualVectorQuantizer.forward`). Without labels, or in
        evaluation mode, nothing is drawn or updated.

        Args:
            input_features, input_features_mask: as in `encode`.
            coarse_labels (`(chunks, 2 * (4 * frames - 1), 80)`, *optional*): log-mel targets at 100 Hz, and
            mel_labels (`(chunks, mel_frames, 80)`, *optional*): at 62.5 Hz, as `training.mel_targets` makes them.
            text_labels (`(chunks, tokens)`, int64, *optional*): transcripts for `text_loss`, padded on the right with -100.
            text_loss (*optional*): maps the decoder's input vectors `(chunks, frames, quantizer_size)`, the frames `(chunks,)` and
                `text_labels` to each clip's mean text loss `(chunks,)`.
            replacement_share (`float`, defaults to 1): probability, in training, that a clip is decoded from its quantised vectors.
            commitment_weight (`float`, *optional*): lambda3; the config's by default.
            num_items_in_batch (*optional*): code frames in all batches that one optimiser step accumulates; this batch's by default.
            generator (*optional*): of the quantiser's draws.

        Raises:
            ValueError: one kind of mel labels, or of the text arguments, without the other; labels of the wrong shape.
        """
        if (coarse_labels is None) != (mel_labels is None):
            raise ValueError("`coarse_labels` and `mel_labels` are needed together: the loss is over both mel scales.")
        if (text_labels is None) != (text_loss is None):
            raise ValueError("`text_labels` and `text_loss` are needed together.")
        if coarse_labels is None:
            if text_labels is not None:
                raise ValueError("`text_labels` need `coarse_labels` and `mel_labels` beside them.")
            encoded = self._encode(input_features, input_features_mask)
            decoded = self.decode(encoded.audio_codes)
            return BaichuanAudioTokenizerOutput(
                audio_codes=encoded.audio_codes,
                audio_codes_mask=encoded.audio_codes_mask,
                coarse_mel=decoded.coarse_mel,
                refined_mel=decoded.refined_mel,
                mel_lengths=decoded.mel_lengths,
            )
        vectors, frames, _ = self._encode_continuous(input_features, input_features_mask)
        quantized = self.quantizer(vectors[:, : int(frames.max())], frames, replacement_share, generator)
        decoded = self.mel_decoder(quantized.vectors, frames)
        config = self.config
        weight = config.commitment_weight if commitment_weight is None else commitment_weight
        losses = tokenizer_losses(
            decoded,
            coarse_labels,
            mel_labels,
            quantized.commitment,
            None if text_loss is None else text_loss(quantized.vectors, frames, text_labels),
            frames,
            (config.reconstruction_weight, config.text_loss_weight, weight),
            num_items_in_batch,
        )
        return BaichuanAudioTokenizerOutput(
            **losses,
            audio_codes=quantized.codes,
            audio_codes_mask=length_mask(frames, quantized.codes.shape[-1]),
            coarse_mel=decoded.coarse_mel,
            refined_mel=decoded.refined_mel,
            mel_lengths=decoded.mel_lengths,
            perplexity=quantized.perplexity,
            usage=quantized.usage,
            replaced=quantized.replaced,
        )


__all__ = [
    "BaichuanAudioDecoderOutput",
    "BaichuanAudioEncoderOutput",
    "BaichuanAudioTokenizerModel",
    "BaichuanAudioTokenizerOutput",
]
