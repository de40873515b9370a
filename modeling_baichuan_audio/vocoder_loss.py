"""Spectral losses between a generated and a real waveform: log-mel L1 and multi-resolution STFT (arXiv 1910.11480).

Each is computed on the valid samples of a clip alone, so padding and the other clips of a batch never enter.
"""

import torch

from .configuration_baichuan_audio import BaichuanAudioVocoderConfig
from .mel_spectrogram import vocoder_log_mel


# n_fft, hop and window in samples at 24 kHz (arXiv 1910.11480, table 1).
STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))


def stft_magnitude(waveform: torch.Tensor, n_fft: int, hop_length: int, window_length: int) -> torch.Tensor:
    """(batch, samples) -> (batch, n_fft / 2 + 1, samples // hop_length + 1) float32; a floor on the power keeps gradients finite."""
    window = torch.hann_window(window_length, device=waveform.device)
    spectrum = torch.stft(waveform.float(), n_fft, hop_length, window_length, window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-7).sqrt()


def multi_resolution_stft_loss(generated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Spectral convergence plus L1 of log magnitudes, averaged over three resolutions (arXiv 1910.11480, eq. 4-7).

    Args:
        generated, target (`(batch, samples)`): at 24 kHz, without padding.

    Returns:
        `(batch,)` float32: each clip's own loss.
    """
    total = torch.zeros(len(target), device=target.device)
    for resolution in STFT_RESOLUTIONS:
        ours = stft_magnitude(generated, *resolution)
        with torch.no_grad():
            theirs = stft_magnitude(target, *resolution)
        convergence = (theirs - ours).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        total = total + convergence + (theirs.log() - ours.log()).abs().mean((1, 2))
    return total / len(STFT_RESOLUTIONS)


def mel_loss(generated: torch.Tensor, target: torch.Tensor, config: BaichuanAudioVocoderConfig) -> torch.Tensor:
    """L1 between log-mels. generated, target: (batch, samples) without padding; returns (batch,) float32, the mean of each clip."""
    analysis = {
        "sampling_rate": config.sampling_rate,
        "hop_length": config.hop_length,
        "n_fft": 4 * config.hop_length,  # 1920 at 24 kHz
        "num_mel_bins": config.num_mel_bins,
    }
    with torch.no_grad():
        theirs = vocoder_log_mel(target, **analysis)
    return (vocoder_log_mel(generated, **analysis) - theirs).abs().mean((1, 2))


def check_waveform_labels(labels: torch.Tensor, lengths: torch.Tensor, samples: int, hop_length: int) -> None:
    """
    Refuses targets that the losses cannot be computed on.

    Args:
        labels (`(batch, samples)`): target waveforms. lengths (`(batch,)`): valid mel frames.

    Raises:
        ValueError: another shape than the generated waveforms', or a clip too short for the widest window.
    """
    if tuple(labels.shape) != (len(lengths), samples):
        raise ValueError(
            f"`labels` must be waveforms of shape {(len(lengths), samples)}, {hop_length} samples per mel frame, "
            f"got {tuple(labels.shape)}."
        )
    # Both analyses reflect half a window at the edges.
    reach = max(*(n_fft // 2 for n_fft, _, _ in STFT_RESOLUTIONS), 3 * hop_length // 2)
    shortest = int(lengths.min())
    if shortest * hop_length <= reach:
        raise ValueError(
            f"The vocoder's losses need clips of at least {reach // hop_length + 1} mel frames, got one of {shortest}."
        )


def rows_by_length(lengths: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Rows of a batch grouped by length: (length, int64 row numbers) each, so that padding need not be computed with."""
    return [(length, (lengths == length).nonzero()[:, 0]) for length in lengths.unique().tolist()]


def spectral_losses(
    waveform: torch.Tensor,
    labels: torch.Tensor,
    lengths: torch.Tensor,
    config: BaichuanAudioVocoderConfig,
    num_items: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mel loss and multi-resolution STFT loss of a batch; a clip counts by its share of frames.

    Args:
        waveform, labels (`(batch, samples)`): generated and real, padded to a common length.
        lengths (`(batch,)`): valid mel frames.
        num_items: frames that the sums are divided by, `lengths.sum()` for a mean over this batch.

    Returns:
        Two float32 scalars.
    """
    mel = stft = torch.zeros((), device=waveform.device)
    for frames, rows in rows_by_length(lengths):
        samples = frames * config.hop_length
        ours, theirs = waveform[rows, :samples], labels[rows, :samples].float()
        mel = mel + frames * mel_loss(ours, theirs, config).sum()
        stft = stft + frames * multi_resolution_stft_loss(ours, theirs).sum()
    return mel / num_items, stft / num_items
