"""The judges' side of the evaluation: recordings in, what outside models make of them out. Runs in the judges' own environment.

    python judge.py FOLDER < jobs.jsonl > results.jsonl

A job is `{"path": ..., "measures": [...]}`; its result, written as soon as it is there, is `{"path": ..., measure: value, ...}`:

| measure | value | model |
|---|---|---|
| `whisper-base`, `whisper-tiny.en` | transcript | Whisper (arXiv 2212.04356), greedy, without timestamps |
| `mos` | 1 to 5 | DistillMOS (arXiv 2502.05356) |
| `speaker` | 256 floats of length 1 | resemblyzer's speaker encoder (arXiv 1710.10467) |

FOLDER holds `models/`, as `judges.fetch_judges` makes it. Nothing of this project is imported here.
"""

import argparse
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in FOLDER: nothing is to be fetched

import numpy as np
import soundfile
import soxr


_RATE = 16000
# Tokens of a transcript, and more for each second: a recogniser that loops on noise is cut off.
_TOKENS, _TOKENS_PER_SECOND, _MOST_TOKENS = 24, 8, 220
_SHORTEST_VOICE = _RATE // 2


def read(path: str) -> np.ndarray:
    """Mono float32 `(samples,)` at 16 kHz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    samples = samples.mean(1)
    return samples if rate == _RATE else soxr.resample(samples, rate, _RATE, quality="HQ").astype(np.float32)


def recogniser(folder: Path, threads: int) -> Callable[[np.ndarray], str]:
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads)
    settings = {"beam_size": 1, "temperature": 0.0, "without_timestamps": True, "condition_on_previous_text": False}

    def transcribe(samples: np.ndarray) -> str:
        tokens = min(_MOST_TOKENS, _TOKENS + int(_TOKENS_PER_SECOND * len(samples) / _RATE))
        # CTranslate2 stops at half of what it is told.
        segments, _ = model.transcribe(samples, language="en", max_new_tokens=2 * tokens, **settings)
        return " ".join(segment.text.strip() for segment in segments)

    return transcribe


def quality(weights: Path, threads: int) -> Callable[[np.ndarray], float]:
    import torch

    # DistillMOS imports torchaudio for its command line only.
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    from distillmos import ConvTransformerSQAModel

    torch.set_num_threads(threads)
    model = ConvTransformerSQAModel(load_weights=False).eval()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])

    @torch.inference_mode()
    def rate(samples: np.ndarray) -> float:
        return float(model(torch.from_numpy(samples)[None]))

    return rate


def speaker(weights: Path, threads: int) -> Callable[[np.ndarray], list[float] | None]:
    import scipy.ndimage
    import torch

    # Where SciPy's function is since SciPy 1.8; resemblyzer 0.1.4 asks for its old place.
    old = types.ModuleType("scipy.ndimage.morphology")
    old.binary_dilation = scipy.ndimage.binary_dilation
    sys.modules.setdefault("scipy.ndimage.morphology", old)
    from resemblyzer import VoiceEncoder, preprocess_wav

    torch.set_num_threads(threads)
    encoder = VoiceEncoder("cpu", verbose=False, weights_fpath=weights)

    def embed(samples: np.ndarray) -> list[float] | None:
        if not samples.any():
            return None
        voiced = preprocess_wav(samples)
        # Of noise, its voice detection leaves nothing.
        embedding = encoder.embed_utterance(voiced if len(voiced) >= _SHORTEST_VOICE else samples)
        return [round(float(value), 6) for value in embedding]

    return embed


def load(measure: str, models: Path, threads: int) -> Callable[[np.ndarray], object]:
    if measure.startswith("whisper-"):
        return recogniser(models / measure, threads)
    return {"mos": quality, "speaker": speaker}[measure](models / f"{measure}.pt", threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    results, sys.stdout = sys.stdout, sys.stderr  # whatever the packages print is no result
    loaded: dict[str, Callable[[np.ndarray], object]] = {}
    for line in sys.stdin:
        job = json.loads(line)
        samples = read(job["path"])
        for measure in job["measures"]:
            if measure not in loaded:
                loaded[measure] = load(measure, options.folder / "models", options.threads)
        values = {measure: loaded[measure](samples) for measure in job["measures"]}
        print(json.dumps({"path": job["path"]} | values), file=results, flush=True)


if __name__ == "__main__":
    main()
