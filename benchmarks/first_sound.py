"""When is a reply first heard, and does it keep ahead of its own playback?

    python benchmarks/first_sound.py --checkpoint miniature

Speaks a text, once as a whole and then as a stream by both policies, for every batch size that is asked for; prints the seconds to the
first sound, and the real-time factor (seconds of work for a second of sound, below 1 is ahead of playback) with its parts. Without a
checkpoint the model is tiny and random.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import hardware, versions, write_figures  # noqa: E402
from modeling_baichuan_audio import BaichuanAudioForCausalLM  # noqa: E402
from modeling_baichuan_audio.conversion import find_checkpoint, tiny_model  # noqa: E402


WAYS = ("at once", "exact", "low_latency")


def speak(model, rows: int, frames: int, pieces: int, way: str) -> list[dict]:
    """Timings of every row of a batch that speaks `pieces` pieces of at most `frames` frames, and when its first sound was there."""
    scripts = [[[5]] + [[6]] * (pieces - 1) for _ in range(rows)]
    options = {
        "input_ids": torch.full((rows, 8), 7, device=model.device),
        "forced_text_ids": scripts,
        "max_audio_frames": frames,
        "max_new_tokens": pieces * (frames + 4),
        "seed": list(range(rows)),
    }
    started = time.perf_counter()
    if way == "at once":
        reply = model.generate(**options, generation_mode="audio")
        seconds = time.perf_counter() - started
        lengths = [len(wave) / model.config.sampling_rate for wave in reply.audio]
        return [
            timing | {"first_sound_seconds": seconds, "audio_seconds": length, "real_time_factor": seconds / length}
            for timing, length in zip(reply.timings, lengths)
        ]
    with model.stream(**options, latency=way) as stream:
        for _ in stream:
            pass
    return stream.output.timings


def measure(
    checkpoint: str | None = None, batch_sizes: tuple[int, ...] = (1, 4), frames: int = 60, pieces: int = 2, repeats: int = 3
) -> dict:
    """
    Medians over the rows and over `repeats` runs, the ways in turns.

    Returns:
        By batch size and way: `first_sound_seconds`, `real_time_factor` of the whole batch's sound, and the seconds of each part.
    """
    if checkpoint is None:
        model = tiny_model()
    else:
        model = BaichuanAudioForCausalLM.from_pretrained(find_checkpoint(checkpoint)).eval()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = {}
    for rows in batch_sizes:
        runs = {way: [] for way in WAYS}
        for repeat in range(repeats + 1):
            for way in WAYS:
                timings = speak(model, rows, frames, pieces, way)
                if repeat:  # the first one warms up
                    runs[way].append(timings)
        result[str(rows)] = {way: _summary(timings) for way, timings in runs.items()}
    return result


def _summary(runs: list[list[dict]]) -> dict[str, float]:
    names = {name for timings in runs for name in timings[0] if name.endswith("_seconds")}
    summary = {name: statistics.median(row[name] for timings in runs for row in timings) for name in sorted(names)}
    batches = [
        max(row["real_time_factor"] * row["audio_seconds"] for row in rows) / sum(row["audio_seconds"] for row in rows)
        for rows in runs
    ]
    summary["real_time_factor"] = statistics.median(batches)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help='folder, Hub id, "miniature" or "untrained"; a tiny random model by default')
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--frames", type=int, default=60, help="of a piece, at most (80 ms each)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"hardware  {hardware('cuda' if torch.cuda.is_available() else 'cpu')}")
    print(f"versions  {versions()}")
    result = measure(options.checkpoint, tuple(options.batch_sizes), options.frames, repeats=options.repeats)
    for rows, ways in result.items():
        for way, figures in ways.items():
            print(f"batch {rows}, {way:11} first sound {figures['first_sound_seconds']:7.3f} s, ", end="")
            print(f"real-time factor {figures['real_time_factor']:.3f}")
    write_figures(options.json, result)


if __name__ == "__main__":
    main()
