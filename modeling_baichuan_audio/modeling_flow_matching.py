"""Flow-matching decoder: mel decoder states -> 24 kHz log-mel (paper, section 3.1; OT-CFM, arXiv 2302.00482)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig
from .modeling_common import (
    PART_KEYS_TO_IGNORE,
    BaichuanAudioAttention,
    BaichuanAudioPreTrainedModel,
    BaichuanAudioRMSNorm,
    BaichuanAudioTransformerLayer,
    draw_seeds,
    length_mask,
    position_noise,
    seeded_generator,
    sinusoidal_embedding,
)


@dataclass
class BaichuanAudioFlowMatchingOutput(ModelOutput):
    """
    Args:
        loss (`()`, float32, with `labels`): `flow_loss + prior_loss_weight * prior_loss`.
        flow_loss (`()`, float32, with `labels`): mean squared error of the velocity.
        prior_loss (`()`, float32, with `labels`): mean absolute difference of mu from the mel.
        mel (`(batch, frames, num_mel_bins)`, float32): natural-log mel at 50 Hz, zero past the end; None where it was not solved for.
        condition (`(batch, frames, num_mel_bins)`): the pre-net's mu, which the solver was conditioned on.
        mel_lengths (`(batch,)`, int64): valid frames.
    """

    loss: torch.FloatTensor | None = None
    flow_loss: torch.FloatTensor | None = None
    prior_loss: torch.FloatTensor | None = None
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


class EstimatorStage(GradientCheckpointingLayer):
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
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
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
        return [self.schedule(step / num_steps) for step in range(num_steps + 1)]

    def schedule(self, share: float) -> float:
        """Share of the steps in [0, 1] -> flow time."""
        return 1 - math.cos(share * math.pi / 2) if self.config.time_schedule == "cosine" else share

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

    def training_draws(self, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each clip's flow time in [0, 1), (batch,) float32, and whether its mu is dropped, (batch,) bool: functions of its seed."""
        draws = [torch.rand(2, generator=seeded_generator(seed, "flow_time")).tolist() for seed in seeds]
        dropped = [self.training and draw < self.config.condition_dropout for _, draw in draws]
        return torch.tensor([self.schedule(draw) for draw, _ in draws]), torch.tensor(dropped)

    def losses(
        self,
        condition: torch.Tensor,
        labels: torch.Tensor,
        lengths: torch.Tensor,
        noise: torch.Tensor,
        seeds: list[int],
        num_items: torch.Tensor | int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Optimal-transport conditional flow matching (arXiv 2210.02747, section 4.1, example II): the estimator meets
        y = (1 - (1 - sigma_min) t) z + t x1 and learns the velocity x1 - (1 - sigma_min) z.

        Args:
            condition, labels, noise (`(batch, frames, num_mel_bins)`): mu, the target mel x1 and z; lengths (`(batch,)`).
            seeds: of each clip's flow time and, in training mode, of whether its mu is dropped (arXiv 2207.12598).
            num_items: frames that the sums are divided by.

        Returns:
            Flow loss and prior loss, float32 scalars.
        """
        valid = length_mask(lengths, condition.shape[1])[..., None]
        mel, noise = labels.float().masked_fill(~valid, 0.0), noise.float().masked_fill(~valid, 0.0)
        time, dropped = (draw.to(mel.device) for draw in self.training_draws(seeds))
        remains = 1 - self.config.sigma_min
        noisy_mel = (1 - remains * time[:, None, None]) * noise + time[:, None, None] * mel
        mask = self.estimator.chunk_mask(lengths, mel.shape[1], self.estimator.final_proj.weight.dtype)
        velocity = self.estimator(noisy_mel, time, condition.masked_fill(dropped[:, None, None], 0.0), mask).float()
        values = num_items * self.config.num_mel_bins
        flow_loss = (velocity - (mel - remains * noise)).square().masked_fill(~valid, 0.0).sum() / values
        prior_loss = (condition.float() - mel).abs().masked_fill(~valid, 0.0).sum() / values
        return flow_loss, prior_loss

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_mel: bool | None = None,
        **kwargs,
    ) -> BaichuanAudioFlowMatchingOutput:
        """
        Mel decoder states -> log-mel, or with a target mel the training losses (the tokenizer before it stays frozen).

        Args:
            hidden_states (`(batch, frames, input_size)`): from `BaichuanAudioTokenizerModel.decode`, 50 Hz.
            lengths (`(batch,)`, *optional*): valid frames; all by default.
            noise (`(batch, frames, num_mel_bins)`, *optional*): starting noise, instead of drawing it.
            seed (`int` or one per clip, *optional*): of every random draw; from torch's global generator by default.
            num_steps (`int`, *optional*), guidance (`float`, *optional*): solver settings, the config's by default.
            labels (`(batch, frames, num_mel_bins)`, *optional*): target log-mel; what lies past a clip's end is ignored.
            generator (`torch.Generator`, *optional*): draws the clips' seeds, where `seed` is not given.
            num_items_in_batch (*optional*): valid frames of all batches whose gradients are accumulated; of this batch by default.
            return_mel (`bool`, *optional*): whether to solve for the mel; by default only without `labels`.

        Raises:
            ValueError: shapes or solver settings that do not fit, or both a seed and a generator.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.config.input_size:
            raise ValueError(
                f"`hidden_states` must be (batch, frames, {self.config.input_size}), got {tuple(hidden_states.shape)}."
            )
        batch, frames = hidden_states.shape[:2]
        if lengths is None:
            lengths = torch.full((batch,), frames, device=hidden_states.device)
        for name, given in (("noise", noise), ("labels", labels)):
            if given is not None and tuple(given.shape) != (batch, frames, self.config.num_mel_bins):
                raise ValueError(f"`{name}` must be {(batch, frames, self.config.num_mel_bins)}, got {tuple(given.shape)}.")
        if generator is not None:
            if seed is not None:
                raise ValueError("Give `seed` or `generator`, not both.")
            seed = torch.randint(2**62, (batch,), generator=generator, device=generator.device).tolist()
        if noise is None or labels is not None:
            seed = draw_seeds(seed, batch)
        if noise is None:
            noise = self.noise(seed, lengths, frames)
        condition = self.prenet(hidden_states.to(self.prenet.in_fc1.weight.dtype))
        losses = {}
        if labels is not None:
            items = lengths.sum() if num_items_in_batch is None else num_items_in_batch
            flow_loss, prior_loss = self.losses(condition, labels, lengths, noise, seed, items)
            loss = flow_loss + self.config.prior_loss_weight * prior_loss
            losses = {"loss": loss, "flow_loss": flow_loss, "prior_loss": prior_loss}
        solved = labels is None if return_mel is None else return_mel
        mel = self.solve(condition, lengths, noise, num_steps, guidance) if solved else None
        return BaichuanAudioFlowMatchingOutput(**losses, mel=mel, condition=condition, mel_lengths=lengths)


__all__ = ["BaichuanAudioFlowMatchingDecoder", "BaichuanAudioFlowMatchingOutput"]
