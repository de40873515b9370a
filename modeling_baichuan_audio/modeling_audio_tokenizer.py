"""Speech tokenizer: encoder, bridge and quantiser turn mel features into codes, the mel decoder turns codes into a mel."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput

from .configuration_baichuan_audio import BaichuanAudioTokenizerConfig
from .modeling_common import (
    BaichuanAudioAttention,
    BaichuanAudioPreTrainedModel,
    BaichuanAudioTransformerLayer,
    MaskedGroupNorm,
    check_codes,
    frame_lengths,
    length_mask,
    sinusoidal_embedding,
)
from .modeling_rvq import EuclideanCodebook, ResidualVectorQuantizer


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
class BaichuanAudioDecoderOutput(ModelOutput):
    """
    Args:
        hidden_states (`(batch, 4 * frames - 1, hidden_size)`): what flow matching starts from, 50 Hz, zero past the end.
        hidden_lengths (`(batch,)`, int64): their valid lengths.
        coarse_mel (`(batch, mel_frames, 80)`): decoded log-mel at 62.5 Hz, normalised as the input features are.
        refined_mel (`(batch, mel_frames, 80)`): the same after the refine net.
        mel_lengths (`(batch,)`, int64): valid lengths of both.
    """

    hidden_states: torch.FloatTensor | None = None
    hidden_lengths: torch.LongTensor | None = None
    coarse_mel: torch.FloatTensor | None = None
    refined_mel: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None


@dataclass
class BaichuanAudioTokenizerOutput(ModelOutput):
    """Codes of the encoder beside the mels of the decoder; fields as in the two outputs above."""

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    coarse_mel: torch.FloatTensor | None = None
    refined_mel: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None


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


class BaichuanAudioUpsample(nn.Module):
    """Transposed convolution without cropping, then a group norm over the whole clip."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        self.conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride=stride)
        self.norm = MaskedGroupNorm(out_channels)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, time), zero past `lengths` -> (batch, out_channels, (time - 1) * stride + kernel), its lengths."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        states = self.conv(states)
        lengths = (lengths - 1) * stride + kernel
        return self.norm(states, length_mask(lengths, states.shape[-1])[:, None]), lengths


class BaichuanAudioRefineNet(nn.Module):
    """Convolutional correction of the mel, after resampling it in time by nearest neighbour (100 Hz -> 62.5 Hz)."""

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__()
        self.config = config
        mel, width = config.num_output_mel_bins, config.refine_channels
        self.convs = nn.ModuleList(
            [nn.Conv1d(mel if i == 0 else width, width, 5, padding=2) for i in range(config.refine_layers)]
        )
        self.norms = nn.ModuleList([MaskedGroupNorm(width) for _ in range(config.refine_layers)])
        self.out_conv = nn.Conv1d(width, mel, 1)

    def resample(self, mel: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, mel_bins, time) at 100 Hz -> the same at 62.5 Hz, zero past the end, and the new lengths."""
        config = self.config
        up, down = config.hop_length * config.refine_sampling_rate, config.sampling_rate * config.refine_hop_length
        out_lengths = lengths * up // down
        steps = torch.arange(int(out_lengths.max()), device=mel.device)
        ratio = lengths.float() / out_lengths.clamp(min=1).float()
        source = (steps * ratio[:, None]).long().minimum(lengths[:, None] - 1)
        resampled = mel.gather(2, source[:, None].expand(-1, mel.shape[1], -1))
        return resampled.masked_fill(~length_mask(out_lengths, len(steps))[:, None], 0.0), out_lengths

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(batch, mel_bins, time), zero past `lengths` -> the refined mel, same shape."""
        mask = length_mask(lengths, mel.shape[-1])[:, None]
        states = mel
        for conv, norm in zip(self.convs, self.norms):
            states = nn.functional.mish(norm(conv(states), mask))
        return (mel + self.out_conv(states)).masked_fill(~mask, 0.0)


class BaichuanAudioMelDecoder(nn.Module):
    """Codes' vectors -> hidden states at 50 Hz -> coarse and refined mel."""

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.in_proj = nn.Linear(config.quantizer_size, width)
        self.dconv1 = BaichuanAudioUpsample(width, width, config.decoder_kernel_size, config.downsample_factor)
        self.layers = nn.ModuleList(
            [
                BaichuanAudioTransformerLayer(
                    config,
                    width,
                    config.decoder_attention_heads,
                    config.decoder_ffn_dim,
                    config.activation_function,
                    is_causal=True,
                )
                for _ in range(config.decoder_layers)
            ]
        )
        self.layer_norm = nn.LayerNorm(width)
        self.dconv2 = BaichuanAudioUpsample(
            width, config.num_output_mel_bins, config.decoder_kernel_size, config.decoder_stride_size
        )
        self.refine_net = BaichuanAudioRefineNet(config)

    def forward(self, vectors: torch.Tensor, frames: torch.Tensor) -> BaichuanAudioDecoderOutput:
        """(batch, frames, quantizer_size) summed codebook entries, (batch,) valid frames -> hidden states and mels."""
        valid = length_mask(frames, vectors.shape[1])[..., None]
        states = self.in_proj(vectors.to(self.in_proj.weight.dtype)).masked_fill(~valid, 0.0)
        states, lengths = self.dconv1(states.transpose(1, 2), frames)
        states = states.transpose(1, 2)
        positions = sinusoidal_embedding(torch.arange(states.shape[1], device=states.device), states.shape[2])
        states = states + positions.to(states.dtype)
        # Causal, so padding on the right is never seen.
        mask = create_causal_mask(config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        for layer in self.layers:
            states = layer(states, mask)
        valid = length_mask(lengths, states.shape[1])[..., None]
        hidden_states = self.layer_norm(states).masked_fill(~valid, 0.0)

        mel, _ = self.dconv2(hidden_states.transpose(1, 2), lengths)
        mel_lengths = lengths * self.config.decoder_stride_size
        mel = mel[..., : states.shape[1] * self.config.decoder_stride_size]
        mel = mel.masked_fill(~length_mask(mel_lengths, mel.shape[-1])[:, None], 0.0)
        coarse, mel_lengths = self.refine_net.resample(mel, mel_lengths)
        refined = self.refine_net(coarse, mel_lengths)
        return BaichuanAudioDecoderOutput(
            hidden_states=hidden_states,
            hidden_lengths=lengths,
            coarse_mel=coarse.transpose(1, 2),
            refined_mel=refined.transpose(1, 2),
            mel_lengths=mel_lengths,
        )


class BaichuanAudioTokenizerModel(BaichuanAudioPreTrainedModel, PreTrainedAudioTokenizerBase):
    """The speech tokenizer as a codec: mel features -> 12.5 Hz codes -> mel. A clip's result never depends on its batch."""

    config: BaichuanAudioTokenizerConfig
    base_model_prefix = "model.audio_tokenizer"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    output_modalities = ("audio",)
    _no_split_modules = ["BaichuanAudioTransformerLayer"]
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": BaichuanAudioTransformerLayer, "attentions": BaichuanAudioAttention}

    def __init__(self, config: BaichuanAudioTokenizerConfig):
        super().__init__(config)
        self.encoder = BaichuanAudioEncoder(config)
        self.bridge = BaichuanAudioBridge(config)
        self.quantizer = ResidualVectorQuantizer(config.codebook_sizes, config.quantizer_size)
        self.mel_decoder = BaichuanAudioMelDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, EuclideanCodebook):
            # The bridge ends in a layer norm: unit-variance entries are on its scale.
            init.normal_(module.embed)
            init.copy_(module.embed_avg, module.embed)
            init.ones_(module.cluster_size)

    def encode(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> BaichuanAudioEncoderOutput:
        """
        Mel features -> codes (paper, section 3.1).

        Args:
            input_features (`(chunks, num_mel_bins, mel_frames)`, float): log-mel chunks from the feature extractor.
            input_features_mask (`(chunks, mel_frames)`, *optional*): 1 where a chunk has a frame; everything by default.

        Raises:
            ValueError: wrong shapes, or chunks longer than `max_audio_seconds`.
        """
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
        frames = lengths // config.downsample_factor
        codes = self.quantizer.encode(self.bridge(states))[..., : int(frames.max())]
        mask = length_mask(frames, codes.shape[-1])
        return BaichuanAudioEncoderOutput(
            audio_codes=codes.masked_fill(~mask[:, None], -1), audio_codes_mask=mask, last_hidden_state=states
        )

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
        longest = (self.config.max_decoder_frames + 1) // self.config.downsample_factor
        if audio_codes.numel() == 0 or int(frames.min()) < 1 or int(frames.max()) > longest:
            raise ValueError(
                f"`audio_codes` needs clips of 1 to {longest} frames, got {frames.tolist()}: cut longer audio into clips."
            )
        used = self.config.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= used <= self.config.num_codebooks:
            raise ValueError(f"`num_codebooks` must be 1 to {self.config.num_codebooks}, got {num_codebooks}.")
        vectors = self.quantizer.decode(audio_codes.clamp(min=0)[:, :used])
        return self.mel_decoder(vectors, frames)

    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> BaichuanAudioTokenizerOutput:
        """Mel features -> codes -> mels, each chunk a clip. Arguments as in `encode`."""
        encoded = self.encode(input_features, input_features_mask)
        decoded = self.decode(encoded.audio_codes)
        return BaichuanAudioTokenizerOutput(
            audio_codes=encoded.audio_codes,
            audio_codes_mask=encoded.audio_codes_mask,
            coarse_mel=decoded.coarse_mel,
            refined_mel=decoded.refined_mel,
            mel_lengths=decoded.mel_lengths,
        )


__all__ = [
    "BaichuanAudioDecoderOutput",
    "BaichuanAudioEncoderOutput",
    "BaichuanAudioTokenizerModel",
    "BaichuanAudioTokenizerOutput",
]
