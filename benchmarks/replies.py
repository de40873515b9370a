"""Spoken replies that are timed, and the least that they could cost."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.limits import multiply_speed, read_speed, sound_flops, weight_bytes
from benchmarks.models import make_model
from benchmarks.reporting import add_model_options, print_environment, write_figures
from modeling_baichuan_audio.streaming_baichuan_audio import FIRST_CHUNKS
from modeling_baichuan_audio.streaming_vocoder import vocoder_delay


WAYS = ("at once", "exact", "low_latency")
_PROMPT = 8  # tokens


def run(description: str, count: Callable, measure: Callable, show: Callable) -> None:
    """
    A script about replies, from its options to its figures.

    Args:
        count: (model on `meta`, frames of a piece, pieces) -> figures, printed.
        measure: (model, batch sizes, frames of a piece, pieces, repeats) -> figures by batch size and way.
        show: prints the figures of one way.
    """
    parser = argparse.ArgumentParser(description=description)
    add_model_options(parser, dtypes=True, arithmetic=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="rows that speak at once")
    parser.add_argument("--frames", type=int, default=60, help="of a piece, at most (80 ms each)")
    parser.add_argument("--pieces", type=int, default=2, help="that every row speaks")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    environment, dtype = print_environment(options), getattr(torch, options.dtype)
    if options.arithmetic:
        result = count(make_model(options.size, dtype=dtype, device="meta"), options.frames, options.pieces)
    else:
        model = make_model(options.size, options.checkpoint, dtype, options.device)
        result = measure(model, tuple(options.batch_sizes), options.frames, options.pieces, options.repeats)
        for rows in map(str, options.batch_sizes):
            for way, figures in result[rows].items():
                print(f"batch {rows}, {way:11} ", end="")
                show(figures)
    write_figures(options.json, environment | result)


def speak(model, rows: int, frames: int, pieces: int, way: str) -> list[dict]:
    """Timings of every row of a batch that speaks `pieces` pieces of at most `frames` frames, and how many frames it had."""
    scripts = [[[5]] + [[6]] * (pieces - 1) for _ in range(rows)]
    prompt = torch.full((rows, _PROMPT), 7, device=model.device)
    options = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "forced_text_ids": scripts,
        "max_audio_frames": frames,
        "max_new_tokens": pieces * (frames + 4),
        "seed": list(range(rows)),
    }
    started = time.perf_counter()
    if way == "at once":
        reply = model.generate(**options, generation_mode="audio")
        seconds = time.perf_counter() - started
        timings = []
        for timing, waveform in zip(reply.timings, reply.audio):
            audio = len(waveform) / model.config.sampling_rate
            timings.append(timing | {"first_sound_seconds": seconds, "audio_seconds": audio, "real_time_factor": seconds / audio})
    else:
        with model.stream(**options, latency=way) as stream:
            for _ in stream:
                pass
        reply = stream.output
        timings = reply.timings
    spoken = [[part["audio_codes"].shape[1] for part in row if part["type"] == "audio"] for row in reply.segments]
    return [timing | {"frames": sum(counts), "first_piece": counts[0]} for timing, counts in zip(timings, spoken)]


def measure_replies(model, batch_sizes: tuple[int, ...], frames: int, pieces: int, repeats: int) -> dict[str, dict[str, dict]]:
    """Medians over the rows and over `repeats` runs, the ways in turns, by batch size and way; `real_time_factor` is the batch's."""
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
    names = sorted(name for name, value in runs[0][0].items() if value is not None)
    summary = {name: statistics.median(row[name] for timings in runs for row in timings) for name in names}
    batches = [
        max(row["real_time_factor"] * row["audio_seconds"] for row in rows) / sum(row["audio_seconds"] for row in rows)
        for rows in runs
    ]
    return summary | {"real_time_factor": statistics.median(batches)}


def mel_before_sound(config, way: str) -> int:
    """Mel frames that flow matching has solved when a piece's first sound comes out: attention chunks until the vocoder has enough."""
    usual = config.flow_matching_config.attention_chunk_size
    chunks = [size for size in FIRST_CHUNKS if size < usual] if way == "low_latency" else []
    delay, solved = -(-vocoder_delay(config.vocoder_config) // config.vocoder_config.hop_length), 0
    while solved <= delay:
        solved += chunks.pop(0) if chunks else usual
    return solved


def least_before_sound(model, way: str, rows: int, first_piece: int) -> dict[str, int]:
    """
    What a stream cannot do without before its first sound: `frames` of codes, `bytes` of weights, `flops`.

    The LLM's weights are read for the prompt, for the piece's token of text and the switch to audio, and for every frame; the text head
    only where text is written. All rows read them together; what turns frames into sound is done for each.

    Args:
        way: "exact" or "low_latency". first_piece: frames of the first piece.
    """
    config, read = model.config, weight_bytes(model)
    usual = config.flow_matching_config.attention_chunk_size
    solved = min(mel_before_sound(config, way), 4 * first_piece - 1)
    # Only the whole piece is normed exactly; otherwise the first frames will do. F frames of codes give 4 F - 1 of mel.
    needed = first_piece if way == "exact" else min(first_piece, -(-(solved + 1) // 4))
    delay = vocoder_delay(config.vocoder_config) // config.vocoder_config.hop_length
    chunks = [*FIRST_CHUNKS, usual] if way == "low_latency" else [usual]
    flops = sound_flops(model, needed, solved, max(1, solved - delay), chunks)
    least = 3 * read["llm"] + 2 * read["lm_head"] + needed * (read["llm"] + read["head"])
    return {"frames": needed, "bytes": least, "flops": rows * flops}


def least_reply(model, rows: int, frames: int, pieces: int) -> dict[str, int]:
    """The same for a whole reply of `frames` frames in `pieces` pieces, heard to its end."""
    read, usual = weight_bytes(model), model.config.flow_matching_config.attention_chunk_size
    each = frames // pieces
    flops = pieces * sound_flops(model, each, 4 * each - 1, 4 * each - 1, [usual])
    least = (1 + 2 * pieces) * read["llm"] + 2 * pieces * read["lm_head"] + frames * (read["llm"] + read["head"])
    return {"frames": frames, "bytes": least, "flops": rows * flops}


def speeds(model) -> dict[str, float]:
    """What this machine reads and multiplies in a second, in the model's dtype."""
    read = weight_bytes(model)
    device = model.device.type
    return {
        "bytes_per_second": read_speed(device, min(0.5, (read["llm"] + read["head"]) / 1e9)),
        "flops_per_second": multiply_speed(device, model.dtype),
    }


def with_limits(seconds: float, least: dict[str, int], machine: dict[str, float]) -> dict[str, float]:
    """
    The limit in seconds and the multiple of it that was measured. Reading and multiplying count one after the other, as they are where
    both use the same cores; they could overlap, and then the limit would be the larger of the two.
    """
    reading, multiplying = least["bytes"] / machine["bytes_per_second"], least["flops"] / machine["flops_per_second"]
    limit = reading + multiplying
    return {"seconds": seconds, "limit_seconds": limit, "over_limit": seconds / limit, "reading_share": reading / limit} | least
