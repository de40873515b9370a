"""Speaks a list of texts with Kokoro or hibari. Runs in the environment that `assets.py` makes, alone: it imports nothing of ours.

    python speak.py ASSETS JOBS OUTPUT --part 0 --parts 2

JOBS holds one JSON object a line: {"path", "text", "engine", "voice", "speed", "pitch", "seed"}. Each becomes a 16-bit mono WAV at
24 kHz; files that exist are left alone, so a stopped run goes on where it was.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
import soxr
from hibari import Hibari


RATE = 24_000
_LOUDNESS = 0.06  # root mean square of what is spoken
_MARGIN = 0.08  # seconds of silence left at each end


class Kokoro:
    """Kokoro-82M: phonemes and a style vector in, 24 kHz out."""

    def __init__(self, assets: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(assets / "kokoro.onnx"), options, providers=["CPUExecutionProvider"])
        self.vocabulary = json.loads((assets / "kokoro-config.json").read_text(encoding="utf-8"))["vocab"]
        self.folder = assets / "voices"
        self.styles: dict[str, np.ndarray] = {}

    def __call__(self, phonemes: str, voice: str, speed: float) -> np.ndarray:
        if voice not in self.styles:
            self.styles[voice] = np.fromfile(self.folder / f"{voice}.bin", dtype="<f4").reshape(-1, 1, 256)
        ids = [self.vocabulary[symbol] for symbol in phonemes if symbol in self.vocabulary][:510]
        inputs = {
            "input_ids": np.array([[0, *ids, 0]], np.int64),
            "style": self.styles[voice][len(ids)],
            "speed": np.array([speed], np.float32),
        }
        return self.session.run(None, inputs)[0].reshape(-1)


def tidy(waveform: np.ndarray) -> np.ndarray:
    """Cuts silence off both ends and brings speech to one loudness."""
    window = RATE // 100
    energy = np.sqrt(np.convolve(np.square(waveform), np.ones(window) / window, mode="same"))
    loud = np.flatnonzero(energy > 0.01 * energy.max())
    start, end = max(0, loud[0] - int(_MARGIN * RATE)), loud[-1] + int(_MARGIN * RATE)
    waveform = waveform[start:end]
    spoken = np.sqrt(np.mean(np.square(waveform[np.abs(waveform) > 0.01 * np.abs(waveform).max()])))
    return np.clip(waveform * (_LOUDNESS / spoken), -0.99, 0.99).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("assets", "jobs", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    kokoro, hibari = None, dict.fromkeys((False, True))
    jobs = [json.loads(line) for line in options.jobs.read_text(encoding="utf-8").splitlines()]
    for job in jobs[options.part :: options.parts]:
        path = options.output / job["path"]
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if hibari[False] is None:
            hibari[False] = Hibari(threads=1)
            hibari[True] = _with_british_phonemes()
        if job["engine"] == "hibari":
            waveform = hibari[False](job["text"], speed=job["speed"] / job["pitch"], seed=job["seed"])
        else:
            kokoro = kokoro or Kokoro(options.assets)
            phonemes = " ".join(hibari[job["voice"].startswith("b")].phonemize(job["text"]))
            waveform = kokoro(phonemes, job["voice"], job["speed"] / job["pitch"])
        if job["pitch"] != 1.0:  # played faster or slower: another pitch, another vocal tract, the tempo asked for
            waveform = soxr.resample(waveform, RATE * job["pitch"], RATE)
        part = path.with_name(f".{path.name}.part")
        soundfile.write(part, tidy(np.asarray(waveform, np.float32)), RATE, subtype="PCM_16", format="WAV")
        os.replace(part, path)


def _with_british_phonemes() -> Hibari:
    from hibari.g2p import G2P

    return Hibari(threads=1, g2p=G2P(british=True))


if __name__ == "__main__":
    main()
