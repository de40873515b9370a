"""How fast the model is on this machine, and what machine it is."""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from .clips import TestClip
from .subject import Subject


def machine() -> dict[str, Any]:
    """Processor, cores, threads that torch uses, versions."""
    processor = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        names = [line.split(":", 1)[1].strip() for line in listing.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def first_sound(segments: list[dict[str, Any]], timings: dict[str, float]) -> float | None:
    """
    Seconds until the first piece of a reply's audio is finished, None for a reply without audio. For a reply of one piece that is the
    time of everything; of several pieces, their shares of steps and of frames are taken for their shares of the time.
    """
    steps, frames = 0, [part["audio_codes"].shape[1] for part in segments if part["type"] == "audio"]
    if not frames:
        return None
    for part in segments:
        if part["type"] == "audio":
            steps += part["audio_codes"].shape[1] + 1  # the end of audio is a step too
            break
        steps += len(part["token_ids"]) + 1  # and so is the switch to audio
    decoding = timings["decode_seconds"] * min(1.0, steps / timings["steps"])
    return timings["prefill_seconds"] + decoding + timings["waveform_seconds"] * frames[0] / sum(frames)


def measure_speed(subject: Subject, questions: list[TestClip], clips: list[TestClip], count: int) -> list[dict[str, Any]]:
    """
    Times the model on single clips: spoken replies to questions, and resynthesis and transcription of sentences.

    Args:
        count: clips of each; one more, of each, is not counted.

    Returns:
        Items by their `kind`: `machine`, where it was; `reply` (`seconds`, `audio_seconds`, `first_sound` where there is sound);
        `resynthesis` and `transcription` (`seconds`, `audio_seconds`).
    """
    done = subject.outputs.items("speed")
    if not done:
        items = [
            {"kind": "machine"} | machine(),
            *_replies(subject, questions[: count + 1]),
            *_sentences(subject, clips[: count + 1]),
        ]
        subject.outputs.add("speed", [{"id": str(number)} | item for number, item in enumerate(items)])
        done = subject.outputs.items("speed")
    return list(done.values())


def _replies(subject: Subject, questions: list[TestClip]) -> list[dict[str, Any]]:
    items = []
    for clip in tqdm(questions, desc="speed of replies", unit="clip"):
        reply = subject.reply(subject.ask_aloud([clip]), subject.seeds([clip]))
        timings, frames = reply.timings[0], len(reply.audio[0])
        seconds = sum(value for name, value in timings.items() if name.endswith("_seconds"))
        item = {"kind": "reply", "seconds": seconds, "audio_seconds": frames / subject.model.config.sampling_rate}
        items.append(item | {"first_sound": first_sound(reply.segments[0], timings)})
    return items[1:]


@torch.no_grad()
def _sentences(subject: Subject, clips: list[TestClip]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    model, processor = subject.model, subject.processor
    for clip in tqdm(clips, desc="speed of resynthesis", unit="clip"):
        started = time.perf_counter()
        features = processor.feature_extractor(str(clip.path), return_tensors="pt")
        codes = model.get_audio_codes(features["input_features"], features["input_features_mask"])
        model.decode_audio(codes, seed=0)
        resynthesised = time.perf_counter()
        subject.write(processor.apply_transcription_request(str(clip.path)), transcript=True)
        written = time.perf_counter()
        for kind, seconds in (("resynthesis", resynthesised - started), ("transcription", written - resynthesised)):
            items.append({"kind": kind, "seconds": seconds, "audio_seconds": clip.duration})
    return items[2:]


def measured_on(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine of `measure_speed`, which is another one than this where a run went on elsewhere."""
    found = next(item for item in items if item["kind"] == "machine")
    return {name: value for name, value in found.items() if name not in ("id", "kind")}


def speed_figures(items: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Median and count of `first_sound` in seconds, and of the real-time factor (seconds of work a second of sound) of each kind."""
    figures: dict[str, tuple[float, int]] = {}
    waits = [item["first_sound"] for item in items if item.get("first_sound") is not None]
    if waits:
        figures["first_sound"] = statistics.median(waits), len(waits)
    for kind in ("reply", "resynthesis", "transcription"):
        factors = [
            item["seconds"] / item["audio_seconds"] for item in items if item["kind"] == kind and item["audio_seconds"] > 0
        ]
        if factors:
            figures[kind] = statistics.median(factors), len(factors)
    return figures
