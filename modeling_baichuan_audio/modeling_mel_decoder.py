"""Mel decoder of the speech tokenizer: codebook vectors to hidden states at 50 Hz and to a coarse and a refined mel."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from .configuration_baichuan_audio import BaichuanAudioTokenizerConfig
from .modeling_common import BaichuanAudioTransformerLayer, MaskedGroupNorm, length_mask, sinusoidal_embedding


@dataclass
class BaichuanAudioDecoderOutput(ModelOutput):
    """
    Args:
        hidden_states (`(batch, 4 * frames - 1, hidden_size)`): what flow matching starts from, 50 Hz, zero past the end.
        hidden_lengths (`(batch,)`, int64): their valid lengths.
        coarse_mel (`(batch, mel_frames, 80)`): decoded log-mel at 62.5 Hz, normalised as the input features are.
        refined_mel (`(batch, mel_frames, 80)`): the same after the refine net.
        mel_lengths (`(batch,)`, int64): valid lengths of both.
        full_rate_mel (`(batch, 2 * (4 * frames - 1), 80)`): the coarse mel before resampling, 100 Hz.
        full_rate_lengths (`(batch,)`, int64): its valid lengths.
    """

    hidden_states: torch.FloatTensor | None = None
    hidden_lengths: torch.LongTensor | None = None
    coarse_mel: torch.FloatTensor | None = None
    refined_mel: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None
    full_rate_mel: torch.FloatTensor | None = None
    full_rate_lengths: torch.LongTensor | None = None


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
        full_rate_lengths = lengths * self.config.decoder_stride_size
        mel = mel[..., : states.shape[1] * self.config.decoder_stride_size]
        mel = mel.masked_fill(~length_mask(full_rate_lengths, mel.shape[-1])[:, None], 0.0)
        coarse, mel_lengths = self.refine_net.resample(mel, full_rate_lengths)
        refined = self.refine_net(coarse, mel_lengths)
        return BaichuanAudioDecoderOutput(
            hidden_states=hidden_states,
            hidden_lengths=lengths,
            coarse_mel=coarse.transpose(1, 2),
            refined_mel=refined.transpose(1, 2),
            mel_lengths=mel_lengths,
            full_rate_mel=mel.transpose(1, 2),
            full_rate_lengths=full_rate_lengths,
        )
