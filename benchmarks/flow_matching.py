"""What does flow matching cost, solved at once and as a stream?

    python benchmarks/flow_matching.py --size released --compile

One run compares three ways to solve the same clip, in turns, and prints medians:

- reference: two passes of the estimator for each Euler step, with the condition and without, attention over all frames under a mask;
- ours: one pass at twice the batch, attention chunk by chunk over the frames that a chunk sees;
- compiled: the same with torch.compile on every stage.

Then a longer clip, solved at once against streamed in pieces. Beside the times stands the limit: operations of the products (a
multiplication and an addition are two) at the speed of a large matrix product, measured in the same run. Wall time is what a caller
waits; processor time is what stays steady on a machine that does other work too, and with one thread on an idle machine the two agree.
Ratios are of processor time on a CPU, of wall time on a GPU.
Weights are random and seeded without `--checkpoint`.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limits import estimator_flops, medians_in_turns, multiply_speed  # noqa: E402
from benchmarks.models import make_flow  # noqa: E402
from benchmarks.reporting import add_model_options, print_environment, write_figures  # noqa: E402
from modeling_baichuan_audio import BaichuanAudioFlowMatchingDecoder  # noqa: E402
from modeling_baichuan_audio.modeling_flow_solver import integrate  # noqa: E402


@torch.no_grad()
def reference(flow, condition, noise, settings) -> torch.Tensor:
    """Two sequential passes for each step under the dense mask."""
    lengths = torch.tensor([condition.shape[1]], device=condition.device)
    mask = flow.estimator.chunk_mask(lengths, condition.shape[1], flow.estimator.dtype)
    mel, grid = noise, settings.time_grid()
    for start, end in zip(grid, grid[1:]):
        time_now = torch.tensor([start], device=condition.device)
        velocity = (1 + settings.guidance) * flow.estimator(mel, time_now, condition, mask).float()
        velocity = velocity - settings.guidance * flow.estimator(mel, time_now, torch.zeros_like(condition), mask).float()
        mel = mel + (end - start) * velocity
    return mel


@torch.no_grad()
def ours(flow, condition, noise, settings, estimator=None) -> torch.Tensor:
    lengths = torch.tensor([condition.shape[1]] * 2, device=condition.device)
    attention = flow.estimator.visibility(lengths, condition.shape[1], settings.chunk_sizes)
    return integrate(flow.estimator if estimator is None else estimator, noise, condition, settings, attention)


def stream(flow, hidden_states, steps: int, piece: int) -> tuple[torch.Tensor, int]:
    """The mel, and the bytes that the state holds at the end."""
    state, mel = flow.start_stream([0], num_steps=steps), []
    for part in hidden_states.split(piece, dim=1):
        part, _, state = flow.stream(part, state)
        mel.append(part)
    mel.append(flow.stream(hidden_states[:, :0], state, final=True)[0])
    caches = [cache for step in state.steps for stage in step.stages for cache in stage.attention]
    return torch.cat(mel, dim=1), sum(cache.buffer.nbytes for cache in caches)


def measure(
    flow: BaichuanAudioFlowMatchingDecoder,
    seconds: float = 8.0,
    steps: int | None = None,
    repeats: int = 3,
    compiled: bool = False,
    stream_seconds: float = 60.0,
    stream_steps: int = 2,
    stream_repeats: int = 1,
    piece: int = 8,
) -> dict:
    """
    All figures of one model.

    Args:
        seconds, steps, repeats: of the comparison with the reference; the config's steps by default.
        compiled: whether to time the compiled estimator too (compiling it is not timed).
        stream_seconds, stream_steps, stream_repeats: of the stream against the same clip at once; 0 seconds leave it out. Both costs
            are proportional to the steps, and so is the stream's memory.
        piece: frames of each push.
    """
    config, device = flow.config, flow.device
    rate = config.sampling_rate / config.hop_length
    settings = flow.solver_settings(num_steps=steps)
    generator = torch.Generator().manual_seed(0)
    frames = round(seconds * rate)
    condition, noise = torch.randn(2, 1, frames, config.num_mel_bins, generator=generator).unbind()
    condition, noise = condition.to(device, flow.estimator.dtype), noise.to(device)
    ways = {
        "reference": lambda: reference(flow, condition, noise, settings),
        "ours": lambda: ours(flow, condition, noise, settings),
    }
    if compiled:
        # Stage by stage: the middle ones share one graph, and compiling takes a fraction of the time.
        estimator = copy.deepcopy(flow.estimator)
        for stage in (estimator.down_stage, *estimator.mid_stages, estimator.up_stage):
            stage.compile(dynamic=False)
        ways["compiled"] = lambda: ours(flow, condition, noise, settings, estimator)
    # The first run of each allocates and compiles; it shows that all give the same.
    one_step = flow.solver_settings(num_steps=1)
    mels = [reference(flow, condition, noise, one_step), ours(flow, condition, noise, one_step)]
    if compiled:
        mels.append(ours(flow, condition, noise, one_step, estimator))
    result = {
        "frames": frames,
        "steps": settings.num_steps,
        "times": medians_in_turns(ways, repeats, device.type),
        "flops": {
            name: 2 * settings.num_steps * estimator_flops(config, frames, None if name == "reference" else settings.chunk_sizes)
            for name in ways
        },
        "flops_per_second": multiply_speed(device.type, flow.estimator.dtype),
        "largest_difference": max(float((mel - mels[0]).abs().max()) for mel in mels),
    }
    result["over_limit"] = {
        name: taken["seconds"] * result["flops_per_second"] / result["flops"][name] for name, taken in result["times"].items()
    }
    if stream_seconds:
        frames = round(stream_seconds * rate)
        hidden_states = torch.randn(1, frames, config.input_size, generator=generator).to(device)
        made = {}
        ways = {
            "offline": lambda: made.update(offline=flow(hidden_states, seed=0, num_steps=stream_steps).mel),
            "stream": lambda: made.update(stream=stream(flow, hidden_states, stream_steps, piece)),
        }
        with torch.no_grad():
            times = medians_in_turns(ways, stream_repeats, device.type)
        mel, held = made["stream"]
        result["stream"] = {
            "frames": frames,
            "steps": stream_steps,
            "piece": piece,
            "times": times,
            "state_bytes": held,
            "largest_difference": float((mel - made["offline"]).abs().max()),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser, size="released", dtypes=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="Euler steps; the config's by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stream-seconds", type=float, default=60.0, help="0 leaves the stream out")
    parser.add_argument("--stream-steps", type=int, default=2)
    parser.add_argument("--stream-repeats", type=int, default=1)
    parser.add_argument("--piece", type=int, default=8, help="frames of each push of the stream")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    flow = make_flow(arguments.size, arguments.checkpoint, getattr(torch, arguments.dtype)).to(arguments.device)
    environment = print_environment(arguments)
    result = environment | measure(
        flow,
        arguments.seconds,
        arguments.steps,
        arguments.repeats,
        arguments.compile,
        arguments.stream_seconds,
        arguments.stream_steps,
        arguments.stream_repeats,
        arguments.piece,
    )
    times, flops = result["times"], result["flops"]
    print(f"\n{result['frames']} frames at once, {result['steps']} steps; largest difference {result['largest_difference']:.1e}")
    print(f"limit at {result['flops_per_second'] / 1e9:.1f} GFLOP/s")
    print(f"{'':10s} {'wall s':>8s} {'cpu s':>8s} {'ratio':>6s} {'TFLOP':>7s} {'ratio':>6s} {'limit s':>8s} {'x limit':>8s}")
    for name, taken in times.items():
        ratio, work = times["reference"]["seconds"] / taken["seconds"], flops["reference"] / flops[name]
        limit = f"{flops[name] / result['flops_per_second']:8.2f} {result['over_limit'][name]:8.2f}"
        print(f"{name:10s} {taken['wall']:8.2f} {taken['cpu']:8.2f} {ratio:6.2f} {flops[name] / 1e12:7.3f} {work:6.2f} {limit}")
    if "stream" in result:
        part = result["stream"]
        print(f"\n{part['frames']} frames at once and in pieces of {part['piece']}, {part['steps']} steps; ", end="")
        print(f"largest difference {part['largest_difference']:.1e}, state {part['state_bytes'] / 1e6:.0f} MB")
        for name, taken in part["times"].items():
            ratio = taken["seconds"] / part["times"]["offline"]["seconds"]
            print(f"{name:10s} {taken['wall']:8.2f} {taken['cpu']:8.2f} {ratio:6.2f}")
    write_figures(arguments.json, result)


if __name__ == "__main__":
    main()
