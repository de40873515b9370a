"""Training of the vocoder: random segments, and spectral losses, of one take, as an energy distance, or beside discriminators.

Energy distance: arXiv 2008.01160. Discriminators: HiFi-GAN, arXiv 2010.05646.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import soxr
import torch
from torch import nn
from transformers.utils import ModelOutput

from ..configuration_baichuan_audio import BaichuanAudioVocoderConfig
from ..mel_spectrogram import vocoder_log_mel
from ..modeling_common import draw_seeds, length_mask
from ..modeling_vocoder import BaichuanAudioVocoder
from ..vocoder_loss import multi_scale_mel_distance, rows_by_length
from .discriminators import VocoderDiscriminators, adversarial_loss, discriminator_loss, feature_matching_loss


_OTHER_TAKE = 1 << 40  # tells the seed of a segment's second take from that of the first


@dataclass
class VocoderTrainingOutput(ModelOutput):
    """
    Args:
        loss (`()`, float32): the vocoder's, weighted sum of its parts below; its gradient reaches the vocoder alone.
        discriminator_loss (`()`, float32, with discriminators): its gradient reaches the discriminators alone.
        mel_loss, stft_loss, multi_scale_mel_loss, f0_loss, adversarial_loss, feature_matching_loss (`()`, float32): unweighted parts,
            those that are in use.
        energy_distance, spread (`()`, float32, with `energy_distance`): unweighted, the loss and the distance between two takes.
        waveform (`(batch, samples)`, float32): generated, zero past the end.
        waveform_lengths (`(batch,)`, int64): valid samples.
    """

    loss: torch.FloatTensor | None = None
    discriminator_loss: torch.FloatTensor | None = None
    mel_loss: torch.FloatTensor | None = None
    stft_loss: torch.FloatTensor | None = None
    multi_scale_mel_loss: torch.FloatTensor | None = None
    f0_loss: torch.FloatTensor | None = None
    adversarial_loss: torch.FloatTensor | None = None
    feature_matching_loss: torch.FloatTensor | None = None
    energy_distance: torch.FloatTensor | None = None
    spread: torch.FloatTensor | None = None
    waveform: torch.FloatTensor | None = None
    waveform_lengths: torch.LongTensor | None = None


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside sends no gradient to the module's parameters, though it may pass through them."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class VocoderTrainingModule(nn.Module):
    """
    The vocoder and, if asked for, its discriminators.

    Because the two losses reach different parameters, one `(loss + discriminator_loss).backward()` serves two optimisers, one over
    `vocoder.parameters()` and one over `discriminators.parameters()`; so do two backward passes, in any order, before either steps.
    `state_dict` holds weight norm's own parameters where it is applied, so that training resumes exactly; the vocoder itself always
    saves plain weights.

    Noise cannot be foretold, so what comes nearest to it by a spectral distance alone is a smooth spectrum, which sounds like a buzz.
    With `energy_distance` every segment is generated twice, from phases and noise of its own, and in the place of spectral losses
    stands half the generalised energy distance (arXiv 2008.01160), `mean(d(take, real)) - d(take, other take) / 2`, with
    `multi_scale_mel_distance` as d and `multi_scale_mel_loss_weight` as its weight. It is least where takes differ from one another as
    each does from the recording.

    Args:
        vocoder: is trained in place.
        adversarial (defaults to False): whether to train against discriminators.
        period_width, spectrogram_width (default to the published 32): see `VocoderDiscriminators`.
        energy_distance (defaults to False): whether takes are to differ as recordings do. Twice the work of the vocoder.

    Raises:
        ValueError: `energy_distance` with a config that weighs `mel_loss` or `stft_loss`, or not `multi_scale_mel_loss`.
    """

    def __init__(
        self,
        vocoder: BaichuanAudioVocoder,
        adversarial: bool = False,
        period_width: int = 32,
        spectrogram_width: int = 32,
        energy_distance: bool = False,
    ):
        super().__init__()
        weights = {name: getattr(vocoder.config, f"{name}_loss_weight") for name in ("mel", "stft", "multi_scale_mel")}
        if energy_distance and [name for name, weight in weights.items() if weight] != ["multi_scale_mel"]:
            raise ValueError(f"`energy_distance` is of log-mels at many scales: it needs their weight alone, got {weights}.")
        self.energy_distance = energy_distance
        self.vocoder = vocoder
        self.discriminators = VocoderDiscriminators(period_width, spectrogram_width) if adversarial else None

    @property
    def config(self) -> BaichuanAudioVocoderConfig:
        return self.vocoder.config

    def state_dict(self, *args, **kwargs):
        self.vocoder.keeps_weight_norm = True
        try:
            return super().state_dict(*args, **kwargs)
        finally:
            self.vocoder.keeps_weight_norm = False

    def _adversarial_losses(self, waveform, labels, lengths, items) -> dict[str, torch.Tensor]:
        """Generated and real (batch, samples), (batch,) mel frames -> the three losses; a clip counts by its share of frames."""
        sums = dict.fromkeys(("discriminator_loss", "adversarial_loss", "feature_matching_loss"), 0.0)
        for frames, rows in rows_by_length(lengths):
            samples = frames * self.config.hop_length
            ours, theirs = waveform[rows, :samples], labels[rows, :samples].float()
            real = self.discriminators(theirs)
            sums["discriminator_loss"] += frames * discriminator_loss(real, self.discriminators(ours.detach())).sum()
            with _frozen(self.discriminators):
                generated = self.discriminators(ours)
            sums["adversarial_loss"] += frames * adversarial_loss(generated).sum()
            sums["feature_matching_loss"] += frames * feature_matching_loss(real, generated).sum()
        return {name: total / items for name, total in sums.items()}

    def _energy_distance(self, take, other, labels, lengths, items) -> dict[str, torch.Tensor]:
        """Two takes and the real (batch, samples), (batch,) mel frames -> the loss and what is in it of the takes' own distance."""
        distance, spread = 0.0, 0.0
        for frames, rows in rows_by_length(lengths):
            samples = frames * self.config.hop_length
            ours, others, theirs = (each[rows, :samples].float() for each in (take, other, labels))
            between = multi_scale_mel_distance(ours, others, self.config.sampling_rate)
            real = sum(multi_scale_mel_distance(each, theirs, self.config.sampling_rate) for each in (ours, others)) / 2
            spread += frames * between.sum()
            distance += frames * (real - between / 2).sum()
        return {"energy_distance": distance / items, "spread": spread / items}

    def forward(
        self,
        mel: torch.Tensor,
        labels: torch.Tensor,
        lengths: torch.Tensor | None = None,
        f0_labels: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> VocoderTrainingOutput:
        """
        Args:
            mel (`(batch, frames, num_mel_bins)`), labels (`(batch, frames * hop_length)`), lengths (`(batch,)`, *optional*), f0_labels,
            seed, num_items_in_batch (*optional*): as `BaichuanAudioVocoder.forward` takes them.

        Raises:
            ValueError: as `BaichuanAudioVocoder.forward`.
        """
        if lengths is None:
            lengths = torch.full((len(mel),), mel.shape[1], device=mel.device)
        items = lengths.sum() if num_items_in_batch is None else num_items_in_batch
        batch, takes = len(mel), 2 if self.energy_distance else 1
        if seed is not None:
            seed = draw_seeds(seed, batch)
            seed += [item ^ _OTHER_TAKE for item in seed] * (takes - 1)
        inputs = {"mel": mel, "lengths": lengths, "labels": labels, "f0_labels": f0_labels}
        inputs = {name: None if each is None else torch.cat([each] * takes) for name, each in inputs.items()}
        output = self.vocoder(**inputs, seed=seed, num_items_in_batch=takes * items)
        waveform, *others = output.waveform.split(batch)
        loss, losses = output.loss, {}
        if others:
            losses = self._energy_distance(waveform, others[0], labels, lengths, items)
            loss = self.config.multi_scale_mel_loss_weight * losses["energy_distance"]
            if output.f0_loss is not None:
                loss = loss + self.config.f0_loss_weight * output.f0_loss
        if self.discriminators is not None:
            losses |= self._adversarial_losses(waveform, labels, lengths, items)
            loss = loss + self.config.adversarial_loss_weight * losses["adversarial_loss"]
            loss = loss + self.config.feature_matching_loss_weight * losses["feature_matching_loss"]
        return VocoderTrainingOutput(
            loss=loss,
            mel_loss=output.mel_loss,
            stft_loss=output.stft_loss,
            multi_scale_mel_loss=output.multi_scale_mel_loss,
            f0_loss=output.f0_loss,
            waveform=waveform,
            waveform_lengths=output.waveform_lengths[:batch],
            **losses,
        )


def part_at_another_speed(
    waveform: torch.Tensor,
    frames: int,
    most: float,
    config: BaichuanAudioVocoderConfig,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Part of a clip played faster or slower, pitch and formants with it: a new voice, so to speak.

    Args:
        waveform (`(samples,)`, float32): at least `frames` mel frames.
        frames: mel frames that must remain.
        most: the factor is drawn between 1 / most and most, evenly on a logarithmic scale, and is lowered where a clip is too short.
        generator (*optional*): of the draws; torch's global one by default.

    Returns:
        `(n,)` float32, n at least `frames * hop_length`: a random part of the clip that leaves a window's margin on both sides.
    """
    factor_draw, start_draw = torch.rand(2, generator=generator).tolist()
    needed = frames * config.hop_length
    factor = min(most ** (2 * factor_draw - 1), len(waveform) / (needed + 1))
    taken = min(len(waveform), math.ceil((needed + 8 * config.hop_length) * factor))
    start = int(start_draw * (len(waveform) - taken + 1))
    part = waveform[start : start + taken].numpy()
    changed = torch.from_numpy(soxr.resample(part, config.sampling_rate * factor, config.sampling_rate))
    # Rounding of the rates may cost the last sample.
    return nn.functional.pad(changed, (0, max(0, needed - len(changed))))


def vocoder_segments(
    waveforms: Sequence[torch.Tensor],
    frames: Sequence[int],
    config: BaichuanAudioVocoderConfig | None = None,
    mels: Sequence[torch.Tensor | None] | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    A random segment of every clip to train on: frames of the whole clip's log-mel, so that edges see real sound, and their samples.

    Args:
        waveforms (`(samples,)`, float, each): at the config's sampling rate, on the CPU.
        frames: longest segment of each, in mel frames of 50 Hz; a shorter clip is taken whole.
        config (*optional*): the released vocoder's by default.
        mels (`(n, num_mel_bins)` or None, each; *optional*): stands for the clip's own log-mel, whose first n frames it has.
        device (*optional*): where mels are computed and segments go; the CPU by default.
        generator (`torch.Generator`, *optional*): draws the starts; torch's global one by default.

    Returns:
        mel (`(batch, longest, num_mel_bins)`) and waveform (`(batch, longest * hop_length)`), float32, zero past a segment's end, and
        the frame of its clip that each begins with.

    Raises:
        ValueError: not a waveform, or no frames asked for.
    """
    config = config or BaichuanAudioVocoderConfig()
    hop, n_fft = config.hop_length, 4 * config.hop_length
    margin, starts, counts, pieces = (n_fft - hop) // 2, [], [], []
    given = mels if mels is not None else [None] * len(waveforms)
    for waveform, longest, mel in zip(waveforms, frames, given):
        if waveform.dim() != 1 or not waveform.is_floating_point() or len(waveform) <= margin or longest < 1:
            raise ValueError(
                f"Need float waveforms of shape (samples,), more than {margin} of them, and at least one frame, "
                f"got {waveform.dtype} of shape {tuple(waveform.shape)} and {longest} frames."
            )
        available = len(waveform) // hop if mel is None else len(mel)
        counts.append(min(longest, available))
        starts.append(int(torch.randint(available - counts[-1] + 1, (), generator=generator)))
        around = nn.functional.pad(waveform.float()[None], (margin, margin), mode="reflect")[0]
        pieces.append(around[starts[-1] * hop : (starts[-1] + counts[-1]) * hop + 2 * margin])
    wide = nn.utils.rnn.pad_sequence(pieces, batch_first=True).to(device)
    mel = vocoder_log_mel(wide, config.sampling_rate, hop, n_fft, config.num_mel_bins, reflect=False)
    valid = length_mask(torch.tensor(counts, device=mel.device), mel.shape[1])
    mel = mel * valid[..., None]
    for row, (own, start, count) in enumerate(zip(given, starts, counts)):
        if own is not None:
            mel[row, :count] = own[start : start + count].to(mel)
    samples = wide[:, margin : wide.shape[1] - margin]
    return mel, samples * valid.repeat_interleave(hop, 1), starts
