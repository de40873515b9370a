"""What does one audio frame cost, in the LLM and in the audio head?

    python benchmarks/frame_step.py --size mid

One run compares, in turns, and prints medians:

- head before: all eight positions computed anew for each codebook, as a head without a cache does it;
- head: each position once, reading its own weights (`sample_frame`);
- frame before: the LLM's step with a growing cache, its text head, then the head as before;
- frame: the LLM's step without the text head, then the head as it is;
- with `--compile`, the last two again in one graph each, with a cache of fixed size.

Beside the times stands the limit: the bytes of weights that a frame cannot do without, over the speed at which this machine reads
memory, measured in the same run. `--size released --arithmetic` counts the released geometry's bytes without allocating it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import CompileConfig, DynamicCache, StaticCache


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import hardware, versions, write_figures  # noqa: E402
from modeling_baichuan_audio import BaichuanAudioConfig, BaichuanAudioForCausalLM  # noqa: E402
from modeling_baichuan_audio.conversion import tiny_config  # noqa: E402
from modeling_baichuan_audio.generation_sampling import (  # noqa: E402
    SamplingColumns,
    SamplingSettings,
    choose_tokens,
    compiled,
    language_step,
    sample_frame,
)


RELEASED_CODEBOOKS = [8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024]
# Width, layers, heads, key/value heads, MLP width, vocabulary, layers of the audio head, codebooks.
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 288, 2, [64, 32, 16, 16, 16, 16, 16, 16]),
    "mid": (1024, 12, 8, 2, 5376, 32768, 3, RELEASED_CODEBOOKS),
    "released": (3584, 28, 28, 4, 18944, 152064, 3, RELEASED_CODEBOOKS),
}
SETTINGS = SamplingSettings(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3)


def make_config(size: str) -> BaichuanAudioConfig:
    """The LLM and the audio head of that size; the other parts, which take no part here, are tiny."""
    width, layers, heads, kv_heads, mlp, vocabulary, head_layers, codebooks = SIZES[size]
    settings = tiny_config().to_dict()
    settings["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
    settings["text_config"] = {key: value for key, value in settings["text_config"].items() if key != "layer_types"}
    settings["audio_tokenizer_config"]["codebook_sizes"] = codebooks
    settings["audio_head_config"] = {
        "hidden_size": width,
        "num_hidden_layers": head_layers,
        "num_attention_heads": max(2, width // 128),
        "codebook_sizes": codebooks,
    }
    return BaichuanAudioConfig.from_dict(settings)


def make_model(size: str, dtype: torch.dtype, device: str) -> BaichuanAudioForCausalLM:
    """Random weights, a cheap draw: their values do not matter here, their bytes do."""
    with torch.device(device):
        torch.manual_seed(0)
        model = BaichuanAudioForCausalLM._from_config(make_config(size), dtype=dtype)
    return model.eval()


def weight_bytes(model: BaichuanAudioForCausalLM) -> dict[str, int]:
    """
    Bytes of weights that are read for one frame: the least, and what recomputing every position reads.

    An embedding is one row of its table. The head's attention serves eight positions, each after the one before, so it is read eight
    times; its feed-forward parts and classifiers are read once each, or eight times by who computes all of them every time.
    """

    def size(module):
        return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())

    head, llm = model.audio_head, model.model.language_model
    text = size(model.lm_head)
    # A tied text head is read in full, its other use as an embedding is one row.
    layers = size(llm.layers) + size(llm.norm)
    own = sum(size(layer.mlps) for layer in head.layers) + size(head.heads)
    shared = size(head) - own
    positions = len(head.heads)
    return {
        "llm": layers,
        "lm_head": text,
        "head": own + positions * shared,
        "head_recomputed": positions * (own + shared),
    }


def read_speed(gigabytes: float, device: str) -> float:
    """Bytes a second that a matrix-vector product of that size reads, the pattern of a frame."""
    width = 4096
    rows = max(256, int(gigabytes * 1e9 / 4 / width))
    matrix, vector = torch.ones(rows, width, device=device), torch.ones(width, 1, device=device)
    best = min(timed(lambda: matrix @ vector, device) for _ in range(5))
    return matrix.numel() * 4 / best


def timed(function, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def head_before(model, hidden, seen, columns, uniforms) -> torch.Tensor:
    """Codes (rows, codebooks), all positions computed anew for every one of them."""
    tables, codes = model.model.audio_embed_layers, []
    embedded = hidden.new_zeros(len(hidden), len(tables) - 1, hidden.shape[1])
    seen_codes = seen.split([table.num_embeddings for table in tables], dim=1)
    for codebook in range(len(tables)):
        logits = model.audio_head(hidden, embedded)[codebook]
        logits = logits if codebook == 0 else logits[:, :-1]
        chosen = choose_tokens(logits, columns, seen_codes[codebook][:, : logits.shape[1]], uniforms[:, codebook], True)
        codes.append(chosen)
        if codebook < len(tables) - 1:
            embedded[:, codebook] = tables[codebook](chosen)
    return torch.stack(codes, dim=1)


@torch.no_grad()
def measure(
    size: str = "tiny",
    rows: int = 1,
    context: int = 256,
    frames: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile_steps: bool = False,
) -> dict:
    """
    Args:
        rows: of the batch. context: positions in the cache. frames: repetitions, of which the median counts.

    Returns:
        Seconds of each way (`head_before`, `head`, `frame_before`, `frame`, compiled `head_compiled` and `frame_compiled`), their
        `ratios`, bytes, the machine's reading speed, and whether the two heads chose the same codes.
    """
    model = make_model(size, dtype, device)
    base, head, tables = model.model, model.audio_head, model.model.audio_embed_layers
    width, codebooks = model.config.text_config.hidden_size, len(tables)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).to(device, dtype)
    seen = torch.zeros(rows, sum(table.num_embeddings for table in tables), dtype=torch.bool, device=device)
    uniforms = torch.rand(rows, codebooks, generator=generator).to(device)
    columns = SamplingColumns.of([SETTINGS] * rows, device)
    tokens = torch.full((rows,), model.config.audio_pad_token_id, device=device)
    codes = sample_frame(head, tables, hidden, seen, columns, uniforms, True)
    positions = torch.full((rows,), context, device=device)
    prompt = torch.randn(rows, context, width, generator=generator).to(device, dtype)

    def filled(cache):
        base.language_model(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
        return cache

    growing = filled(DynamicCache(config=model.config.text_config))

    def step(cache, run=language_step):
        return run(base, tokens, codes, None, positions, cache)

    def frame_before():
        states = step(growing)
        model.lm_head(states)
        head_before(model, states, seen, columns, uniforms)
        growing.crop(-1)

    def frame():
        sample_frame(head, tables, step(growing), seen, columns, uniforms, True)
        growing.crop(-1)

    ways = {
        "head_before": lambda: head_before(model, hidden, seen, columns, uniforms),
        "head": lambda: sample_frame(head, tables, hidden, seen, columns, uniforms, True),
        "frame_before": frame_before,
        "frame": frame,
    }
    if compile_steps:
        config = CompileConfig(fullgraph=True)
        head_graph, llm_graph = compiled(sample_frame, config), compiled(language_step, config)
        # The cache fills by one position a frame: room for all of them.
        fixed = filled(StaticCache(config=model.config.text_config, max_cache_len=context + 2 * frames + 8))

        def frame_compiled():
            states = step(fixed, llm_graph)
            head_graph(head, tables, states, seen, columns, uniforms, True)

        ways["head_compiled"] = lambda: head_graph(head, tables, hidden, seen, columns, uniforms, True)
        ways["frame_compiled"] = frame_compiled
    same = torch.equal(ways["head"](), ways["head_before"]())
    for way in ways.values():  # caches warm, graphs made
        way()
        way()
    seconds = {name: [] for name in ways}
    for _ in range(frames):
        for name, way in ways.items():
            seconds[name].append(timed(way, device))
    seconds = {name: statistics.median(values) for name, values in seconds.items()}
    read = weight_bytes(model)
    speed = read_speed(min(0.5, (read["llm"] + read["head"]) / 1e9), device)
    best = min(seconds["frame"], seconds.get("frame_compiled", seconds["frame"]))
    return {
        "size": size,
        "rows": rows,
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "ratios": {
            "head": seconds["head_before"] / min(seconds["head"], seconds.get("head_compiled", seconds["head"])),
            "frame": seconds["frame_before"] / best,
        },
        "bytes": read,
        "bytes_per_second": speed,
        "limit_seconds": (read["llm"] + read["head"]) / speed,
        "over_limit": best * speed / (read["llm"] + read["head"]),
        "same_codes": same,
    }


def arithmetic(size: str, dtype: torch.dtype) -> dict[str, int]:
    """`weight_bytes` of a model that is not there (on the device `meta`)."""
    return weight_bytes(make_model(size, dtype, "meta"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--frames", type=int, default=5, help="repetitions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--arithmetic", action="store_true", help="count bytes only, without allocating the model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"hardware  {hardware(options.device)}")
    print(f"versions  {versions()}")
    if options.arithmetic:
        result = {"size": options.size, "bytes": arithmetic(options.size, dtype)}
    else:
        result = measure(options.size, options.rows, options.context, options.frames, options.device, dtype, options.compile)
    read = result["bytes"]
    print(f"{options.size}, {options.dtype}: GB of weights read for a frame")
    print(f"  LLM {read['llm'] / 1e9:.2f} (with its text head {(read['llm'] + read['lm_head']) / 1e9:.2f}), ", end="")
    print(f"audio head {read['head'] / 1e9:.2f} (recomputed {read['head_recomputed'] / 1e9:.2f})")
    if not options.arithmetic:
        for name, seconds in result["seconds"].items():
            print(f"  {name:15} {1000 * seconds:9.2f} ms")
        print(f"  head {result['ratios']['head']:.2f} x, frame {result['ratios']['frame']:.2f} x as fast as before; ", end="")
        print(f"limit {1000 * result['limit_seconds']:.2f} ms at {result['bytes_per_second'] / 1e9:.1f} GB/s, ", end="")
        print(f"{result['over_limit']:.2f} x of it; same codes: {result['same_codes']}")
    write_figures(options.json, result)


if __name__ == "__main__":
    main()
