"""The golden tensors, and the checkpoints behind them, whose every weight follows from its name and shape."""

import json
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


FIXTURES = Path(__file__).parent.parent / "fixtures"


@lru_cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "golden_a.safetensors")


@lru_cache
def golden_json() -> dict:
    return json.loads((FIXTURES / "golden_a.json").read_text())


def clip_keys() -> list[str]:
    return [clip["key"] for clip in golden_json()["clips"]]


def formula_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that the golden tensors were computed with, for the original checkpoint's key `name`: float32."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    x = draw.standard_normal(size=shape).astype(np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "weight_g":
        x = 1.0 + 0.1 * x
    elif len(shape) >= 2:
        if ".codebook." in name:
            x *= 0.7
        elif "embed_tokens" in name or "audio_embed_layers" in name:
            x *= 0.5
        else:
            x *= (1.0 / int(np.prod(shape[1:]))) ** 0.5
    elif leaf == "bias" or leaf.endswith("_bias"):
        x *= 0.1
    elif leaf == "cluster_size":
        x = np.abs(x) + 1.0
    else:
        x = 1.0 + 0.1 * x
    if name == "conv_post.weight_g":
        x *= 0.3
    elif name == "conv_post.bias":
        x -= 3.0
    return np.ascontiguousarray(x, dtype=np.float32)


def formula_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """All tensors of `shapes`. The fixed position tables are left at zero: a faithful model must not read them."""
    return {
        name: torch.zeros(shape)
        if name.endswith("positional_embedding")
        else torch.from_numpy(formula_weight(name, tuple(shape)))
        for name, shape in shapes.items()
    }


def write_original_checkpoint(folder: Path, shards: int = 2, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A small checkpoint in the original form: flat config, sharded safetensors, no processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = golden_json()
    state = formula_state_dict(data["state_dict"]) | (extra or {})
    (folder / "config.json").write_text(json.dumps(data["config"]))
    names = list(state)
    size = -(-len(names) // shards)
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in state.values())}, "weight_map": {}}
    for number in range(shards):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_hift(path: Path) -> Path:
    """The golden vocoder as the pickle `hift.pt`."""
    torch.save(formula_state_dict(golden_json()["vocoder_state_dict"]), path)
    return path
