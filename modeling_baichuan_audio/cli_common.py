"""What the sub-commands of `baichuan-audio` share: the application, common options, loading, errors in one line."""

import math
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils import logging

from .configuration_baichuan_audio import BaichuanAudioConfig
from .conversion import find_checkpoint
from .conversion.convert import DTYPES
from .modeling_baichuan_audio import BaichuanAudioForCausalLM


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Baichuan-Audio: speech and text in, speech and text out.",
)

Checkpoint = Annotated[
    str,
    typer.Option("--checkpoint", "-c", help='Folder, Hub id, "untrained" (made on this machine) or "miniature".'),
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps", ...')]
Dtype = Annotated[str, typer.Option(help='"auto" (the checkpoint\'s), "float32", "bfloat16" or "float16".')]


@contextmanager
def one_line_errors():
    """Turns the errors of bad input into one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        typer.echo(f"baichuan-audio: {message}", err=True)
        raise typer.Exit(2) from None


def resolve_device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def named_dtype(name: str | None, *others: str) -> torch.dtype | None:
    """The dtype of that name, or None for None; `others` are further names that the option takes."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype must be {', '.join([*others, *DTYPES])}, got {name}.")
    return None if name is None else DTYPES[name]


DEFAULT_CHECKPOINT = "miniature"
_NOTICES = {
    "miniature": "Using the miniature checkpoint: it knows small English questions and sentences only, and is often wrong.",
    "untrained": "Using the small UNTRAINED checkpoint: what it says means nothing. Name a real one with --checkpoint.",
}


def load(checkpoint: str, device: str, dtype: str) -> tuple[BaichuanAudioForCausalLM, object]:
    """Model and processor; says plainly what a checkpoint without a folder of its own is."""
    target = resolve_device(device)
    torch_dtype = "auto" if dtype == "auto" else named_dtype(dtype, "auto")
    folder = find_checkpoint(checkpoint)
    if checkpoint in _NOTICES:
        typer.echo(_NOTICES[checkpoint], err=True)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    if not isinstance(model, BaichuanAudioForCausalLM):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a Baichuan-Audio model.")
    return model.to(target), AutoProcessor.from_pretrained(folder)


def bits_per_second(config: BaichuanAudioConfig, codebook_sizes: list[int]) -> float:
    return config.audio_tokenizer_config.frame_rate * sum(math.log2(size) for size in codebook_sizes)


@app.callback()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
