"""The log-mel that flow matching is trained towards and the vocoder reads."""

from functools import lru_cache

import torch
from transformers.audio_utils import mel_filter_bank


@lru_cache
@torch.inference_mode(False)  # or a first use in inference mode would make them unfit for training
def slaney_filters(n_fft: int, num_mel_bins: int, sampling_rate: int, max_frequency: float | None = None) -> torch.Tensor:
    """(n_fft / 2 + 1, num_mel_bins) float32 on the CPU, not to be written to: Slaney's mel from 0 Hz, by default to half the rate."""
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2 if max_frequency is None else max_frequency,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


def vocoder_log_mel(
    waveform: torch.Tensor,
    sampling_rate: int = 24000,
    hop_length: int = 480,
    n_fft: int = 1920,
    num_mel_bins: int = 80,
    max_frequency: float = 8000.0,
    reflect: bool = True,
) -> torch.Tensor:
    """
    Natural-log mel of magnitudes, frames centred by reflection.

    Args:
        waveform (`(batch, samples)`, float32): at `sampling_rate`, longer than half a window.
        reflect (`bool`): False for a part of a longer clip, given with the `(n_fft - hop_length) // 2` samples on both sides of it that
            reflection stands in for: frames are those of the whole clip, and there are as many fewer.

    Returns:
        `(batch, samples // hop_length, num_mel_bins)` float32.

    Raises:
        ValueError: not a batch of waveforms, or too short for a frame.
    """
    padding = (n_fft - hop_length) // 2
    shortest = padding + 1 if reflect else n_fft
    if waveform.dim() != 2 or waveform.shape[1] < shortest:
        raise ValueError(f"`waveform` must be (batch, samples) with at least {shortest} samples, got {tuple(waveform.shape)}.")
    padded = waveform.float()
    if reflect:
        padded = torch.nn.functional.pad(padded[:, None], (padding, padding), mode="reflect")[:, 0]
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(padded, n_fft, hop_length, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    filters = slaney_filters(n_fft, num_mel_bins, sampling_rate, max_frequency)
    mel = filters.to(waveform.device).T @ magnitude
    return mel.clamp(min=1e-5).log().transpose(1, 2)
