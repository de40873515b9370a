"""Training targets of flow matching: the 24 kHz log-mel of a waveform, aligned with the mel decoder's states (50 Hz)."""

import torch

from ..configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig
from ..mel_spectrogram import vocoder_log_mel


# Mel frames (and mel decoder states) per code frame: 50 Hz over 12.5 Hz.
MEL_FRAMES_PER_CODE = 4


def flow_target(waveform: torch.Tensor, frames: int, config: BaichuanAudioFlowMatchingConfig | None = None) -> torch.Tensor:
    """
    The log-mel that flow matching is to produce for a clip of `frames` code frames.

    A longer waveform is cut: the tokenizer drops what does not fill a code frame, and the mel decoder gives one state fewer than four
    per code frame. A waveform up to one code frame shorter is padded with silence.

    Args:
        waveform (`(samples,)`, float): at the config's sampling rate, beginning where the clip begins.
        frames: code frames of the clip (12.5 Hz).
        config (*optional*): mel analysis, the released model's (24 kHz, hop 480, 80 bins) by default.

    Returns:
        `(4 * frames - 1, num_mel_bins)` float32.

    Raises:
        ValueError: not a waveform, no frames, or a waveform shorter than the codes by more than one frame.
    """
    config = config or BaichuanAudioFlowMatchingConfig()
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ValueError(f"`waveform` must be floats of shape (samples,), got {waveform.dtype} of shape {tuple(waveform.shape)}.")
    if frames < 1:
        raise ValueError(f"`frames` must be at least 1, got {frames}.")
    length = MEL_FRAMES_PER_CODE * frames - 1
    missing = length * config.hop_length - len(waveform)
    if missing > MEL_FRAMES_PER_CODE * config.hop_length:
        raise ValueError(
            f"A waveform of {len(waveform)} samples is too short for {frames} code frames, which need {length * config.hop_length}. "
            f"Is its sampling rate {config.sampling_rate} Hz?"
        )
    padded = torch.nn.functional.pad(waveform.float(), (0, max(missing, 0)))
    mel = vocoder_log_mel(
        padded[None],
        sampling_rate=config.sampling_rate,
        hop_length=config.hop_length,
        n_fft=4 * config.hop_length,  # 1920 at 24 kHz
        num_mel_bins=config.num_mel_bins,
    )
    return mel[0, :length]


def flow_targets(
    waveforms: list[torch.Tensor], frames: list[int], config: BaichuanAudioFlowMatchingConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `flow_target` of every clip, padded: `labels` and `lengths` of `BaichuanAudioFlowMatchingDecoder.forward`.

    Returns:
        labels (`(batch, longest, num_mel_bins)`, float32, zero past the end), lengths (`(batch,)`, int64).
    """
    if len(waveforms) != len(frames) or not waveforms:
        raise ValueError(f"One number of code frames per waveform, got {len(frames)} for {len(waveforms)} waveforms.")
    targets = [flow_target(waveform, count, config) for waveform, count in zip(waveforms, frames)]
    lengths = torch.tensor([len(target) for target in targets])
    return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), lengths
