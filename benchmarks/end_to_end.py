"""Does a reply keep ahead of its own playback, from the prompt to the last sample?

    python benchmarks/end_to_end.py --checkpoint miniature

Speaks a text, as a whole and as a stream by both policies, for every batch size that is asked for; prints the real-time factor of the
batch (seconds of work for a second of sound, below 1 is ahead of playback), where the time went, and the least that the reply could
cost: the bytes of weights that its tokens and frames need, at this machine's reading speed, and the operations of what turns frames
into sound, at its speed of a matrix product. `--arithmetic` counts without running the model.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.replies import least_reply, measure_replies, run, speeds, with_limits  # noqa: E402


PARTS = ("prefill", "language", "audio_head", "flow", "vocoder", "waveform")


def measure(model, batch_sizes: tuple[int, ...] = (1, 4), frames: int = 60, pieces: int = 2, repeats: int = 3) -> dict:
    """
    Args:
        batch_sizes: rows that speak at once. frames, pieces: each row speaks so many pieces of at most so many frames.
        repeats: runs of every way, in turns; the medians are kept.

    Returns:
        By batch size and way: `real_time_factor`, `seconds`, `limit_seconds`, `over_limit`, what the limit counts, and the seconds
        of each part: `waveform` is what is left to do for sound when the LLM has ended; `flow` and `vocoder` run beside the LLM in
        streams.
    """
    measured, machine, result = measure_replies(model, batch_sizes, frames, pieces, repeats), speeds(model), {}
    for rows, ways in measured.items():
        result[rows] = {}
        for way, figures in ways.items():
            least = least_reply(model, int(rows), round(figures["frames"]), pieces)
            seconds = figures["real_time_factor"] * figures["audio_seconds"] * int(rows)
            parts = {f"{part}_seconds": figures[f"{part}_seconds"] for part in PARTS if f"{part}_seconds" in figures}
            factor = {"real_time_factor": figures["real_time_factor"], "audio_seconds": figures["audio_seconds"]}
            result[rows][way] = factor | with_limits(seconds, least, machine) | parts
    return result | {"machine": machine}


def count(model, frames: int, pieces: int) -> dict:
    """What the limit counts, for one row."""
    least = least_reply(model, 1, frames * pieces, pieces)
    print(f"{least['frames']} frames: {least['bytes'] / 1e9:.4g} GB, {least['flops'] / 1e12:.3g} TFLOP")
    return least


def show(figures: dict) -> None:
    print(f"real-time factor {figures['real_time_factor']:.3f}, ", end="")
    print(f"{figures['seconds']:.2f} s, limit {figures['limit_seconds']:.2f} s, {figures['over_limit']:.2f} x of it")
    parts = (f"{part} {figures[f'{part}_seconds']:.2f}" for part in PARTS if f"{part}_seconds" in figures)
    print(f"    seconds: {', '.join(parts)}")


if __name__ == "__main__":
    run(__doc__.splitlines()[0], count, measure, show)
