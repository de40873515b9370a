"""How much memory does converting a checkpoint take, next to its largest shard? Run: python benchmarks/convert_memory.py

Writes a synthetic checkpoint in the original form (the golden test config scaled up, bfloat16, the whole audio head in one shard:
its fused tensors are the hard case), converts it in a process of its own, and compares the peak resident memory over what the
imports take with the largest shard. Exits with 1 if the ratio is above the limit. Linux only (/proc).
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import safetensors
import torch
import transformers


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling_baichuan_audio.conversion import convert_checkpoint  # noqa: E402
from modeling_baichuan_audio.conversion.convert import write_shard  # noqa: E402


LIMIT = 1.3
HEAD_LAYERS = 3
BYTES = 2  # of a bfloat16 element


def head_shapes(width: int, codebook_sizes: list[int]) -> dict[str, list[int]]:
    """The audio head's tensors in the original form: 36 width^2 elements a layer, 32 of them in two fused tensors."""
    shapes = {"audio_head.headnorm.weight": [width]}
    for index in range(HEAD_LAYERS):
        layer = f"audio_head.transformer_layers.{index}"
        shapes |= {
            f"{layer}.self_attention.in_proj_weight": [3 * width, width],
            f"{layer}.self_attention.in_proj_bias": [3 * width],
            f"{layer}.self_attention.out_proj.weight": [width, width],
            f"{layer}.self_attention.out_proj.bias": [width],
            f"{layer}.layernorm1.weight": [width],
            f"{layer}.layernorm2.weight": [width],
            f"{layer}.linear1.weight": [2 * width, 8 * width],
            f"{layer}.linear1.bias": [2 * width],
            f"{layer}.linear2.weight": [width, 16 * width],
            f"{layer}.linear2.bias": [width],
        }
    for index, size in enumerate(codebook_sizes):
        shapes |= {f"audio_head.heads.{index}.weight": [size + 1, width], f"audio_head.heads.{index}.bias": [size + 1]}
    return shapes


def llm_shapes(config: dict) -> dict[str, list[int]]:
    """The LLM's tensors in the original form, with the embeddings of audio codes."""
    width, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, fused = width, (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"]
    shapes = {"model.embed_tokens.weight": [vocabulary, width]}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.W_pack.weight": [fused, width],
            f"{layer}.self_attn.W_pack.bias": [fused],
            f"{layer}.self_attn.o_proj.weight": [width, query],
            f"{layer}.mlp.gate_proj.weight": [ffn, width],
            f"{layer}.mlp.up_proj.weight": [ffn, width],
            f"{layer}.mlp.down_proj.weight": [width, ffn],
            f"{layer}.input_layernorm.weight": [width],
            f"{layer}.post_attention_layernorm.weight": [width],
        }
    shapes |= {"model.norm.weight": [width], "lm_head.weight": [vocabulary, width]}
    sizes = config["audio_config"]["vq_config"]["codebook_sizes"]
    return shapes | {f"model.audio_embed_layers.{index}.weight": [size + 1, width] for index, size in enumerate(sizes)}


def num_elements(shapes: dict[str, list[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def scaled_checkpoint(total_bytes: float, shards: int) -> tuple[dict, list[dict[str, list[int]]]]:
    """Config and shapes of each shard: the audio head fills the last one, the LLM takes what is left of `total_bytes`."""
    golden = json.loads((ROOT / "tests" / "fixtures" / "golden_a.json").read_text())
    config, total = golden["config"], total_bytes / BYTES
    width = max(256, 128 * round((total / max(shards, 2) / (36 * HEAD_LAYERS)) ** 0.5 / 128))
    config["audio_config"]["audio_head_transformer_layers"] = HEAD_LAYERS
    config |= {
        "hidden_size": width,
        "intermediate_size": 5 * width,
        "head_dim": 128,
        "num_attention_heads": width // 128,
        "num_key_value_heads": 1,
        "vocab_size": 20 * width,
        "torch_dtype": "bfloat16",
    }
    head = head_shapes(width, config["audio_config"]["vq_config"]["codebook_sizes"])
    rest = {
        name: shape for name, shape in golden["state_dict"].items() if not name.startswith(("model.", "audio_head.", "lm_head."))
    }
    sizes = [num_elements(llm_shapes(config | {"num_hidden_layers": layers})) for layers in (0, 1)]
    left = total - num_elements(head) - num_elements(rest) - sizes[0]
    config["num_hidden_layers"] = max(1, round(left / (sizes[1] - sizes[0])))
    others = llm_shapes(config) | rest
    if shards == 1:
        return config, [others | head]
    parts, filled, target = [{} for _ in range(shards - 1)], 0, num_elements(others) / (shards - 1)
    for name, shape in others.items():
        parts[min(int(filled / target), shards - 2)][name] = shape
        filled += torch.Size(shape).numel()
    return config, [*parts, head]


def write_checkpoint(folder: Path, config: dict, parts: list[dict[str, list[int]]]) -> None:
    """Writes the shards one tensor at a time."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 20, dtype=torch.bfloat16)
    weight_map = {}
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        specs = [(name, shape, "BF16") for name, shape in shapes.items()]

        def read(index, specs=specs):
            size = torch.Size(specs[index][1]).numel()
            return noise.repeat(-(-size // len(noise)))[:size]

        write_shard(folder / file, specs, read, lambda size: None)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def process_status(*names: str) -> list[int]:
    """Entries of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        entries = dict(line.split(":", 1) for line in file)
    return [int(entries[name].split()[0]) * 1024 for name in names]


def measure(source: Path, output: Path) -> dict[str, float]:
    """Converts in this process and watches its memory. Peaks are over the state after the imports."""
    base, base_anonymous = process_status("VmRSS", "RssAnon")
    with contextlib.suppress(
        OSError
    ):  # where it may not be reset, the high-water mark includes the imports and can only be higher
        Path("/proc/self/clear_refs").write_text("5")
    anonymous, stop = [base_anonymous], threading.Event()

    def watch():
        while not stop.wait(0.005):
            anonymous.append(process_status("RssAnon")[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    convert_checkpoint(source, output)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    (peak,) = process_status("VmHWM")
    return {
        "baseline": base,
        "peak": peak - base,
        "anonymous": max(anonymous) - base_anonymous,
        "samples": len(anonymous),
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the whole checkpoint")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints (a temporary folder by default)")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    if arguments.gigabytes <= 0 or arguments.shards < 1:
        parser.error("--gigabytes and --shards must be positive")

    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=arguments.folder))
    try:
        config, parts = scaled_checkpoint(arguments.gigabytes * 1e9, arguments.shards)
        write_checkpoint(work / "original", config, parts)
        sizes = [path.stat().st_size for path in sorted((work / "original").glob("*.safetensors"))]
        command = [sys.executable, __file__, "--measure", str(work / "original"), str(work / "converted")]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            return child.returncode
        result = json.loads(child.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work)

    ratio = result["peak"] / max(sizes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = max((torch.Size(shape).numel() * BYTES, name) for part in parts for name, shape in part.items())
    rows = [
        ("hardware", f"{platform.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB RAM"),
        (
            "versions",
            f"python {platform.python_version()}, torch {torch.__version__}, safetensors {safetensors.__version__}, "
            f"transformers {transformers.__version__}",
        ),
        ("checkpoint", f"{sum(sizes) / 1e9:.3f} GB in {len(sizes)} shards, {sum(map(len, parts))} tensors"),
        ("largest shard", f"{max(sizes) / 1e6:.0f} MB"),
        ("largest tensor", f"{largest[0] / 1e6:.0f} MB ({largest[1]})"),
        ("after the imports", f"{result['baseline'] / 1e6:.0f} MB resident"),
        ("peak over it", f"{result['peak'] / 1e6:.0f} MB resident, mapped file pages included"),
        ("of it anonymous", f"{result['anonymous'] / 1e6:.0f} MB (highest of {result['samples']} samples)"),
        ("time", f"{result['seconds']:.1f} s, {sum(sizes) / 1e6 / result['seconds']:.0f} MB/s"),
        ("peak / largest shard", f"{ratio:.2f} (limit {LIMIT})"),
    ]
    for name, value in rows:
        print(f"{name:22s}{value}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
