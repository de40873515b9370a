"""When is a reply first heard?

    python benchmarks/first_sound.py --size mid

Speaks a text, as a whole and then as a stream by both policies, for every batch size that is asked for; prints the seconds to the
first sound beside the least that they could be: the bytes of weights that the prompt, the text and the frames before the sound need,
at this machine's reading speed, and the operations of what turns those frames into sound, at its speed of a matrix product.
`end_to_end.py` asks whether a reply keeps ahead of its own playback. `--arithmetic` counts without running the model.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import SIZES, make_model  # noqa: E402
from benchmarks.replies import (  # noqa: E402
    WAYS,
    add_reply_options,
    least_before_sound,
    measure_replies,
    reply_options,
    speeds,
    with_limits,
)
from benchmarks.reporting import add_model_options, print_environment, write_figures  # noqa: E402


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
            least = least_before_sound(model, way, int(rows), *spoken)
            result[rows][way] = with_limits(figures["first_sound_seconds"], least, machine)
    return result | {"machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser, SIZES)
    add_reply_options(parser)
    options = parser.parse_args()
    environment = print_environment(options)
    dtype = getattr(torch, options.dtype)
    if options.arithmetic:
        model = make_model(options.size, dtype=dtype, device="meta")
        counted = {way: least_before_sound(model, way, 1, options.frames, options.frames * options.pieces) for way in WAYS}
        for way, least in counted.items():
            print(f"{way:11} {least['frames']:4d} frames, {least['bytes'] / 1e9:.4g} GB, {least['flops'] / 1e12:.3g} TFLOP")
        write_figures(options.json, environment | counted)
        return
    model = make_model(options.size, options.checkpoint, dtype, options.device)
    result = measure(model, **reply_options(options))
    for rows in map(str, options.batch_sizes):
        for way, figures in result[rows].items():
            print(f"batch {rows}, {way:11} first sound {figures['seconds']:7.3f} s, ", end="")
            print(f"limit {figures['limit_seconds']:.3f} s, {figures['over_limit']:.2f} x of it")
    write_figures(options.json, environment | result)


if __name__ == "__main__":
    main()
