"""The flow-matching decoder's estimator: a causal U-Net with chunk-causal attention (paper, section 3.1).

Everything here takes and gives (batch, time, channels).
"""

from collections.abc import Iterator
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig
from .modeling_common import BaichuanAudioAttention, eager_attention_forward, length_mask, sinusoidal_embedding


class AttentionSpan(NamedTuple):
    """Queries `start .. stop` see the first `seen` keys, less those that `mask` (additive, broadcast over queries) rules out."""

    start: int
    stop: int
    seen: int
    mask: torch.Tensor | None


def chunk_bounds(frames: int, chunk_sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Start and end of every attention chunk of `frames` frames: the sizes in order, the last one repeated, the last chunk cut off."""
    start = 0
    for size in chain(chunk_sizes, repeat(chunk_sizes[-1])):
        if start >= frames:
            return
        yield start, min(start + size, frames)
        start += size


def padding_mask(lengths: torch.Tensor, frames: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive (batch, 1, 1, frames) mask of the frames past each clip's end."""
    # The lowest number rather than -inf: a row with nothing to see stays finite.
    mask = torch.zeros(len(lengths), frames, dtype=dtype, device=lengths.device)
    return mask.masked_fill(~length_mask(lengths, frames), torch.finfo(dtype).min)[:, None, None]


class CausalConv1d(nn.Conv1d):
    """Convolution that sees only the past: all padding on the left."""

    def forward(self, states: torch.Tensor, cache: list[torch.Tensor] | None = None) -> torch.Tensor:
        """`cache` (*optional*): the inputs just before `states`, empty at the start; replaced by this call's last ones."""
        reach = self.kernel_size[0] - 1
        states = torch.cat([cache[0], states], dim=1) if cache else nn.functional.pad(states, (0, 0, reach, 0))
        if cache is not None:
            cache[:] = [states[:, -reach:].clone()]  # a view would keep all of `states` alive
        return super().forward(states.transpose(1, 2)).transpose(1, 2)


class CausalBlock(nn.Module):
    """Causal convolution, layer norm over channels, Mish."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = CausalConv1d(in_channels, out_channels, 3)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, states: torch.Tensor, cache: list[torch.Tensor] | None = None) -> torch.Tensor:
        return nn.functional.mish(self.norm(self.conv(states, cache=cache)))


class PointwiseConv1d(nn.Conv1d):
    """Convolution of width 1, as the matrix product it is."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight.squeeze(-1), self.bias)


class CausalResnetBlock(nn.Module):
    """Two causal blocks with a shift that depends on the flow time between them, beside a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.time_proj = nn.Linear(time_channels, out_channels)
        self.block1 = CausalBlock(in_channels, out_channels)
        self.block2 = CausalBlock(out_channels, out_channels)
        self.res_conv = PointwiseConv1d(in_channels, out_channels)

    def forward(self, states: torch.Tensor, shift: torch.Tensor, caches) -> torch.Tensor:
        """shift (`(batch or 1, 1, out_channels)`): `time_proj` of the embedded flow time."""
        hidden = self.block1(states, cache=caches[0]) + shift
        return self.block2(hidden, cache=caches[1]) + self.res_conv(states)


class ChunkAttention(BaichuanAudioAttention):
    """Attention that is computed span by span, over the keys that a span sees and no others."""

    def forward(self, hidden_states, attention_mask=None, cache=None):
        """
        Args:
            hidden_states (`(batch, time, hidden_size)`).
            attention_mask (*optional*): `list[AttentionSpan]` that cover the queries in order, or a dense additive mask.
            cache (*optional*): a `KeyValueCache` with the keys and values before; this call's are appended.

        Returns:
            `(batch, time, hidden_size)` and the attention weights (None of several spans, or where the kernel gives none).
        """
        query, key, value = (self._heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            key, value = cache.append(key, value)
        spans = attention_mask
        if not isinstance(spans, list):
            spans = [AttentionSpan(0, query.shape[2], key.shape[2], attention_mask)]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        outputs = []
        for start, stop, seen, mask in spans:
            keys, values = key[:, :, :seen], value[:, :, :seen]
            output, weights = attention(self, query[:, :, start:stop], keys, values, mask, scaling=self.scaling, is_causal=False)
            outputs.append(output)
        if len(outputs) > 1:
            output, weights = torch.cat(outputs, dim=1), None
        return self.out_proj(output.flatten(-2)), weights


class EstimatorTransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward part."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__()
        width = config.estimator_channels
        self.norm1 = nn.LayerNorm(width)
        self.attn = ChunkAttention(
            config,
            width,
            config.estimator_attention_heads,
            head_dim=config.estimator_head_dim,
            biases=(False, False, False, True),
        )
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor, attention_mask=None, cache=None) -> torch.Tensor:
        states = states + self.attn(self.norm1(states), attention_mask, cache=cache)[0]
        return states + self.fc2(ACT2FN["gelu"](self.fc1(self.norm2(states))))


class EstimatorStage(GradientCheckpointingLayer):
    """One U-Net stage: ResNet block, transformer blocks and, at the ends of the U, a causal convolution."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig, in_channels: int, with_conv: bool):
        super().__init__()
        width = config.estimator_channels
        self.resnet = CausalResnetBlock(in_channels, width, 4 * width)
        self.blocks = nn.ModuleList([EstimatorTransformerBlock(config) for _ in range(config.estimator_blocks)])
        self.conv = CausalConv1d(width, width, 3) if with_conv else None

    def forward(self, states: torch.Tensor, shift: torch.Tensor, attention_mask=None, cache=None) -> torch.Tensor:
        """The stage up to its own convolution, which the U-Net calls: what comes before it is the skip connection."""
        resnet, attention = ((None, None), [None] * len(self.blocks)) if cache is None else (cache.resnet, cache.attention)
        states = self.resnet(states, shift, caches=resnet)
        for block, keys_and_values in zip(self.blocks, attention):
            states = block(states, attention_mask, cache=keys_and_values)
        return states


class TimeEmbedding(nn.Module):
    """Flow time -> sinusoids of 1000 t (float32) -> two linear layers."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """(n,) float32 -> (n, out_channels)."""
        embedding = sinusoidal_embedding(1000.0 * time.float(), self.in_channels)
        return self.linear_2(nn.functional.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class FlowMatchingEstimator(nn.Module):
    """Causal U-Net v(x, t | mu) with chunk-causal attention."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__()
        self.config = config
        width, mel = config.estimator_channels, config.num_mel_bins
        self.time_mlp = TimeEmbedding(2 * mel, 4 * width)
        self.down_stage = EstimatorStage(config, 2 * mel, with_conv=True)
        self.mid_stages = nn.ModuleList(
            [EstimatorStage(config, width, with_conv=False) for _ in range(config.estimator_mid_stages)]
        )
        self.up_stage = EstimatorStage(config, 2 * width, with_conv=True)
        self.final_block = CausalBlock(width, width)
        self.final_proj = PointwiseConv1d(width, mel)

    @property
    def dtype(self) -> torch.dtype:
        return self.final_proj.weight.dtype

    def chunk_mask(
        self, lengths: torch.Tensor, frames: int, dtype: torch.dtype, chunk_sizes: list[int] | None = None
    ) -> torch.Tensor | None:
        """Additive (batch, 1, frames, frames) mask: a frame sees valid frames up to its own chunk's end. None if it sees all."""
        bounds = list(chunk_bounds(frames, chunk_sizes or [self.config.attention_chunk_size]))
        if len(bounds) < 2 and bool((lengths == frames).all()):
            return None
        ends = torch.tensor([end for start, end in bounds for _ in range(start, end)], device=lengths.device)
        seen = torch.arange(frames, device=lengths.device) < ends[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=lengths.device).masked_fill(~seen, torch.finfo(dtype).min)
        return torch.minimum(mask, padding_mask(lengths, frames, dtype))

    def chunk_spans(
        self, lengths: torch.Tensor, frames: int, dtype: torch.dtype, chunk_sizes: list[int] | None = None
    ) -> list[AttentionSpan]:
        """What `chunk_mask` says, as one span for each chunk, so that what is masked is not computed."""
        shortest = int(lengths.min())
        return [
            AttentionSpan(start, end, end, None if shortest >= end else padding_mask(lengths, end, dtype))
            for start, end in chunk_bounds(frames, chunk_sizes or [self.config.attention_chunk_size])
        ]

    def visibility(self, lengths, frames, chunk_sizes=None, dense=None) -> torch.Tensor | list[AttentionSpan] | None:
        """`chunk_spans`, or with `dense` (which eager attention implies) their twin `chunk_mask`: the `attention_mask` of `forward`."""
        dense = self.config._attn_implementation == "eager" if dense is None else dense
        return (self.chunk_mask if dense else self.chunk_spans)(lengths, frames, self.dtype, chunk_sizes)

    def time_shifts(self, time: torch.Tensor) -> torch.Tensor:
        """Flow times (n,), float32 -> (n, stages, estimator_channels): all that the estimator makes of a time."""
        embedded = nn.functional.mish(self.time_mlp(time))
        stages = (self.down_stage, *self.mid_stages, self.up_stage)
        return torch.stack([stage.resnet.time_proj(embedded) for stage in stages], dim=1)

    def forward(self, noisy_mel, time, condition, attention_mask=None, cache=None) -> torch.Tensor:
        """
        Args:
            noisy_mel (`(batch, frames, num_mel_bins)`): x at flow time t.
            time (`(batch,)`, float32): t in [0, 1]; or `(batch or 1, stages, estimator_channels)`, its `time_shifts`.
            condition (`(batch, frames, num_mel_bins)`): mu, or zeros for the unconditional estimate.
            attention_mask (*optional*): from `visibility`; without one every frame sees every other.
            cache (`EstimatorCache`, *optional*): the frames before, at the same flow time; this call's are added to it.

        Returns:
            `(batch, frames, num_mel_bins)`: the velocity.
        """
        shifts = self.time_shifts(time) if time.dim() == 1 else time
        shifts = shifts[:, :, None].unbind(1)
        caches = [None] * len(shifts) if cache is None else cache.stages
        down_cache, up_cache, final_cache = (None, None, None) if cache is None else cache.convs
        states = torch.cat([noisy_mel, condition], dim=-1).to(self.dtype)
        skip = self.down_stage(states, shifts[0], attention_mask, caches[0])
        states = self.down_stage.conv(skip, cache=down_cache)
        for stage, shift, stage_cache in zip(self.mid_stages, shifts[1:], caches[1:]):
            states = stage(states, shift, attention_mask, stage_cache)
        states = self.up_stage(torch.cat([states, skip], dim=-1), shifts[-1], attention_mask, caches[-1])
        states = self.final_block(self.up_stage.conv(states, cache=up_cache), cache=final_cache)
        return self.final_proj(states)
