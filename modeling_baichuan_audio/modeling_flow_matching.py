"""Flow-matching decoder: mel decoder states -> 24 kHz log-mel (paper, section 3.1; OT-CFM, arXiv 2302.00482)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

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
)
from .modeling_flow_estimator import CausalConv1d, FlowMatchingEstimator, PointwiseConv1d
from .modeling_flow_solver import SolverSettings, flow_time, integrate
from .streaming_flow_matching import FlowMatchingStream, causal_mask, push


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
        hidden_states, attentions: the pre-net's, where asked for with `output_hidden_states` or `output_attentions`.
    """

    loss: torch.FloatTensor | None = None
    flow_loss: torch.FloatTensor | None = None
    prior_loss: torch.FloatTensor | None = None
    mel: torch.FloatTensor | None = None
    condition: torch.FloatTensor | None = None
    mel_lengths: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


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

    def forward(self, hidden_states: torch.Tensor, caches: list[list[torch.Tensor]] | None = None) -> torch.Tensor:
        """
        (batch, frames, input_size) -> (batch, frames, num_mel_bins).

        `caches` (*optional*): for each layer keys and values of the frames before, empty at the start; this call's are added.
        """
        states = self.in_fc2(nn.functional.silu(self.in_fc1(hidden_states)))
        # Causal, so padding on the right is never seen.
        if caches is None:
            mask = create_causal_mask(config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
            caches = [None] * len(self.layers)
        else:
            mask = causal_mask(states, past=caches[0][0].shape[2] if caches[0] else 0)
        for layer, cache in zip(self.layers, caches):
            states = layer(states, mask, cache=cache)
        return self.out_proj(self.norm(states))


class BaichuanAudioFlowMatchingDecoder(BaichuanAudioPreTrainedModel):
    """Pre-net, estimator and solver. A clip's mel never depends on its batch, and its noise only on its seed."""

    config: BaichuanAudioFlowMatchingConfig
    base_model_prefix = "flow_matching"
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
    main_input_name = "hidden_states"
    input_modalities = ("audio",)
    _no_split_modules = ["BaichuanAudioTransformerLayer", "EstimatorStage"]
    # Of the pre-net. The estimator runs once or twice per solver step.
    _can_record_outputs = {
        "hidden_states": BaichuanAudioTransformerLayer,
        "attentions": OutputRecorder(BaichuanAudioAttention, index=1, layer_name="prenet"),
    }

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        super().__init__(config)
        self.prenet = FlowMatchingPreNet(config)
        self.estimator = FlowMatchingEstimator(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (CausalConv1d, PointwiseConv1d)) and self.config.initializer_range:
            # At first the velocity is little else than the noise of the same frame, turned round. Convolutions that hear the present
            # above the past, and as loud as it comes in, soon learn that; with all taps alike it drowns in the frames before.
            weight = module.weight.clone()
            weight[..., -1] *= module.in_channels**-0.5 / self.config.initializer_range
            init.copy_(module.weight, weight)

    def solver_settings(self, num_steps=None, guidance=None, time_schedule=None, chunk_sizes=None) -> SolverSettings:
        """The settings given, and the config's for those that are None."""
        config = self.config
        return SolverSettings(
            num_steps=config.num_steps if num_steps is None else num_steps,
            guidance=config.guidance if guidance is None else guidance,
            time_schedule=time_schedule or config.time_schedule,
            chunk_sizes=[config.attention_chunk_size] if chunk_sizes is None else list(chunk_sizes),
        )

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
        time_schedule: str | None = None,
        chunk_sizes: list[int] | None = None,
        dense_attention: bool | None = None,
    ) -> torch.Tensor:
        """
        Euler steps from noise to mel, with classifier-free guidance (arXiv 2207.12598).

        Args:
            condition (`(batch, frames, num_mel_bins)`), lengths (`(batch,)`), noise (as condition, float32).
            num_steps, guidance, time_schedule (*optional*): the config's by default; for the schedules see `flow_time`.
            chunk_sizes (`list[int]`, *optional*): frames of the attention chunks, the last one repeated; the config's by default.
            dense_attention (`bool`, *optional*): attention over all frames under a mask, the slow twin of attention chunk by chunk;
                by default only where the attention implementation is "eager".

        Returns:
            `(batch, frames, num_mel_bins)` float32, zero past the end.

        Raises:
            ValueError: settings out of range.
        """
        settings = self.solver_settings(num_steps, guidance, time_schedule, chunk_sizes)
        seen_by = lengths.repeat(2) if settings.guidance else lengths
        attention = self.estimator.visibility(seen_by, condition.shape[1], settings.chunk_sizes, dense_attention)
        mel = integrate(self.estimator, noise, condition, settings, attention)
        return mel.masked_fill(~length_mask(lengths, mel.shape[1])[..., None], 0.0)

    def start_stream(
        self,
        seeds: list[int],
        num_steps: int | None = None,
        guidance: float | None = None,
        time_schedule: str | None = None,
        chunk_sizes: list[int] | None = None,
    ) -> FlowMatchingStream:
        """
        The state before a stream's first frame; see [`~BaichuanAudioFlowMatchingDecoder.stream`].

        Args:
            seeds: one for each clip.
            num_steps, guidance, time_schedule, chunk_sizes (*optional*): as of `solve`. Small first chunks let the sound begin early;
                the mel is then that of `solve` with the same chunks.

        Raises:
            ValueError: no seeds or not integers, or settings out of range.
        """
        if isinstance(seeds, int) or not seeds:
            raise ValueError(f"`seeds` must be a list of one integer for each clip, got {seeds!r}.")
        settings = self.solver_settings(num_steps, guidance, time_schedule, chunk_sizes)
        return FlowMatchingStream(self.config, draw_seeds(seeds, len(seeds)), settings)

    @torch.no_grad()
    def stream(
        self,
        hidden_states: torch.Tensor,
        state: FlowMatchingStream,
        lengths: torch.Tensor | None = None,
        final: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, FlowMatchingStream]:
        """
        Pushes the next frames; mel comes out as soon as its attention chunk is complete, and is what `forward` gives for the whole.

        Args:
            hidden_states (`(batch, frames, input_size)`): any number of frames, 0 too.
            state: from `start_stream` or the last call; it moves on in place.
            lengths (`(batch,)`, *optional*): valid frames of this piece. A clip with fewer than `frames` has ended and takes no more;
                its last frames come out with the chunk of those that go on. By default clips that have not ended have all of them.
            final: whether this is the last piece of every clip.

        Returns:
            Mel `(batch, ready_frames, num_mel_bins)`, float32, zero past a clip's end; its valid frames, `(batch,)` int64; the state.

        Raises:
            ValueError: states of another shape, lengths out of range, or frames for a clip that has ended.
        """
        return push(self, hidden_states, state, lengths, final)

    def training_draws(self, seeds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each clip's flow time in [0, 1), (batch,) float32, and whether its mu is dropped, (batch,) bool: functions of its seed."""
        draws = [torch.rand(2, generator=seeded_generator(seed, "flow_time")).tolist() for seed in seeds]
        dropped = [self.training and draw < self.config.condition_dropout for _, draw in draws]
        return torch.tensor([flow_time(draw, self.config.time_schedule) for draw, _ in draws]), torch.tensor(dropped)

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
        attention = self.estimator.visibility(lengths, mel.shape[1])
        velocity = self.estimator(noisy_mel, time, condition.masked_fill(dropped[:, None, None], 0.0), attention).float()
        difference = (velocity - (mel - remains * noise)).square().masked_fill(~valid, 0.0)
        flow_loss = difference.sum() / (num_items * self.config.num_mel_bins)
        return flow_loss, self.prior_loss(condition, labels, lengths, num_items)

    def prior_loss(
        self, condition: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, num_items: torch.Tensor | int
    ) -> torch.Tensor:
        """What mu alone is held to: its mean absolute difference from the target mel, float32 scalar; arguments as of `losses`."""
        difference = (condition.float() - labels.float()).abs()
        valid = length_mask(lengths, condition.shape[1])[..., None]
        return difference.masked_fill(~valid, 0.0).sum() / (num_items * self.config.num_mel_bins)

    @capture_outputs
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
        time_schedule: str | None = None,
        chunk_sizes: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
            time_schedule (`str`, *optional*), chunk_sizes (`list[int]`, *optional*): solver settings too, see `solve`.

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
        mel = self.solve(condition, lengths, noise, num_steps, guidance, time_schedule, chunk_sizes) if solved else None
        return BaichuanAudioFlowMatchingOutput(**losses, mel=mel, condition=condition, mel_lengths=lengths)


__all__ = ["BaichuanAudioFlowMatchingDecoder", "BaichuanAudioFlowMatchingOutput"]
