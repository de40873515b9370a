"""The log-mel that flow matching is trained towards and the vocoder reads."""

import torch
from transformers.audio_utils import mel_filter_bank


def vocoder_log_mel(
    waveform: torch.Tensor,
    sampling_rate: int = 24000,
    hop_length: int = 480,
    n_fft: int = 1920,
    num_mel_bins: int = 80,
    max_frequency: float = 8000.0,
) -> torch.Tensor:
    """
    Natural-log mel of magnitudes, frames centred by reflection.

    Args:
        waveform (`(batch, samples)`, float32): at `sampling_rate`, longer than half a window.

    Returns:
        `(batch, samples // hop_length, num_mel_bins)` float32.

    Raises:
        ValueError: not a batch of waveforms, or too short for a frame.
    """
    padding = (n_fft - hop_length) // 2
    if waveform.dim() != 2 or waveform.shape[1] <= padding:
        raise ValueError(f"`waveform` must be (batch, samples) with more than {padding} samples, got {tuple(waveform.shape)}.")
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=max_frequency,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    padded = torch.nn.functional.pad(waveform.float()[:, None], (padding, padding), mode="reflect")[:, 0]
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(padded, n_fft, hop_length, window=window, center=False, return_complex=True)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    mel = torch.from_numpy(filters).float().to(waveform.device).T @ magnitude
    return mel.clamp(min=1e-5).log().transpose(1, 2)
