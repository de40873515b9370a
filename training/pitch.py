"""Pitch targets for the vocoder: F0 by autocorrelation, as Praat finds it, one value for each mel frame."""

from types import ModuleType

import torch

from .audio_codes import clip_key


PITCH_FLOOR, PITCH_CEILING = 60.0, 500.0  # Hz
# Praat's window spans three periods of the floor.
_WINDOW_SECONDS = 3 / PITCH_FLOOR


def praat() -> ModuleType:
    """
    The module `parselmouth`, which holds Praat; imported only where pitch is asked for.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import parselmouth
    except ImportError as error:
        raise ValueError(
            "Pitch targets need praat-parselmouth, which comes with the `train` extra: pip install 'baichuan-audio[train]'."
        ) from error
    return parselmouth


def pitch_track(waveform: torch.Tensor, sampling_rate: int, hop_length: int, frames: int) -> torch.Tensor:
    """
    F0 by Praat's autocorrelation method (Boersma 1993) between 60 and 500 Hz.

    Frame i is centred at sample i * hop_length + hop_length / 2, as the frames of `vocoder_log_mel` are. Past the clip's ends there is
    silence: a low voice may count as unvoiced in the last 25 ms before them.

    Args:
        waveform (`(samples,)`, float): mono. sampling_rate: in Hz. hop_length: samples per frame. frames: how many from the start.

    Returns:
        `(frames,)` float32 in Hz, 0 where unvoiced, on the CPU.

    Raises:
        ValueError: not a waveform, samples that are not finite, more frames than it has, or Praat is not installed.
    """
    parselmouth = praat()
    if waveform.dim() != 1 or not waveform.is_floating_point() or not 1 <= frames <= len(waveform) // hop_length:
        raise ValueError(
            f"Need a float waveform of shape (samples,) and a number of frames of {hop_length} samples that it has, "
            f"got {waveform.dtype} of shape {tuple(waveform.shape)} and {frames} frames."
        )
    samples = waveform[: frames * hop_length].detach().double().cpu()
    if not bool(samples.isfinite().all()):
        raise ValueError("A waveform for pitch must be finite, got NaN or infinity.")
    # Silence around it, in whole frames, brings the first and the last frame into reach of the window.
    step = hop_length / sampling_rate
    around = int(_WINDOW_SECONDS / step) + 1
    padded = torch.nn.functional.pad(samples, (around * hop_length, around * hop_length))
    sound = parselmouth.Sound(padded.numpy(), sampling_frequency=sampling_rate)
    pitch = sound.to_pitch_ac(time_step=step, pitch_floor=PITCH_FLOOR, pitch_ceiling=PITCH_CEILING)
    values = [pitch.get_value_at_time((around + i + 0.5) * step) for i in range(frames)]
    return torch.tensor(values, dtype=torch.float32).nan_to_num(nan=0.0)


class PitchTracks:
    """
    Pitch of whole clips, kept in memory: training comes back to every clip, and a track is small beside its waveform.

    Args:
        sampling_rate, hop_length: as `pitch_track` takes them.
        most: clips to remember (20 MB at 50 frames a second, 1 s each); what comes after is computed every time.

    Raises:
        ValueError: Praat is not installed.
    """

    def __init__(self, sampling_rate: int, hop_length: int, most: int = 100_000):
        praat()
        self.sampling_rate, self.hop_length, self.most = sampling_rate, hop_length, most
        self._known: dict[bytes, torch.Tensor] = {}

    def __call__(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(samples,)` float -> `(samples // hop_length,)` float32 in Hz, not to be written to; errors as `pitch_track`."""
        key = clip_key(waveform.numpy())
        track = self._known.get(key)
        if track is None:
            track = self.of_new(waveform)
            if len(self._known) < self.most:
                self._known[key] = track
        return track

    def of_new(self, waveform: torch.Tensor) -> torch.Tensor:
        """The same of a clip that will not come back: nothing is remembered."""
        return pitch_track(waveform, self.sampling_rate, self.hop_length, len(waveform) // self.hop_length)
