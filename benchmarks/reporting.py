"""What the benchmarks share: the machine and the versions that a figure belongs to, and codes of recordings to measure on."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.models import SIZES
from modeling_baichuan_audio import BaichuanAudioFeatureExtractor, BaichuanAudioTokenizerModel
from modeling_baichuan_audio.conversion.files import replace_text


RANDOM_NOTICE = "tiny; WEIGHTS AND CODES ARE RANDOM, THE FIGURES SAY NOTHING ABOUT A TRAINED MODEL"


def hardware(device: str = "cpu") -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, {torch.get_num_threads()} threads used"


def versions() -> str:
    return f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def add_model_options(parser: argparse.ArgumentParser, size: str = "mid", dtypes: bool = False, arithmetic: bool = False) -> None:
    """Which model is measured, where, and where the figures go."""
    parser.add_argument("--size", choices=SIZES, default=size, help="of a model with random weights")
    parser.add_argument("--checkpoint", help='folder, Hub id, "miniature" or "untrained", instead of a size')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if dtypes:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    if arithmetic:
        parser.add_argument("--arithmetic", action="store_true", help="count only, without allocating the model of --size")
    parser.add_argument("--json", type=Path, help="write the figures here")


def model_name(options: argparse.Namespace) -> str:
    return options.checkpoint or f"{options.size}, random weights"


def print_environment(options: argparse.Namespace) -> dict[str, str]:
    """Prints and returns what the figures belong to."""
    if getattr(options, "arithmetic", False) and options.checkpoint:
        print("--arithmetic takes a --size, not a checkpoint.", file=sys.stderr)
        raise SystemExit(2)
    environment = {"hardware": hardware(options.device), "versions": versions(), "model": model_name(options)}
    if "dtype" in options:
        environment["dtype"] = options.dtype
    for name, value in environment.items():
        print(f"{name:9s} {value}")
    return environment


def print_step(result: dict[str, Any]) -> None:
    """Milliseconds of each way of doing a step, and the best of them beside its limit."""
    for name, seconds in result["seconds"].items():
        print(f"  {name:15} {1000 * seconds:9.2f} ms")
    print(f"  {result['times_faster']:.2f} x as fast as before; ", end="")
    print(f"limit {1000 * result['limit_seconds']:.2f} ms at {result['bytes_per_second'] / 1e9:.1f} GB/s, ", end="")
    print(f"{result['over_limit']:.2f} x of it")


def write_figures(path: Path | None, figures: Any) -> None:
    """Writes them as JSON, if a path was asked for."""
    if path is not None:
        replace_text(path, json.dumps(figures, indent=2) + "\n")


def read_codes(path: str, tokenizer: BaichuanAudioTokenizerModel) -> torch.Tensor:
    """(num_codebooks, frames) of the first chunk of a file of sound."""
    config = tokenizer.config
    names = ("sampling_rate", "n_fft", "hop_length", "max_audio_seconds")
    extractor = BaichuanAudioFeatureExtractor(feature_size=config.num_mel_bins, **{name: getattr(config, name) for name in names})
    features = extractor(path, return_tensors="pt")
    codes = tokenizer.encode(features["input_features"][:1], features["input_features_mask"][:1]).audio_codes[0]
    return codes[:, codes[0] >= 0]
