"""Does a reply keep ahead of its own playback, from the prompt to the last sample?

    python benchmarks/end_to_end.py --checkpoint miniature

Speaks a text, as a whole and as a stream by both policies, for every batch size that is asked for; prints the real-time factor of the
batch (seconds of work for a second of sound, below 1 is ahead of playback), where the time went, and the least that the reply could
cost: the bytes of weights that its tokens and frames need, at this machine's reading speed, and the operations of what turns frames
into sound, at its speed of a matrix product. `--arithmetic` counts without running the model.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import SIZES, make_model  # noqa: E402
from benchmarks.replies import (  # noqa: E402
    add_reply_options,
    least_reply,
    measure_replies,
    reply_options,
    speeds,
    with_limits,
)
from benchmarks.reporting import add_model_options, print_environment, write_figures  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser, SIZES)
    add_reply_options(parser)
    options = parser.parse_args()
    environment = print_environment(options)
    dtype = getattr(torch, options.dtype)
    if options.arithmetic:
        model = make_model(options.size, dtype=dtype, device="meta")
        least = least_reply(model, 1, options.frames * options.pieces, options.pieces)
        print(f"{least['frames']} frames: {least['bytes'] / 1e9:.4g} GB, {least['flops'] / 1e12:.3g} TFLOP")
        write_figures(options.json, environment | least)
        return
    model = make_model(options.size, options.checkpoint, dtype, options.device)
    result = measure(model, **reply_options(options))
    for rows in map(str, options.batch_sizes):
        for way, figures in result[rows].items():
            print(f"batch {rows}, {way:11} real-time factor {figures['real_time_factor']:.3f}, ", end="")
            print(f"{figures['seconds']:.2f} s, limit {figures['limit_seconds']:.2f} s, {figures['over_limit']:.2f} x of it")
            parts = (f"{part} {figures[f'{part}_seconds']:.2f}" for part in PARTS if f"{part}_seconds" in figures)
            print(f"    seconds: {', '.join(parts)}")
    write_figures(options.json, environment | result)


if __name__ == "__main__":
    main()
