"""What does the vocoder cost, a whole clip at once and as a stream?

    python benchmarks/vocoder.py --size released

Both ways run in turns in one process, on the same mel and with the same noise; printed are medians, the ratio of each stream to the
whole clip, and the real-time factor (seconds of work for a second of sound). Wall time is what a caller waits; processor time is what
stays steady on a machine that does other work too, and with one thread on an idle machine the two agree. Beside the times stands the
arithmetic: operations of the convolutions (a multiplication and an addition are two), and what torch counted of each way.
Weights are random and seeded without `--checkpoint`.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limits import counted_flops, medians_in_turns, multiply_speed, vocoder_flops  # noqa: E402
from benchmarks.models import make_vocoder  # noqa: E402
from benchmarks.reporting import add_model_options, print_environment, write_figures  # noqa: E402
from modeling_baichuan_audio import BaichuanAudioVocoder  # noqa: E402
from modeling_baichuan_audio.streaming_vocoder import vocoder_delay  # noqa: E402


def stream(vocoder, mel: torch.Tensor, piece: int, seed: int = 0) -> tuple[torch.Tensor, float]:
    """The waveform, and the longest processor time of a push in seconds."""
    state, sound, longest = vocoder.start_stream([seed]), [], 0.0
    for start in range(0, mel.shape[1], piece):
        started = time.process_time()
        waveform, _, state = vocoder.stream(mel[:, start : start + piece], state, final=start + piece >= mel.shape[1])
        longest = max(longest, time.process_time() - started)
        sound.append(waveform)
    return torch.cat(sound, dim=1), longest


@torch.no_grad()
def measure(vocoder: BaichuanAudioVocoder, seconds: float = 60.0, pieces: tuple[int, ...] = (100,), repeats: int = 3) -> dict:
    """
    All figures of one vocoder.

    Args:
        seconds: of sound.
        pieces: frames of each push, one stream for each.
        repeats: of every way; the medians are kept.
    """
    config, device = vocoder.config, vocoder.device.type
    frames = round(seconds * config.sampling_rate / config.hop_length)
    seconds = frames * config.hop_length / config.sampling_rate
    mel = torch.randn(1, frames, config.num_mel_bins, generator=torch.Generator().manual_seed(0)) - 4
    mel = mel.to(device)
    sound, pushes = {}, {}

    def whole():
        sound["whole"] = vocoder(mel, seed=0).waveform
        pushes.setdefault("whole", []).append(0.0)

    def streamed(name: str, piece: int):
        sound[name], longest = stream(vocoder, mel, piece)
        pushes.setdefault(name, []).append(longest)

    ways = {"whole": whole} | {f"stream {piece}": partial(streamed, f"stream {piece}", piece) for piece in pieces}
    short = mel[:, : min(frames, 2 * max(pieces))]
    runs = {"whole": lambda: vocoder(short, seed=0), "stream": lambda: stream(vocoder, short, pieces[0])}
    # And the first run, which allocates.
    counted = {name: counted_flops(run) / vocoder_flops(config, short.shape[1]) for name, run in runs.items()}
    medians = medians_in_turns(ways, repeats, device)
    flops, speed = vocoder_flops(config, frames), multiply_speed(device)
    for name, figures in medians.items():
        taken = figures.pop("seconds")
        figures |= {"push": statistics.median(pushes[name])}
        figures |= {f"{kind}_ratio": figures[kind] / medians["whole"][kind] for kind in ("wall", "cpu")}
        figures |= {"real_time_factor": taken / seconds, "over_limit": taken * speed / flops}
    return {
        "frames": frames,
        "seconds": seconds,
        "delay_samples": vocoder_delay(config),
        "delay_frames": vocoder.stream_delay,
        "delay_seconds": vocoder_delay(config) / config.sampling_rate,
        "flops": flops,
        "flops_per_second": speed,
        "limit_seconds": flops / speed,
        "counted_to_arithmetic": counted,
        "largest_difference": max(float((waveform - sound["whole"]).abs().max()) for waveform in sound.values()),
        "ways": medians,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pieces", type=int, nargs="+", default=[100], help="frames of each push of a stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vocoder = make_vocoder(arguments.size, arguments.checkpoint).to(arguments.device)
    environment = print_environment(arguments)
    result = environment | measure(vocoder, arguments.seconds, tuple(arguments.pieces), arguments.repeats)
    print(f"clip      {result['seconds']:g} s, {result['frames']} frames, {result['flops'] / 1e9:.1f} GFLOP of convolutions")
    counted = ", ".join(f"{name} {share:.3f} x" for name, share in result["counted_to_arithmetic"].items())
    print(f"counted   {counted} the arithmetic")
    print(f"delay     {result['delay_samples']} samples, {result['delay_seconds']:.3f} s, {result['delay_frames']} mel frames")
    print(f"limit     {result['limit_seconds']:.2f} s at {result['flops_per_second'] / 1e9:.1f} GFLOP/s")
    print(f"largest difference between the ways {result['largest_difference']:.2g}\n")
    print(
        f"{'way':12s} {'wall s':>8s} {'cpu s':>8s} {'cpu ratio':>9s} {'x real time':>11s} {'x limit':>8s} {'longest push s':>14s}"
    )
    for name, row in result["ways"].items():
        rate = f"{row['real_time_factor']:11.3f} {row['over_limit']:8.2f}"
        push = f" {row['push']:14.3f}" if row["push"] else ""
        print(f"{name:12s} {row['wall']:8.2f} {row['cpu']:8.2f} {row['cpu_ratio']:9.3f} {rate}{push}")
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
