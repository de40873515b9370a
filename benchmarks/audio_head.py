"""What does the audio head cost alone, for one frame?

    python benchmarks/audio_head.py --size mid

One run compares, in turns, and prints medians:

- before: all eight positions computed anew for each codebook, as a head without a cache does it;
- head: each position once, reading its own weights (`sample_frame`);
- with `--compile`, the same in one graph.

The limit beside it: the bytes that must be read, over the speed at which this machine reads memory, measured in the same run.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import CompileConfig


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limits import medians_in_turns, read_speed, weight_bytes  # noqa: E402
from benchmarks.models import make_model  # noqa: E402
from benchmarks.reporting import add_model_options, model_name, print_environment, print_step, write_figures  # noqa: E402
from modeling_baichuan_audio.generation_sampling import (  # noqa: E402
    SamplingColumns,
    SamplingSettings,
    choose_tokens,
    compiled,
    sample_frame,
)


SETTINGS = SamplingSettings(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3)


class HeadInputs:
    """What the head is given for a frame: random states, no codes seen yet, one random number for each draw."""

    def __init__(self, model, rows: int):
        self.head, self.tables = model.audio_head, model.model.audio_embed_layers
        generator = torch.Generator().manual_seed(1)
        width, sizes = model.config.text_config.hidden_size, [table.num_embeddings for table in self.tables]
        self.hidden = torch.randn(rows, width, generator=generator).to(model.device, model.dtype)
        self.seen = torch.zeros(rows, sum(sizes), dtype=torch.bool, device=model.device)
        self.uniforms = torch.rand(rows, len(sizes), generator=generator).to(model.device)
        self.columns = SamplingColumns.of([SETTINGS] * rows, model.device)

    def sample(self, hidden=None, run=sample_frame) -> torch.Tensor:
        """(rows, codebooks) int64."""
        hidden = self.hidden if hidden is None else hidden
        return run(self.head, self.tables, hidden, self.seen, self.columns, self.uniforms, True)

    @torch.no_grad()
    def sample_recomputing(self, hidden=None) -> torch.Tensor:
        """The same codes, all positions computed anew for every one of them."""
        hidden, codes = self.hidden if hidden is None else hidden, []
        embedded = hidden.new_zeros(len(hidden), len(self.tables) - 1, hidden.shape[1])
        seen = self.seen.split([table.num_embeddings for table in self.tables], dim=1)
        for codebook in range(len(self.tables)):
            logits = self.head(hidden, embedded)[codebook]
            logits = logits if codebook == 0 else logits[:, :-1]
            allowed = seen[codebook][:, : logits.shape[1]]
            codes.append(choose_tokens(logits, self.columns, allowed, self.uniforms[:, codebook], True))
            if codebook < len(self.tables) - 1:
                embedded[:, codebook] = self.tables[codebook](codes[-1])
        return torch.stack(codes, dim=1)


@torch.no_grad()
def measure(model, rows: int = 1, repeats: int = 5, compile_steps: bool = False) -> dict:
    """
    Args:
        rows: of the batch. repeats: of every way, of which the median counts.

    Returns:
        Seconds of each way (`before`, `head`, `head_compiled`), how often faster the best is than before, the bytes to read, the
        limit in seconds and the best's multiple of it, and whether all chose the same codes.
    """
    inputs, device = HeadInputs(model, rows), model.device.type
    ways = {"before": inputs.sample_recomputing, "head": inputs.sample}
    if compile_steps:
        graph = compiled(sample_frame, CompileConfig(fullgraph=True))
        ways["head_compiled"] = lambda: inputs.sample(run=graph)
    codes = [way() for way in ways.values()]  # caches warm, graphs made
    seconds = {name: taken["wall"] for name, taken in medians_in_turns(ways, repeats, device).items()}
    best = min(value for name, value in seconds.items() if name != "before")
    read = weight_bytes(model)
    speed = read_speed(device, min(0.5, read["head"] / 1e9))
    return {
        "rows": rows,
        "seconds": seconds,
        "times_faster": seconds["before"] / best,
        "bytes": {name: read[name] for name in ("head", "head_recomputed")},
        "bytes_per_second": speed,
        "limit_seconds": read["head"] / speed,
        "over_limit": best * speed / read["head"],
        "same_codes": all(torch.equal(codes[0], others) for others in codes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser, dtypes=True, arithmetic=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    options = parser.parse_args()
    environment = print_environment(options)
    if options.arithmetic:
        read = weight_bytes(make_model(options.size, dtype=getattr(torch, options.dtype), device="meta"))
        result = {"bytes": {name: read[name] for name in ("head", "head_recomputed")}}
    else:
        model = make_model(options.size, options.checkpoint, getattr(torch, options.dtype), options.device)
        result = measure(model, options.rows, options.repeats, options.compile)
    read = result["bytes"]
    print(f"{model_name(options)}, {options.dtype}: the head reads {read['head'] / 1e9:.4g} GB for a frame ", end="")
    print(f"(recomputed {read['head_recomputed'] / 1e9:.4g})")
    if not options.arithmetic:
        print_step(result)
        print(f"  same codes: {result['same_codes']}")
    write_figures(options.json, environment | result)


if __name__ == "__main__":
    main()
