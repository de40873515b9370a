"""The floor: white noise as long and as loud as a recording."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from .clips import TestClip


def noise_like(samples: np.ndarray, key: str) -> np.ndarray:
    """(samples,) float32 -> white noise of the same length and root mean square, a function of `key`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    return (noise * np.sqrt(np.square(samples).mean() / np.square(noise).mean())).astype(np.float32)


def noise_twins(clips: Iterable[TestClip], folder: Path) -> list[TestClip]:
    """
    A clip of noise for each clip: the same text and answer, another recording.

    Args:
        folder: for the WAV files; those that are there are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    twins = []
    for clip in clips:
        path = folder / f"{clip.id}.wav"
        if not path.is_file():
            samples, rate = soundfile.read(clip.path, dtype="float32", always_2d=True)
            part = path.with_suffix(".part")
            soundfile.write(part, noise_like(samples.mean(1), clip.id), rate, subtype="PCM_16", format="WAV")
            part.replace(path)
        twins.append(replace(clip, id=f"noise-{clip.id}", path=path))
    return twins
