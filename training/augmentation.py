"""Other rooms and microphones for clean recordings: reverberation, a frequency response, noise, each drawn anew."""

import numpy as np
import soxr
import torch


_PEAK = 0.99


def _convolve(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The first `len(samples)` samples of the convolution."""
    size = 1 << (len(samples) + len(response) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)[: len(samples)]


def _room(samples: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Direct sound, then noise that falls by 60 dB in 0.1 to 0.6 s, 0 to 20 dB below the direct sound in energy."""
    decay = rng.uniform(0.1, 0.6)
    time = np.arange(int(decay * rate)) / rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay)
    tail[: int(rng.uniform(0.001, 0.01) * rate)] = 0.0
    tail *= 10 ** (-rng.uniform(0, 20) / 20) / np.sqrt(np.square(tail).sum())
    tail[0] = 1.0
    return _convolve(samples, tail)


def _microphone(samples: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth response of up to 8 dB either way at eight places of a logarithmic scale, and at times a band that ends early."""
    spectrum = np.fft.rfft(samples)
    frequencies = np.linspace(0, rate / 2, len(spectrum))
    places = np.geomspace(60, rate / 2, 8)
    decibels = np.interp(np.log(frequencies.clip(60)), np.log(places), rng.uniform(-8, 8, len(places)))
    if rng.random() < 0.3:
        highest = rng.uniform(3000, rate / 2)
        decibels -= 24 * np.log2((frequencies / highest).clip(1))
    if rng.random() < 0.3:
        lowest = rng.uniform(80, 300)
        decibels -= 24 * np.log2((lowest / frequencies.clip(10)).clip(1))
    return np.fft.irfft(spectrum * 10 ** (decibels / 20), len(samples))


def _noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise between white and brown, 10 to 50 dB below the clip."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    spectrum /= np.arange(1, len(spectrum) + 1) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(samples))
    power = np.square(samples).mean() / max(np.square(noise).mean(), 1e-20)
    return samples + noise * np.sqrt(power) * 10 ** (-rng.uniform(10, 50) / 20)


def through_a_room(samples: np.ndarray, rate: int, generator: torch.Generator | None = None) -> np.ndarray:
    """
    A clip as another microphone in another room would have recorded it: reverberation and noise half of the time each, and always
    another frequency response; as loud as before.

    Args:
        samples (`(samples,)`, float32): a clip. rate: in Hz.
        generator (*optional*): of the draws; torch's global one by default, which data-loader workers have each their own.

    Returns:
        `(samples,)` float32, of the same length, in step with the clip.
    """
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    heard = samples.astype(np.float64)
    energy = np.square(heard).mean()
    if rng.random() < 0.5:
        heard = _room(heard, rate, rng)
    heard = _microphone(heard, rate, rng)
    if rng.random() < 0.5:
        heard = _noise(heard, rng)
    heard *= np.sqrt(energy / max(np.square(heard).mean(), 1e-20))
    return heard.clip(-_PEAK, _PEAK).astype(np.float32)


def at_another_speed(samples: np.ndarray, rate: int, most: float, generator: torch.Generator | None = None) -> np.ndarray:
    """
    A whole clip played faster or slower, pitch and formants with it (Ko et al., Audio Augmentation for Speech Recognition, 2015).

    Args:
        samples (`(samples,)`, float32): a clip. rate: in Hz.
        most: the factor is drawn between 1 / most and most, evenly on a logarithmic scale.
        generator (*optional*): of the draw, as above.

    Returns:
        `(about samples / factor,)` float32.
    """
    factor = most ** (2 * float(torch.rand((), generator=generator)) - 1)
    return soxr.resample(samples, rate * factor, rate).astype(np.float32)


__all__ = ["at_another_speed", "through_a_room"]
