"""Discriminators for adversarial training of the vocoder, with least-squares losses (arXiv 1611.04076) and feature matching.

Multi-period (HiFi-GAN, arXiv 2010.05646, section 2.3) and multi-resolution spectrogram (UnivNet, arXiv 2106.07889, section 2.2)
discriminators. All take waveforms without padding and return, per sub-discriminator, its feature maps with the scores last.
"""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ..vocoder_loss import STFT_RESOLUTIONS, stft_magnitude


FeatureMaps = list[torch.Tensor]


class ConvDiscriminator(nn.Module):
    """Weight-normed 2-d convolutions with leaky ReLUs between them; the last one scores.

    Args:
        layers: (out_channels, kernel, stride) of each convolution; odd kernels, padded by half.
        slope: of the leaky ReLU.
    """

    def __init__(self, layers: list[tuple[int, tuple[int, int], tuple[int, int]]], slope: float):
        super().__init__()
        self.slope = slope
        widths = [1, *(width for width, _, _ in layers)]
        self.convs = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(before, width, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2)))
                for before, (width, kernel, stride) in zip(widths, layers)
            ]
        )

    def forward(self, picture: torch.Tensor) -> FeatureMaps:
        """(batch, 1, height, width) -> the output of every layer, (batch, channels, height', width') each, scores last."""
        features = []
        for conv in self.convs[:-1]:
            picture = nn.functional.leaky_relu(conv(picture), self.slope)
            features.append(picture)
        return [*features, self.convs[-1](picture)]


class PeriodDiscriminator(nn.Module):
    """Sees the waveform folded to rows of one period; convolutions run down the columns, samples one period apart."""

    def __init__(self, period: int, width: int):
        super().__init__()
        self.period = period
        layers = [(width * factor, (5, 1), (3, 1)) for factor in (1, 4, 16, 32)]
        self.net = ConvDiscriminator([*layers, (32 * width, (5, 1), (1, 1)), (1, (3, 1), (1, 1))], slope=0.1)

    def forward(self, waveform: torch.Tensor) -> FeatureMaps:
        padded = nn.functional.pad(waveform[:, None], (0, -waveform.shape[1] % self.period), mode="reflect")
        return self.net(padded.unflatten(-1, (-1, self.period)))


class SpectrogramDiscriminator(nn.Module):
    """Sees the magnitude spectrogram of one STFT resolution; strides run along time."""

    def __init__(self, resolution: tuple[int, int, int], width: int):
        super().__init__()
        self.resolution = resolution
        layers = [(width, (3, 9), (1, stride)) for stride in (1, 2, 2, 2)]
        self.net = ConvDiscriminator([*layers, (width, (3, 3), (1, 1)), (1, (3, 3), (1, 1))], slope=0.2)

    def forward(self, waveform: torch.Tensor) -> FeatureMaps:
        return self.net(stft_magnitude(waveform, *self.resolution)[:, None])


class VocoderDiscriminators(nn.Module):
    """
    All sub-discriminators.

    Args:
        period_width (defaults to 32): channels of a period discriminator's first layer; the widest has 32 times as many.
        spectrogram_width (defaults to 32): channels of a spectrogram discriminator.
        periods (defaults to HiFi-GAN's): in samples.
    """

    def __init__(self, period_width: int = 32, spectrogram_width: int = 32, periods: tuple[int, ...] = (2, 3, 5, 7, 11)):
        super().__init__()
        if min(period_width, spectrogram_width, *periods) < 1:
            raise ValueError(f"Widths and periods must be positive, got {period_width}, {spectrogram_width} and {list(periods)}.")
        self.period = nn.ModuleList([PeriodDiscriminator(period, period_width) for period in periods])
        self.spectrogram = nn.ModuleList([SpectrogramDiscriminator(size, spectrogram_width) for size in STFT_RESOLUTIONS])

    def forward(self, waveform: torch.Tensor) -> list[FeatureMaps]:
        """(batch, samples), all samples valid and more than 1024 of them -> feature maps of each sub-discriminator."""
        return [discriminator(waveform) for discriminator in [*self.period, *self.spectrogram]]


def _clip_mean(values: torch.Tensor) -> torch.Tensor:
    return values.float().flatten(1).mean(1)


def discriminator_loss(real: list[FeatureMaps], generated: list[FeatureMaps]) -> torch.Tensor:
    """Sum over sub-discriminators of mean (D(real) - 1)^2 + mean D(generated)^2: (batch,) float32, each clip's own."""
    return sum(_clip_mean((ours[-1] - 1).square()) + _clip_mean(theirs[-1].square()) for ours, theirs in zip(real, generated))


def adversarial_loss(generated: list[FeatureMaps]) -> torch.Tensor:
    """Sum over sub-discriminators of mean (D(generated) - 1)^2: (batch,) float32."""
    return sum(_clip_mean((maps[-1] - 1).square()) for maps in generated)


def feature_matching_loss(real: list[FeatureMaps], generated: list[FeatureMaps]) -> torch.Tensor:
    """Sum over sub-discriminators and hidden layers of the mean distance of feature maps: (batch,) float32. `real` gets no gradient."""
    pairs = [pair for ours, theirs in zip(real, generated) for pair in zip(ours[:-1], theirs[:-1])]
    return sum(_clip_mean((ours.detach() - theirs).abs()) for ours, theirs in pairs)
