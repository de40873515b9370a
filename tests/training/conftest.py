"""Speech to train on: harmonic tones with a moving pitch, and rows that use them."""

import json

import numpy as np
import pytest
import soundfile


RATE = 24000


def spoken(seconds: float, pitch: float) -> np.ndarray:
    """A voice-like sound: overtones of a gliding pitch under a syllable-like envelope."""
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.2 * np.sin(2 * np.pi * 1.5 * time))) / RATE
    sound = sum(np.sin(order * phase) / order for order in range(1, 12))
    return (0.2 * sound * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """Six recordings of different lengths and pitches, 24 kHz."""
    folder = tmp_path_factory.mktemp("recordings")
    for index in range(6):
        soundfile.write(folder / f"{index}.wav", spoken(0.8 + 0.2 * index, 110 + 25 * index), RATE)
    return folder


@pytest.fixture(scope="session")
def train_file(recordings):
    """A JSONL file with rows of several tasks, and one that is broken."""
    rows = []
    for index in range(6):
        audio, text = {"audio": f"{index}.wav"}, {"text": f"number {index}"}
        rows.append({"task": "asr", "segments": [audio, text]})
        rows.append({"task": "tts", "segments": [text, audio]})
    rows.append({"task": "asr", "segments": [{"audio": "nowhere.wav"}, {"text": "lost"}]})
    path = recordings / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
