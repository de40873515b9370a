"""What does one audio frame cost, in the LLM and in the audio head?

    python benchmarks/frame_step.py --size mid

One run compares, in turns, and prints medians:

- before: the LLM's step with a growing cache, its text head, then the audio head with all positions computed anew for each codebook;
- frame: the LLM's step without the text head, then each position of the audio head once;
- with `--compile`, the same in one graph each, with a cache of fixed size.

Beside the times stands the limit: the bytes of weights that a frame cannot do without, over the speed at which this machine reads
memory, measured in the same run. `--size released --arithmetic` counts the released geometry's bytes without allocating it.
`audio_head.py` looks at the head alone.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import CompileConfig, DynamicCache, StaticCache


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.audio_head import HeadInputs  # noqa: E402
from benchmarks.limits import medians_in_turns, read_speed, weight_bytes  # noqa: E402
from benchmarks.models import make_model  # noqa: E402
from benchmarks.reporting import add_model_options, model_name, print_environment, print_step, write_figures  # noqa: E402
from modeling_baichuan_audio.generation_sampling import compiled, language_step, sample_frame  # noqa: E402


@torch.no_grad()
def measure(model, rows: int = 1, context: int = 256, frames: int = 5, compile_steps: bool = False) -> dict:
    """
    Args:
        rows: of the batch. context: positions in the cache. frames: repetitions, of which the median counts.

    Returns:
        Seconds of each way (`before`, `frame`, `frame_compiled`), how often faster the best is than before, the bytes to read, the
        machine's reading speed, the limit in seconds and the best's multiple of it.
    """
    base, device, config = model.model, model.device.type, model.config.text_config
    inputs = HeadInputs(model, rows)
    tokens = torch.full((rows,), model.config.audio_pad_token_id, device=device)
    codes, positions = inputs.sample(), torch.full((rows,), context, device=device)
    prompt = torch.randn(rows, context, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(device, model.dtype)

    def filled(cache):
        base.language_model(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
        return cache

    growing = filled(DynamicCache(config=config))

    def step(cache, run=language_step):
        return run(base, tokens, codes, None, positions, cache)

    def before():
        states = step(growing)
        model.lm_head(states)
        inputs.sample_recomputing(states)
        growing.crop(-1)

    def frame():
        inputs.sample(step(growing))
        growing.crop(-1)

    ways = {"before": before, "frame": frame}
    if compile_steps:
        compile_config = CompileConfig(fullgraph=True)
        head_graph, llm_graph = compiled(sample_frame, compile_config), compiled(language_step, compile_config)
        # The cache fills by one position a frame: room for all of them.
        fixed = filled(StaticCache(config=config, max_cache_len=context + frames + 8))
        ways["frame_compiled"] = lambda: inputs.sample(step(fixed, llm_graph), head_graph)
    for way in ways.values():  # caches warm, graphs made
        way()
        way()
    seconds = {name: taken["wall"] for name, taken in medians_in_turns(ways, frames, device).items()}
    best = min(value for name, value in seconds.items() if name != "before")
    read = weight_bytes(model)
    least = read["llm"] + read["head"]
    speed = read_speed(device, min(0.5, least / 1e9))
    return {
        "rows": rows,
        "context": context,
        "seconds": seconds,
        "times_faster": seconds["before"] / best,
        "bytes": read,
        "bytes_per_second": speed,
        "limit_seconds": least / speed,
        "over_limit": best * speed / least,
    }


def arithmetic(size: str, dtype: torch.dtype) -> dict[str, int]:
    """`weight_bytes` of a model that is not there (on the device `meta`)."""
    return weight_bytes(make_model(size, dtype=dtype, device="meta"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser, dtypes=True, arithmetic=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--frames", type=int, default=5, help="repetitions")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    options = parser.parse_args()
    environment, dtype = print_environment(options), getattr(torch, options.dtype)
    if options.arithmetic:
        result = {"bytes": arithmetic(options.size, dtype)}
    else:
        model = make_model(options.size, options.checkpoint, dtype, options.device)
        result = measure(model, options.rows, options.context, options.frames, options.compile)
    read = result["bytes"]
    print(f"{model_name(options)}, {options.dtype}: GB of weights read for a frame")
    print(f"  LLM {read['llm'] / 1e9:.4g} (with its text head {(read['llm'] + read['lm_head']) / 1e9:.4g}), ", end="")
    print(f"audio head {read['head'] / 1e9:.4g} (recomputed {read['head_recomputed'] / 1e9:.4g})")
    if not options.arithmetic:
        print_step(result)
    write_figures(options.json, environment | result)


if __name__ == "__main__":
    main()
