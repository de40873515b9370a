"""Codes -> waveform without the LLM: mel decoder, flow matching and vocoder."""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .configuration_baichuan_audio import BaichuanAudioConfig
from .modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from .modeling_common import BaichuanAudioPreTrainedModel, check_codes, draw_seeds, frame_lengths, pad_codes
from .modeling_flow_matching import BaichuanAudioFlowMatchingDecoder
from .modeling_vocoder import BaichuanAudioVocoder
from .pipeline_flow_matching_vocoder import CUSTOM_PIPELINES
from .streaming_baichuan_audio import SpeechPieceStream, check_latency


class BaichuanAudioDecodingMixin:
    """`decode_audio` and `stream_audio`, for a model with `audio_tokenizer`, `flow_matching` and `vocoder`."""

    def _add_decoders(self, config: BaichuanAudioConfig) -> None:
        # The U-Net's chunk mask is a dense one: whatever kernel the LLM runs on, it needs sdpa or eager attention.
        attention = "eager" if config.flow_matching_config._attn_implementation == "eager" else "sdpa"
        self.flow_matching = BaichuanAudioFlowMatchingDecoder._from_config(
            config.flow_matching_config, attn_implementation=attention
        )
        self.vocoder = None if config.vocoder_config is None else BaichuanAudioVocoder._from_config(config.vocoder_config)

    def require_vocoder(self) -> BaichuanAudioVocoder:
        """The vocoder.

        Raises:
            ValueError: the checkpoint has none.
        """
        if self.vocoder is None:
            raise ValueError(
                "This checkpoint has no vocoder, so it cannot make a waveform. Add one with "
                "`baichuan-audio convert CHECKPOINT OUTPUT --hift hift.pt`, or ask for codes only (`output_audio=False`)."
            )
        return self.vocoder

    @torch.no_grad()
    def decode_audio(
        self,
        audio_codes: torch.LongTensor | list[torch.LongTensor],
        seed: int | list[int] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        num_codebooks: int | None = None,
        batch_size: int = 8,
    ) -> list[torch.Tensor]:
        """
        Codes -> waveforms, through the mel decoder, flow matching and the vocoder.

        Args:
            audio_codes (`(batch, num_codebooks, frames)` padded with -1, or a list of `(num_codebooks, frames)`): clips.
            seed (`int` or one per clip, *optional*): of all noise; a clip's sound depends on its codes and its seed alone.
            num_steps, guidance (*optional*): of the flow-matching solver; the config's by default.
            num_codebooks (`int`, *optional*): use only the first ones.
            batch_size (`int`, defaults to 8): clips decoded at once.

        Returns:
            One float32 `(samples,)` tensor per clip at `config.sampling_rate`: F frames give `(4 F - 1) * 480` samples.

        Raises:
            ValueError: no vocoder, or codes the tokenizer refuses.
        """
        vocoder = self.require_vocoder()
        if isinstance(audio_codes, torch.Tensor):
            check_codes(audio_codes, self.config.audio_tokenizer_config.codebook_sizes)
            audio_codes = [clip[:, :length] for clip, length in zip(audio_codes, frame_lengths(audio_codes).tolist())]
        seeds = draw_seeds(seed, len(audio_codes))
        waveforms = []
        for start in range(0, len(audio_codes), batch_size):
            batch = pad_codes([clip.to(self.device) for clip in audio_codes[start : start + batch_size]])
            decoded = self.audio_tokenizer.decode(batch, num_codebooks)
            flow = self.flow_matching(
                decoded.hidden_states,
                decoded.hidden_lengths,
                seed=seeds[start : start + batch_size],
                num_steps=num_steps,
                guidance=guidance,
            )
            sound = vocoder(flow.mel, flow.mel_lengths, seed=seeds[start : start + batch_size])
            waveforms += [wave[:length] for wave, length in zip(sound.waveform, sound.waveform_lengths.tolist())]
        return waveforms

    def stream_audio(
        self,
        audio_codes: torch.LongTensor | Iterable[torch.LongTensor],
        seed: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        latency: str = "exact",
    ) -> Iterator[torch.Tensor]:
        """
        One clip's codes -> its waveform in chunks, as they become ready.

        Args:
            audio_codes (`(num_codebooks, frames)`, or an iterable of such pieces as they come): the clip.
            seed, num_steps, guidance (*optional*): as in `decode_audio`.
            latency: "exact": the chunks together are what `decode_audio` gives, and begin when the clip is complete. "low_latency":
                they begin with its first frames, and differ a little.

        Returns:
            An iterator over float32 `(samples,)` tensors; F frames give `(4 F - 1) * 480` samples in all.

        Raises:
            ValueError: an unknown `latency`, no vocoder; codes the tokenizer refuses, as they come.
        """
        self.require_vocoder()
        check_latency(latency)
        stream = SpeechPieceStream(self, draw_seeds(seed, 1)[0], latency, num_steps, guidance)
        nothing = torch.empty(self.config.audio_tokenizer_config.num_codebooks, 0, dtype=torch.long)
        pieces = [audio_codes] if isinstance(audio_codes, torch.Tensor) else audio_codes

        def chunks() -> Iterator[torch.Tensor]:
            for piece in pieces:
                yield from stream.push(piece.to(self.device), final=False)
            yield from stream.push(nothing.to(self.device), final=True)

        return chunks()


class BaichuanAudioWaveformDecoder(BaichuanAudioDecodingMixin, BaichuanAudioPreTrainedModel):
    """
    Everything that turns codes into sound and nothing else: codebooks and mel decoder of the tokenizer, flow matching, vocoder.

    `from_pretrained` takes them out of a full checkpoint without reading or allocating the LLM, the audio head or the encoder;
    `save_pretrained` writes a small checkpoint of these parts alone, under the names of the full one.

    Raises:
        ValueError: the config has no vocoder.
    """

    config: BaichuanAudioConfig
    base_model_prefix = "model"
    main_input_name = "audio_codes"
    input_modalities = ("audio",)
    output_modalities = ("audio",)
    _auto_class = "AutoModelForTextToSpectrogram"  # of transformers' Auto classes the nearest; pipelines need one
    _no_split_modules = ["BaichuanAudioTransformerLayer", "EstimatorStage"]
    _keep_in_fp32_modules_strict = ["vocoder"]

    def __init__(self, config: BaichuanAudioConfig):
        super().__init__(config)
        tokenizer = BaichuanAudioTokenizerModel._from_config(config.audio_tokenizer_config)
        tokenizer.encoder = tokenizer.bridge = None  # codes come in: nothing is ever encoded here
        self.model = nn.ModuleDict({"audio_tokenizer": tokenizer})  # names as in the full checkpoint
        self._add_decoders(config)
        self.require_vocoder()
        self.post_init()

    @property
    def audio_tokenizer(self) -> BaichuanAudioTokenizerModel:
        return self.model["audio_tokenizer"]

    def set_auto_map(self) -> None:
        super().set_auto_map()
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def forward(self, audio_codes: torch.LongTensor, **kwargs) -> list[torch.Tensor]:
        """See `decode_audio`."""
        return self.decode_audio(audio_codes, **kwargs)


__all__ = ["BaichuanAudioDecodingMixin", "BaichuanAudioWaveformDecoder"]
