"""When is a reply first heard?

    python benchmarks/first_sound.py --size mid

Speaks a text, as a whole and then as a stream by both policies, for every batch size that is asked for; prints the seconds to the
first sound beside the least that they could be: the bytes of weights that the prompt, the text and the frames before the sound need,
at this machine's reading speed, and the operations of what turns those frames into sound, at its speed of a matrix product.
`end_to_end.py` asks whether a reply keeps ahead of its own playback. `--arithmetic` counts without running the model.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.replies import WAYS, least_before_sound, least_reply, measure_replies, run, speeds, with_limits  # noqa: E402


def least(model, way: str, rows: int, first_piece: int, frames: int, pieces: int) -> dict[str, int]:
    """What the first sound needs; "at once" it waits for the whole reply of `frames` frames."""
    if way == "at once":
        return least_reply(model, rows, frames, pieces)
    return least_before_sound(model, way, rows, first_piece)


def measure(model, batch_sizes: tuple[int, ...] = (1, 4), frames: int = 60, pieces: int = 2, repeats: int = 3) -> dict:
    """
    Args:
        batch_sizes: rows that speak at once. frames, pieces: each row speaks so many pieces of at most so many frames.
        repeats: runs of every way, in turns; the medians are kept.

    Returns:
        By batch size and way: `seconds` to the first sound, `limit_seconds`, `over_limit`, and what the limit counts.
    """
    measured, machine, result = measure_replies(model, batch_sizes, frames, pieces, repeats), speeds(model), {}
    for rows, ways in measured.items():
        result[rows] = {}
        for way, figures in ways.items():
            spoken = round(figures["first_piece"]), round(figures["frames"])
            needed = least(model, way, int(rows), *spoken, pieces)
            result[rows][way] = with_limits(figures["first_sound_seconds"], needed, machine)
    return result | {"machine": machine}


def count(model, frames: int, pieces: int) -> dict:
    """What the limit counts, by way, for one row."""
    counted = {way: least(model, way, 1, frames, frames * pieces, pieces) for way in WAYS}
    for way, needed in counted.items():
        print(f"{way:11} {needed['frames']:4d} frames, {needed['bytes'] / 1e9:.4g} GB, {needed['flops'] / 1e12:.3g} TFLOP")
    return counted


def show(figures: dict) -> None:
    print(f"first sound {figures['seconds']:7.3f} s, limit {figures['limit_seconds']:.3f} s, {figures['over_limit']:.2f} x of it")


if __name__ == "__main__":
    run(__doc__.splitlines()[0], count, measure, show)
