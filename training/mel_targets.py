"""Log-mel targets of the tokenizer's two mel scales, frame by frame where the mel decoder makes its own."""

from collections.abc import Sequence

import numpy as np
import torch

from ..configuration_baichuan_audio import BaichuanAudioTokenizerConfig
from ..mel_spectrogram import slaney_filters


def target_lengths(num_samples: int, config: BaichuanAudioTokenizerConfig) -> tuple[int, int, int]:
    """
    Lengths that a clip of `num_samples` samples (one chunk) has inside the tokenizer.

    Returns:
        Code frames (12.5 Hz), frames of the coarse mel (100 Hz), frames of the resampled and the refined mel (62.5 Hz).
    """
    features = min(config.max_mel_frames, num_samples // config.hop_length + 1)
    frames = ((features - 1) // config.stride_size + 1) // config.downsample_factor
    coarse = ((frames - 1) * config.downsample_factor + config.decoder_kernel_size) * config.decoder_stride_size
    refined = coarse * config.hop_length * config.refine_sampling_rate // (config.sampling_rate * config.refine_hop_length)
    return frames, coarse, refined


def clip_log_mel(waveform: torch.Tensor, n_fft: int, hop_length: int, frames: int, num_mel_bins: int, sampling_rate: int):
    """
    The first `frames` log-mel frames of one clip, frame i centred on sample `i * hop_length`.

    Power spectrum under a periodic Hann window, slaney mel from 0 Hz to half the sampling rate, log10 floored at 1e-10 and at 8 below
    the largest value of the clip, then (x + 4) / 4: the compression of the input features (Whisper's, arXiv 2212.04356), so
    that input and target are on one scale of about [-1, 1.5]. Reflected at the start, silent past the end.

    Args:
        waveform (`(samples,)`, float32).

    Returns:
        `(frames, num_mel_bins)` float32.
    """
    needed = frames * hop_length + n_fft
    padded = torch.nn.functional.pad(waveform, (0, max(0, needed - len(waveform))))
    spectrum = torch.stft(padded, n_fft, hop_length, window=torch.hann_window(n_fft), center=True, return_complex=True)
    power = spectrum[:, :frames].abs().square()
    mel = (slaney_filters(n_fft, num_mel_bins, sampling_rate).T @ power).clamp(min=1e-10).log10()
    return ((mel.maximum(mel.max() - 8.0) + 4.0) / 4.0).T


def tokenizer_mel_targets(
    waveforms: Sequence[torch.Tensor | np.ndarray], config: BaichuanAudioTokenizerConfig
) -> dict[str, torch.Tensor]:
    """
    Waveforms -> the mel labels of `BaichuanAudioTokenizerModel.forward`.

    Args:
        waveforms: the chunks that the input features were made of, mono, float, at `config.sampling_rate`, each `(samples,)`.

    Returns:
        `coarse_labels` (`(chunks, mel_frames, num_output_mel_bins)`, window `n_fft`, hop `hop_length`: 100 Hz) and `mel_labels` (window
        `refine_n_fft`, hop `refine_hop_length`: 62.5 Hz), float32, zero past the end of a clip.

    Raises:
        ValueError: no waveform, one that is not 1-D, too short for a code frame or longer than a chunk, or a config whose two scales
            have different sampling rates.
    """
    if config.refine_sampling_rate != config.sampling_rate:
        raise ValueError(
            f"Both mel scales are taken from one waveform: `refine_sampling_rate` ({config.refine_sampling_rate}) must be "
            f"`sampling_rate` ({config.sampling_rate})."
        )
    if not len(waveforms):
        raise ValueError("`waveforms` is empty.")
    longest = config.max_audio_seconds * config.sampling_rate
    coarse, refined = [], []
    for waveform in waveforms:
        samples = torch.as_tensor(waveform).float().cpu()
        lengths = target_lengths(len(samples), config) if samples.dim() == 1 else (0, 0, 0)
        if lengths[0] < 1 or len(samples) > longest:
            raise ValueError(
                f"Every waveform must be (samples,) with at least one code frame and at most {longest} samples, "
                f"got {tuple(samples.shape)}."
            )
        bins, rate = config.num_output_mel_bins, config.sampling_rate
        coarse.append(clip_log_mel(samples, config.n_fft, config.hop_length, lengths[1], bins, rate))
        refined.append(clip_log_mel(samples, config.refine_n_fft, config.refine_hop_length, lengths[2], bins, rate))

    def pad(clips):
        return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)

    return {"coarse_labels": pad(coarse), "mel_labels": pad(refined)}


__all__ = ["clip_log_mel", "target_lengths", "tokenizer_mel_targets"]
