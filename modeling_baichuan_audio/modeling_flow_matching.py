"""Flow-matching decoder: mel decoder states -> 24 kHz log-mel (paper, section 3.1; OT-CFM, arXiv 2302.00482)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from .configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig
from .modeling_common import (
    BaichuanAudioAttention,
    BaichuanAudioPreTrainedModel,
    BaichuanAudioRMSNorm,
    BaichuanAudioTransformerLayer,
    draw_seeds,
    length_mask,
    position_noise,
    sinusoidal_embedding,
)


@dataclass
class BaichuanAudioFlowMatchingOutput(ModelOutput):
    """
    Args:
        mel (`(batch, frames, num_mel_bins)`, float32): natural-log mel at 50 Hz, zero past the end.
        condition (`(batch, frames, num_mel_bins)`): the pre-net's mu, which the solver was conditioned on.
        mel_lengths (`(batch,)`, int64): valid frames.
    """

    mel: torch.FloatTensor | None = None
    condition: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None


class FlowMatchingPreNet(nn.Module):
    """Causal transformer from mel decoder states to the condition mu, frame by frame (length ratio 1)."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__()
        self.config = config
        width = config.prenet_hidden_size
        self.in_fc1 = nn.Linear(config.input_size, 4 * width)
        self.in_fc2 = nn.Linear(4 * width, width)
        self.layers = nn.ModuleList(
            [
                BaichuanAudioTransformerLayer(
                    config,
                    width,
                    config.prenet_attention_heads,
                    config.prenet_ffn_dim,
                    config.prenet_hidden_act,
                    is_causal=True,
                    rms_norm_eps=config.rms_norm_eps,
                )
                for _ in range(config.prenet_layers)
            ]
        )
        self.norm = BaichuanAudioRMSNorm(width, config.rms_norm_eps)
        self.out_proj = nn.Linear(width, config.num_mel_bins, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, frames, input_size) -> (batch, frames, num_mel_bins)."""
        states = self.in_fc2(nn.functional.silu(self.in_fc1(hidden_states)))
        # Causal, so padding on the right is never seen.
        mask = create_causal_mask(config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        for layer in self.layers:
            states = layer(states, mask)
        return self.out_proj(self.norm(states))


class CausalConv1d(nn.Conv1d):
    """Convolution over (batch, channels, time) that sees only the past: all padding on the left."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(states, (self.kernel_size[0] - 1, 0)))


class CausalBlock(nn.Module):
    """Causal convolution, layer norm over channels, Mish; (batch, channels, time) in and out."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = CausalConv1d(in_channels, out_channels, 3)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.mish(self.norm(self.conv(states).transpose(1, 2)).transpose(1, 2))


class CausalResnetBlock(nn.Module):
    """Two causal blocks with the time embedding added between them, beside a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.time_proj = nn.Linear(time_channels, out_channels)
        self.block1 = CausalBlock(in_channels, out_channels)
        self.block2 = CausalBlock(out_channels, out_channels)
        self.res_conv = nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.block1(states) + self.time_proj(nn.functional.mish(time))[..., None]
        return self.block2(hidden) + self.res_conv(states)


class EstimatorTransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward over (batch, time, channels)."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__()
        width = config.estimator_channels
        self.norm1 = nn.LayerNorm(width)
        self.attn = BaichuanAudioAttention(
            config,
            width,
            config.estimator_attention_heads,
            head_dim=config.estimator_head_dim,
            biases=(False, False, False, True),
        )
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        states = states + self.attn(self.norm1(states), attention_mask)[0]
        return states + self.fc2(ACT2FN["gelu"](self.fc1(self.norm2(states))))


class EstimatorStage(nn.Module):
    """One U-Net stage: ResNet block, transformer blocks and, at the ends of the U, a causal convolution."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig, in_channels: int, with_conv: bool):
        super().__init__()
        width = config.estimator_channels
        self.resnet = CausalResnetBlock(in_channels, width, 4 * width)
        self.blocks = nn.ModuleList([EstimatorTransformerBlock(config) for _ in range(config.estimator_blocks)])
        self.conv = CausalConv1d(width, width, 3) if with_conv else None

    def forward(self, states, time, attention_mask) -> torch.Tensor:
        """(batch, channels, time) -> the same, before the stage's own convolution."""
        states = self.resnet(states, time).transpose(1, 2)
        for block in self.blocks:
            states = block(states, attention_mask)
        return states.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Flow time -> sinusoids of 1000 t (float32) -> two linear layers."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """(batch,) float32 -> (batch, out_channels)."""
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
        self.final_proj = nn.Conv1d(width, mel, 1)

    def chunk_mask(self, lengths: torch.Tensor, frames: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive (batch, 1, frames, frames) mask: a frame sees valid frames up to its own chunk's end. None if it sees all."""
        size = self.config.attention_chunk_size
        if frames <= size and bool((lengths == frames).all()):
            return None
        steps = torch.arange(frames, device=lengths.device)
        seen = steps < (steps[:, None] // size + 1) * size
        seen = seen & length_mask(lengths, frames)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=lengths.device)
        return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]

    def forward(self, noisy_mel, time, condition, attention_mask=None) -> torch.Tensor:
        """
        Args:
            noisy_mel (`(batch, frames, num_mel_bins)`): x at flow time t.
            time (`(batch,)`, float32): t in [0, 1].
            condition (`(batch, frames, num_mel_bins)`): mu, or zeros for the unconditional estimate.
            attention_mask (*optional*): from `chunk_mask`.

        Returns:
            `(batch, frames, num_mel_bins)`: the velocity.
        """
        states = torch.cat([noisy_mel, condition], dim=-1).to(self.final_proj.weight.dtype).transpose(1, 2)
        embedded_time = self.time_mlp(time)
        skip = self.down_stage(states, embedded_time, attention_mask)
        states = self.down_stage.conv(skip)
        for stage in self.mid_stages:
            states = stage(states, embedded_time, attention_mask)
        states = self.up_stage(torch.cat([states, skip], dim=1), embedded_time, attention_mask)
        states = self.final_block(self.up_stage.conv(states))
        return self.final_proj(states).transpose(1, 2)


class BaichuanAudioFlowMatchingDecoder(BaichuanAudioPreTrainedModel):
    """Pre-net, estimator and solver. A clip's mel never depends on its batch, and its noise only on its seed."""

    config: BaichuanAudioFlowMatchingConfig
    base_model_prefix = "flow_matching"
    main_input_name = "hidden_states"
    input_modalities = ("audio",)
    _no_split_modules = ["BaichuanAudioTransformerLayer", "EstimatorStage"]
    _can_record_outputs = {"hidden_states": BaichuanAudioTransformerLayer, "attentions": BaichuanAudioAttention}

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__(config)
        self.prenet = FlowMatchingPreNet(config)
        self.estimator = FlowMatchingEstimator(config)
        self.post_init()

    def time_grid(self, num_steps: int) -> list[float]:
        """Flow times t_0 = 0 .. t_n = 1 of the Euler steps (`time_schedule`)."""
        grid = [step / num_steps for step in range(num_steps + 1)]
        if self.config.time_schedule == "cosine":
            grid = [1 - math.cos(t * math.pi / 2) for t in grid]
        return grid

    def noise(self, seeds: list[int], lengths: torch.Tensor, frames: int) -> torch.Tensor:
        """(batch, frames, num_mel_bins) float32 starting noise, a function of seed and absolute frame alone."""
        noise = torch.zeros(len(seeds), frames, self.config.num_mel_bins)
        for row, seed, length in zip(noise, seeds, lengths.tolist()):
            row[:length] = position_noise(seed, "flow", 0, length, self.config.num_mel_bins, self.config.attention_chunk_size)
        return noise.to(lengths.device)

    @torch.no_grad()
    def solve(
        self,
        condition: torch.Tensor,
        lengths: torch.Tensor,
        noise: torch.Tensor,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """
        Euler steps from noise to mel, with classifier-free guidance (arXiv 2207.12598).

        Args:
            condition (`(batch, frames, num_mel_bins)`), lengths (`(batch,)`), noise (as condition, float32).
            num_steps, guidance (*optional*): the config's by default.

        Returns:
            `(batch, frames, num_mel_bins)` float32, zero past the end.
        """
        num_steps = self.config.num_steps if num_steps is None else num_steps
        guidance = self.config.guidance if guidance is None else guidance
        if num_steps < 1 or guidance < 0:
            raise ValueError(f"`num_steps` must be at least 1 and `guidance` not negative, got {num_steps} and {guidance}.")
        mask = self.estimator.chunk_mask(lengths, condition.shape[1], self.estimator.final_proj.weight.dtype)
        if guidance:  # one pass at twice the batch: with the condition, and without
            condition = torch.cat([condition, torch.zeros_like(condition)])
            mask = None if mask is None else torch.cat([mask, mask])
        mel, grid = noise.float(), self.time_grid(num_steps)
        for start, end in zip(grid, grid[1:]):
            state = torch.cat([mel, mel]) if guidance else mel
            time = torch.full((state.shape[0],), start, dtype=torch.float32, device=mel.device)
            velocity = self.estimator(state, time, condition, mask).float()
            if guidance:
                with_condition, without = velocity.chunk(2)
                velocity = (1 + guidance) * with_condition - guidance * without
            mel = mel + (end - start) * velocity
        return mel.masked_fill(~length_mask(lengths, mel.shape[1])[..., None], 0.0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        **kwargs,
    ) -> BaichuanAudioFlowMatchingOutput:
        """
        Mel decoder states -> log-mel.

        Args:
            hidden_states (`(batch, frames, input_size)`): from `BaichuanAudioTokenizerModel.decode`, 50 Hz.
            lengths (`(batch,)`, *optional*): valid frames; all by default.
            noise (`(batch, frames, num_mel_bins)`, *optional*): starting noise, instead of drawing it.
            seed (`int` or one per clip, *optional*): of the noise; from torch's global generator by default.
            num_steps (`int`, *optional*), guidance (`float`, *optional*): solver settings, the config's by default.

        Raises:
            ValueError: shapes or solver settings that do not fit.
        """
        batch, frames = hidden_states.shape[:2]
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.config.input_size:
            raise ValueError(
                f"`hidden_states` must be (batch, frames, {self.config.input_size}), got {tuple(hidden_states.shape)}."
            )
        if lengths is None:
            lengths = torch.full((batch,), frames, device=hidden_states.device)
        if noise is None:
            noise = self.noise(draw_seeds(seed, batch), lengths, frames)
        elif tuple(noise.shape) != (batch, frames, self.config.num_mel_bins):
            raise ValueError(f"`noise` must be {(batch, frames, self.config.num_mel_bins)}, got {tuple(noise.shape)}.")
        condition = self.prenet(hidden_states.to(self.prenet.in_fc1.weight.dtype))
        mel = self.solve(condition, lengths, noise, num_steps, guidance)
        return BaichuanAudioFlowMatchingOutput(mel=mel, condition=condition, mel_lengths=lengths)


__all__ = ["BaichuanAudioFlowMatchingDecoder", "BaichuanAudioFlowMatchingOutput"]
