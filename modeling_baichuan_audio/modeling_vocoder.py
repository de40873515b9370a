"""HiFT vocoder: log-mel -> 24 kHz waveform through a neural source filter and an inverse STFT (arXiv 2309.09493).

Weight norm is folded into plain weights when `hift.pt` is converted. Every step works on the valid part of each clip alone, so a clip
in a padded batch equals the clip by itself. Everything is computed in float32: the network is small, and it integrates a phase.
With target waveforms the forward pass also returns spectral losses; discriminators are added by `training.vocoder_training`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_baichuan_audio import BaichuanAudioVocoderConfig
from .modeling_common import (
    PART_KEYS_TO_IGNORE,
    BaichuanAudioPreTrainedModel,
    draw_seeds,
    length_mask,
    position_noise,
    seeded_generator,
)
from .streaming_vocoder import VocoderStreamingMixin
from .vocoder_loss import check_waveform_labels, spectral_losses
from .weight_norm import apply_weight_norm, fold_weights, is_weight_normed, remove_weight_norm, unfold_weights


_TURN = 2**30  # a whole turn of a sine, as an integer


@dataclass
class BaichuanAudioVocoderOutput(ModelOutput):
    """
    Args:
        loss (`()`, float32, with `labels`): weighted sum of the losses below.
        mel_loss, stft_loss, multi_scale_mel_loss (`()`, float32, with `labels`, where the config gives them a weight): L1 of log-mels;
            multi-resolution STFT loss (arXiv 1910.11480); L1 of log-mels at six window lengths (arXiv 2306.06546).
        f0_loss (`()`, float32, with `f0_labels`): mean distance of F0 in Hz.
        waveform (`(batch, samples)`, float32): in [-0.99, 0.99], zero past the end.
        waveform_lengths (`(batch,)`, int64): valid samples.
        f0 (`(batch, frames)`, float32): fundamental frequency in Hz.
    """

    loss: torch.FloatTensor | None = None
    mel_loss: torch.FloatTensor | None = None
    stft_loss: torch.FloatTensor | None = None
    multi_scale_mel_loss: torch.FloatTensor | None = None
    f0_loss: torch.FloatTensor | None = None
    waveform: torch.FloatTensor | None = None
    waveform_lengths: torch.LongTensor | None = None
    f0: torch.FloatTensor | None = None


def _masked(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(batch, channels, time) with everything past `lengths` set to zero, which is what a convolution pads with."""
    return states.masked_fill(~length_mask(lengths, states.shape[-1])[:, None], 0.0)


def _exp_limited(states: torch.Tensor, limit: float) -> torch.Tensor:
    """exp(states) clipped at `limit`. The gradient is taken at the clipped value, so that a saturated bin can still come down."""
    values = states.exp().clamp(max=limit)
    # The second factor is exactly 1.
    return values.detach() * (states - states.detach()).exp() if states.requires_grad else values


def _limited(states: torch.Tensor, limit: float) -> torch.Tensor:
    """Clipped to +-limit, with the gradient of the identity, so that a saturated sample can still come down."""
    values = states.clamp(-limit, limit)
    return values.detach() + (states - states.detach()) if states.requires_grad else values


class FloatConv1d(nn.Conv1d):
    """A convolution computed in float32, whatever its weights were cast to."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(states, self.weight.float(), self.bias.float())


class FloatConvTranspose1d(nn.ConvTranspose1d):
    """A transposed convolution computed in float32, whatever its weights were cast to."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv_transpose1d(
            states, self.weight.float(), self.bias.float(), stride=self.stride, padding=self.padding
        )


class F0Predictor(nn.Module):
    """Log-mel -> fundamental frequency per frame."""

    def __init__(self, config: BaichuanAudioVocoderConfig):
        super().__init__()
        width = config.f0_channels
        self.convs = nn.ModuleList(
            [FloatConv1d(config.num_mel_bins if i == 0 else width, width, 3, padding=1) for i in range(config.f0_layers)]
        )
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(batch, num_mel_bins, frames), zero past the end -> (batch, frames) float32 in Hz, zero past the end."""
        for conv in self.convs:
            mel = _masked(nn.functional.elu(conv(mel)), lengths)
        weight, bias = self.classifier.weight.float(), self.classifier.bias.float()
        f0 = nn.functional.linear(mel.transpose(1, 2), weight, bias)[..., 0].abs()
        return f0.masked_fill(~length_mask(lengths, f0.shape[1]), 0.0)


class HarmonicSource(nn.Module):
    """Sines at F0 and its overtones plus noise, mixed to one channel (the neural source filter's excitation)."""

    def __init__(self, config: BaichuanAudioVocoderConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.num_harmonics + 1, 1)

    def cycles(self, f0: torch.Tensor) -> torch.Tensor:
        """(batch, frames) in Hz -> (batch, frames, num_harmonics + 1) float32: cycles per sample."""
        orders = torch.arange(1, self.config.num_harmonics + 2, device=f0.device, dtype=torch.float32)
        return f0.float()[..., None] * orders / self.config.sampling_rate

    def turns(self, f0: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """
        Where each sine stands at the end of each frame, in 2**-30 turns.

        Args:
            f0 (`(batch, frames)`, float32): Hz.
            before (`(batch, num_harmonics + 1)`, int64, *optional*): the result's last entry for the frames before.

        Returns:
            `(batch, frames, num_harmonics + 1)` int64, less than a turn.
        """
        # Whole cycles are dropped frame by frame and the rest is added in integers: exact over any length, and however it is cut.
        turns = (torch.remainder(self.cycles(f0) * self.config.hop_length, 1.0) * _TURN).long().cumsum(dim=1)
        return (turns if before is None else turns + before[:, None]) % _TURN

    def harmonics(self, f0: torch.Tensor, phases: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            f0 (`(batch, frames)`, float32): Hz, held for `hop_length` samples.
            phases (`(batch, num_harmonics + 1)`, float32): of each sine at the first sample of the clip, in radians.
            before (`(batch, num_harmonics + 1)`, int64, *optional*): the last `turns` of the frames before; 0 at a clip's start.

        Returns:
            `(batch, samples, num_harmonics + 1)` float32: sin(2 pi cumsum(f0 h / rate) + phase), before amplitude and voicing.
        """
        cycles = self.cycles(f0)
        if cycles.requires_grad:  # integers have no gradient; training clips are short enough for float32
            ends = torch.remainder(torch.cumsum(torch.remainder(cycles * self.config.hop_length, 1.0), dim=1), 1.0)
            starts = nn.functional.pad(ends, (0, 0, 1, 0))[:, :-1]
        else:
            ends = self.turns(f0, before)
            starts = (
                torch.cat([torch.zeros_like(ends[:, :1]) if before is None else before[:, None], ends[:, :-1]], dim=1) / _TURN
            )
        steps = torch.arange(1, self.config.hop_length + 1, device=f0.device, dtype=torch.float32)[:, None]
        turns = torch.remainder(starts[:, :, None] + cycles[:, :, None] * steps, 1.0).flatten(1, 2)
        return torch.sin(2 * math.pi * turns + phases[:, None])

    @staticmethod
    def _phases(draws: torch.Tensor) -> torch.Tensor:
        """(batch, harmonics) in [0, 1) -> radians, 0 for the fundamental."""
        phases = (2 * draws - 1) * math.pi
        phases[:, 0] = 0.0
        return phases

    def draw_phases(self, seeds: list[int]) -> torch.Tensor:
        """(batch, num_harmonics + 1) in radians, 0 for the fundamental; on the CPU."""
        width = self.config.num_harmonics + 1
        return self._phases(torch.stack([torch.rand(width, generator=seeded_generator(seed, "phase")) for seed in seeds]))

    def draw(self, seeds: list[int] | None, lengths: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Random phases (batch, harmonics) and noise (batch, samples, harmonics), functions of seed and absolute sample alone. Without
        seeds both come from torch's global generator of the lengths' device, many times faster: seeded noise is drawn on the CPU, by
        the second.
        """
        config, width = self.config, self.config.num_harmonics + 1
        if seeds is None:
            batch, device = len(lengths), lengths.device
            return self._phases(torch.rand(batch, width, device=device)), torch.randn(batch, samples, width, device=device)
        noise = torch.zeros(len(seeds), samples, width)
        for row, seed, length in zip(noise, seeds, lengths.tolist()):
            row[:length] = position_noise(seed, "source", 0, length, width, config.sampling_rate)
        return self.draw_phases(seeds).to(lengths.device), noise.to(lengths.device)

    def forward(
        self, f0: torch.Tensor, phases: torch.Tensor, noise: torch.Tensor, before: torch.Tensor | None = None
    ) -> torch.Tensor:
        """f0 (batch, frames), phases and noise of `draw`, `before` of `harmonics` -> (batch, samples) float32 source signal."""
        config = self.config
        voiced = (f0 > config.voiced_threshold).float().repeat_interleave(config.hop_length, dim=1)[..., None]
        noise_std = voiced * config.noise_std + (1 - voiced) * config.sine_amplitude / 3
        sines = config.sine_amplitude * self.harmonics(f0, phases, before) * voiced + noise_std * noise
        mixed = nn.functional.linear(sines, self.linear.weight.float(), self.linear.bias.float())
        return torch.tanh(mixed[..., 0])


class Snake(nn.Module):
    """x + sin(a x)^2 / a with one `a` per channel (arXiv 2006.08195)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        alpha = self.alpha.float()[:, None]
        return states + torch.sin(states * alpha).square() / (alpha + 1e-9)


class VocoderResBlock(nn.Module):
    """Dilated and plain convolution in turn, one residual pair per dilation; (batch, channels, time) in and out."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            [FloatConv1d(channels, channels, kernel_size, dilation=d, padding=d * (kernel_size // 2)) for d in dilations]
        )
        self.convs2 = nn.ModuleList([FloatConv1d(channels, channels, kernel_size, padding=kernel_size // 2) for _ in dilations])
        self.activations1 = nn.ModuleList([Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([Snake(channels) for _ in dilations])

    def forward(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        for conv1, conv2, snake1, snake2 in zip(self.convs1, self.convs2, self.activations1, self.activations2):
            hidden = _masked(conv1(snake1(states)), lengths)
            states = _masked(states + conv2(snake2(hidden)), lengths)
        return states


class VocoderStage(nn.Module):
    """One up-sampling stage: transposed convolution, the source signal's STFT fused in, the mean of the residual blocks."""

    def __init__(self, config: BaichuanAudioVocoderConfig, index: int):
        super().__init__()
        rate, kernel = config.upsample_rates[index], config.upsample_kernel_sizes[index]
        channels = config.base_channels // 2 ** (index + 1)
        self.rate, self.is_last = rate, index == len(config.upsample_rates) - 1
        self.upsample = FloatConvTranspose1d(2 * channels, channels, kernel, stride=rate, padding=(kernel - rate) // 2)
        later = math.prod(config.upsample_rates[index + 1 :])
        # A source frame per output frame of this stage; with stride 1 there is nothing to average.
        down = {"kernel_size": 1} if later == 1 else {"kernel_size": 2 * later, "stride": later, "padding": later // 2}
        self.source_down = FloatConv1d(config.istft_n_fft + 2, channels, **down)
        dilations = config.resblock_dilations
        self.source_resblock = VocoderResBlock(channels, config.source_resblock_kernel_sizes[index], dilations)
        self.resblocks = nn.ModuleList([VocoderResBlock(channels, size, dilations) for size in config.resblock_kernel_sizes])

    def forward(self, states, lengths, source_stft) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 2 * channels, time), (batch,), (batch, n_fft + 2, source_frames) -> (batch, channels, rate * time), lengths."""
        lengths = lengths * self.rate
        states = _masked(self.upsample(states), lengths)
        if self.is_last:  # one frame more, as the centred STFT has
            states, lengths = nn.functional.pad(states, (1, 0), mode="reflect"), lengths + 1
        source = _masked(self.source_down(source_stft), lengths)
        states = states + self.source_resblock(source, lengths)
        return sum(block(states, lengths) for block in self.resblocks) / len(self.resblocks), lengths


class BaichuanAudioVocoder(VocoderStreamingMixin, BaichuanAudioPreTrainedModel):
    """HiFT: log-mel at 50 Hz -> waveform at 24 kHz."""

    config: BaichuanAudioVocoderConfig
    base_model_prefix = "vocoder"
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
    main_input_name = "mel"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = False

    def __init__(self, config: BaichuanAudioVocoderConfig):
        super().__init__(config)
        self.f0_predictor = F0Predictor(config)
        self.source = HarmonicSource(config)
        self.conv_pre = FloatConv1d(config.num_mel_bins, config.base_channels, 7, padding=3)
        self.stages = nn.ModuleList([VocoderStage(config, index) for index in range(len(config.upsample_rates))])
        last = config.base_channels // 2 ** len(config.upsample_rates)
        self.conv_post = FloatConv1d(last, config.istft_n_fft + 2, 7, padding=3)
        # Whether `state_dict` shows weight norm's own parameters, from which training resumes exactly.
        self.keeps_weight_norm = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, dtype=None, **kwargs):
        """In float32 unless another dtype is named, whatever the rest of the checkpoint is in."""
        dtype = kwargs.pop("torch_dtype", dtype)  # the argument's earlier name
        return super().from_pretrained(*args, dtype=torch.float32 if dtype in (None, "auto") else dtype, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Snake):
            init.ones_(module.alpha)
        elif isinstance(module, FloatConvTranspose1d):
            # Linear interpolation in time: taps drawn apart from one another would leave a pattern that repeats with every frame
            # (arXiv 1707.02937).
            reach = module.kernel_size[0]
            taps = (1 - (torch.arange(reach) - (reach - 1) / 2).abs() / module.stride[0]).clamp(min=0)
            mixing = torch.empty(module.weight.shape[:2]).normal_(std=self.config.initializer_range)
            init.copy_(module.weight, mixing[..., None] * taps)

    def _weight_norm_modules(self) -> dict[str, nn.Module]:
        """What the published vocoder trains with weight norm: every convolution but the ones that read the source signal."""
        convolutions = {n: m for n, m in self.named_modules() if isinstance(m, (FloatConv1d, FloatConvTranspose1d))}
        return {name: module for name, module in convolutions.items() if not name.endswith("source_down")}

    @property
    def has_weight_norm(self) -> bool:
        return is_weight_normed(self.conv_pre)

    def apply_weight_norm(self) -> None:
        """
        Puts weight norm (arXiv 1602.07868) on the plain convolutions, for training. Make optimisers after it, not before: the
        parameters are new. What is saved meanwhile are plain weights.

        Raises:
            ValueError: it is there already.
        """
        if self.has_weight_norm:
            raise ValueError("The vocoder's convolutions already have weight norm.")
        for module in self._weight_norm_modules().values():
            apply_weight_norm(module)

    def remove_weight_norm(self) -> None:
        """
        Turns weight norm back into plain weights of the same value.

        Raises:
            ValueError: there is none.
        """
        if not self.has_weight_norm:
            raise ValueError("The vocoder's convolutions have no weight norm to remove.")
        for module in self._weight_norm_modules().values():
            remove_weight_norm(module)

    def state_dict(self, *args, prefix: str = "", **kwargs):
        """As torch's, with plain weights also while weight norm is applied, so that whatever is saved can be loaded anywhere."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.has_weight_norm and not self.keeps_weight_norm:
            fold_weights(state, [prefix + name for name in self._weight_norm_modules()])
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.has_weight_norm:
            unfold_weights(state_dict, [prefix + name for name in self._weight_norm_modules()])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def stft(self, signal: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, n_fft + 2, samples / hop + 1): real then imaginary part, reflected at each clip's own end."""
        size, hop = self.config.istft_n_fft, self.config.istft_hop_length
        steps = torch.arange(-(size // 2), signal.shape[1] + size // 2, device=signal.device).abs()
        ends = lengths[:, None] - 1
        index = torch.where(steps > ends, 2 * ends - steps, steps).clamp(min=0)
        frames = signal.float().gather(1, index).unfold(1, size, hop)
        window = torch.hann_window(size, device=signal.device)
        spectrum = torch.fft.rfft(frames * window).transpose(1, 2)
        return _masked(torch.cat([spectrum.real, spectrum.imag], dim=1), lengths // hop + 1)

    def istft(self, magnitude: torch.Tensor, phase: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(batch, n_fft / 2 + 1, frames) twice, float32, (batch,) valid frames -> (batch, (frames - 1) * hop) waveform."""
        size, hop = self.config.istft_n_fft, self.config.istft_hop_length
        window = torch.hann_window(size, device=magnitude.device)
        # Not `torch.polar`: its gradient is NaN where a magnitude is too small for a float.
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=size) * window
        valid = length_mask(lengths, frames.shape[1])[..., None].float()
        total = (frames.shape[1] - 1) * hop + size

        def overlap_add(pieces):
            return nn.functional.fold(pieces.transpose(1, 2), (1, total), (1, size), stride=(1, hop))[:, 0, 0]

        # Frames past a clip's end count neither as signal nor as window.
        signal, weight = overlap_add(frames * valid), overlap_add(window.square() * valid)
        centre = slice(size // 2, total - size // 2)
        return signal[:, centre] / weight[:, centre].clamp(min=1e-11)

    def decode(self, mel: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        Args:
            mel (`(batch, num_mel_bins, frames)`), source (`(batch, samples)`, float32), lengths (`(batch,)`): frames.

        Returns:
            `(batch, samples)` float32 waveform, zero past the end.
        """
        config = self.config
        source_stft = self.stft(source, lengths * config.hop_length)
        states = _masked(self.conv_pre(mel), lengths)
        stft_lengths = lengths
        for stage in self.stages:
            states = nn.functional.leaky_relu(states, config.leaky_relu_slope)
            states, stft_lengths = stage(states, stft_lengths, source_stft)
        states = self.conv_post(nn.functional.leaky_relu(states))
        bins = config.istft_n_fft // 2 + 1
        magnitude = _exp_limited(states[:, :bins], config.max_magnitude)
        waveform = self.istft(magnitude, torch.sin(states[:, bins:]), stft_lengths)
        waveform = _limited(waveform, config.audio_limit)
        return waveform.masked_fill(~length_mask(lengths * config.hop_length, waveform.shape[1]), 0.0)

    @can_return_tuple
    def forward(
        self,
        mel: torch.Tensor,
        lengths: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        source: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        f0_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> BaichuanAudioVocoderOutput:
        """
        Log-mel -> waveform, and with target waveforms the losses.

        Through the source signal the F0 predictor gets a gradient only at frames it calls voiced; `f0_labels` train it everywhere.
        In training mode `f0_labels` also drive the source signal (teacher forcing): voicing and phase follow the true pitch while the
        predictor is still wrong, and the two learn independently of each other, the predictor from `f0_loss` alone. In evaluation mode
        the source follows the predicted F0, so that the losses are of what generation gives.

        Args:
            mel (`(batch, frames, num_mel_bins)`): natural-log mel at 50 Hz.
            lengths (`(batch,)`, *optional*): valid frames; all by default.
            seed (`int` or one per clip, *optional*): of source phases and noise; from torch's global generator by default, in training
                mode from that of the mel's device.
            source (`(batch, frames * hop_length)`, *optional*): source signal, instead of making it from F0.
            labels (`(batch, frames * hop_length)`, *optional*): target waveforms; what lies past a clip's end is ignored.
            f0_labels (`(batch, frames)`, *optional*, with `labels`): target F0 in Hz, 0 where unvoiced; see above. What lies past a
                clip's end is ignored.
            num_items_in_batch (*optional*): valid frames of all batches whose gradients are accumulated; of this batch by default.

        Raises:
            ValueError: shapes that do not fit.
        """
        config = self.config
        if mel.dim() != 3 or mel.shape[-1] != config.num_mel_bins or mel.shape[1] == 0:
            raise ValueError(f"`mel` must be (batch, frames, {config.num_mel_bins}) with frames, got {tuple(mel.shape)}.")
        batch, frames = mel.shape[:2]
        samples = frames * config.hop_length
        if source is not None and tuple(source.shape) != (batch, samples):
            raise ValueError(f"`source` must be {(batch, samples)}, got {tuple(source.shape)}.")
        if lengths is None:
            lengths = torch.full((batch,), frames, device=mel.device)
        mel = _masked(mel.float().transpose(1, 2), lengths)
        if labels is not None:
            check_waveform_labels(labels, lengths, samples, config)
        if f0_labels is not None:
            if labels is None or tuple(f0_labels.shape) != (batch, frames):
                raise ValueError(f"`f0_labels` must be {(batch, frames)} and come with `labels`, got {tuple(f0_labels.shape)}.")
            f0_labels = f0_labels.float().masked_fill(~length_mask(lengths, frames), 0.0)
        f0 = self.f0_predictor(mel, lengths)
        if source is None:
            pitch = f0_labels if self.training and f0_labels is not None else f0
            seeds = None if seed is None and self.training else draw_seeds(seed, batch)
            source = self.source(pitch, *self.source.draw(seeds, lengths * config.hop_length, samples))
        waveform = self.decode(mel, source, lengths)
        losses = {}
        if labels is not None:
            items = lengths.sum() if num_items_in_batch is None else num_items_in_batch
            losses = spectral_losses(waveform, labels, lengths, config, items)
        if f0_labels is not None:
            losses["f0_loss"] = (f0 - f0_labels).abs().sum() / items  # both are zero past the end
            losses["loss"] = losses["loss"] + config.f0_loss_weight * losses["f0_loss"]
        return BaichuanAudioVocoderOutput(**losses, waveform=waveform, waveform_lengths=lengths * config.hop_length, f0=f0)


__all__ = ["BaichuanAudioVocoder", "BaichuanAudioVocoderOutput"]
