"""Spectral losses between a generated and a real waveform: log-mel L1 at one or many scales, multi-resolution STFT (arXiv 1910.11480).

Each is computed on the valid samples of a clip alone, so padding and the other clips of a batch never enter.
"""

from collections.abc import Iterator

import torch

from .configuration_baichuan_audio import BaichuanAudioVocoderConfig
from .mel_spectrogram import slaney_filters, vocoder_log_mel


# n_fft, hop and window in samples at 24 kHz (arXiv 1910.11480, table 1).
STFT_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
# Window in samples at 24 kHz, the hop a quarter of it, and mel bins (arXiv 2306.06546, section 3.4, without its two shortest; the
# longest one tells apart lines 6 Hz from one another, so that lines at multiples of the frame rate are seen).
MEL_SCALES = ((128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320), (4096, 320))


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


def _log_mels(waveform: torch.Tensor, sampling_rate: int) -> Iterator[torch.Tensor]:
    """(batch, samples) -> (batch, mels, frames) float32 at each of `MEL_SCALES`, natural log."""
    for n_fft, bins in MEL_SCALES:
        filters = slaney_filters(n_fft, bins, sampling_rate).to(waveform.device)
        yield (filters.T @ stft_magnitude(waveform, n_fft, n_fft // 4, n_fft)).clamp(min=1e-5).log()


def multi_scale_mel_loss(generated: torch.Tensor, target: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    L1 between log-mels at six window lengths, summed (arXiv 2306.06546, section 3.4). Unlike those of `mel_loss`, the frames do not
    keep step with the mel's: what repeats with every frame is not hidden from it.

    Args:
        generated, target (`(batch, samples)`): without padding. sampling_rate: in Hz.

    Returns:
        `(batch,)` float32.
    """
    pairs = zip(_log_mels(generated, sampling_rate), _log_mels(target, sampling_rate))
    return sum((ours - theirs).abs().mean((1, 2)) for ours, theirs in pairs)


def multi_scale_mel_distance(first: torch.Tensor, second: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    Root mean square over the mels, mean over the frames, of the same log-mels' difference, summed over the window lengths.

    For an energy distance (arXiv 2008.01160): L1 compares each mel by itself, so a loudness that flickers in all of them at once would
    pass for noise; the Euclidean distance of whole frames tells the two apart.

    Args:
        first, second (`(batch, samples)`): without padding; the gradient reaches both. sampling_rate: in Hz.

    Returns:
        `(batch,)` float32.
    """
    pairs = zip(_log_mels(first, sampling_rate), _log_mels(second, sampling_rate))
    return sum(torch.linalg.vector_norm(a - b, dim=1).mean(1) / a.shape[1] ** 0.5 for a, b in pairs)


def check_waveform_labels(labels: torch.Tensor, lengths: torch.Tensor, samples: int, config: BaichuanAudioVocoderConfig) -> None:
    """
    Refuses targets that the losses cannot be computed on.

    Args:
        labels (`(batch, samples)`): target waveforms. lengths (`(batch,)`): valid mel frames.

    Raises:
        ValueError: another shape than the generated waveforms', or a clip too short for the widest window.
    """
    if tuple(labels.shape) != (len(lengths), samples):
        raise ValueError(
            f"`labels` must be waveforms of shape {(len(lengths), samples)}, {config.hop_length} samples per mel frame, "
            f"got {tuple(labels.shape)}."
        )
    # The analyses reflect half a window at the edges.
    hop_length = config.hop_length
    windows = (*STFT_RESOLUTIONS, *(MEL_SCALES if config.multi_scale_mel_loss_weight else ()))
    reach = max(*(n_fft // 2 for n_fft, *_ in windows), 3 * hop_length // 2)
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
) -> dict[str, torch.Tensor]:
    """
    The losses of a batch that the config gives a weight; a clip counts by its share of frames.

    Args:
        waveform, labels (`(batch, samples)`): generated and real, padded to a common length.
        lengths (`(batch,)`): valid mel frames.
        num_items: frames that the sums are divided by, `lengths.sum()` for a mean over this batch.

    Returns:
        `mel_loss`, `stft_loss`, `multi_scale_mel_loss` of those in use, and their weighted sum as `loss`: float32 scalars.
    """
    measures = {
        "mel_loss": lambda ours, theirs: mel_loss(ours, theirs, config),
        "stft_loss": multi_resolution_stft_loss,
        "multi_scale_mel_loss": lambda ours, theirs: multi_scale_mel_loss(ours, theirs, config.sampling_rate),
    }
    weights = {name: getattr(config, f"{name}_weight") for name in measures}
    losses = {name: torch.zeros((), device=waveform.device) for name, weight in weights.items() if weight}
    for frames, rows in rows_by_length(lengths):
        samples = frames * config.hop_length
        ours, theirs = waveform[rows, :samples], labels[rows, :samples].float()
        for name in losses:
            losses[name] = losses[name] + frames * measures[name](ours, theirs).sum() / num_items
    total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=waveform.device))
    return {"loss": total, **losses}
