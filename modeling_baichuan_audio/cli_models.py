"""Sub-commands about checkpoints and training: convert, export, build, tokenize, train, info."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
import yaml
from tqdm import tqdm
from transformers.utils import logging

from .cli_common import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    Device,
    Dtype,
    Seed,
    app,
    bits_per_second,
    load,
    named_dtype,
    one_line_errors,
)
from .configuration_baichuan_audio import BaichuanAudioConfig
from .conversion import build_checkpoint, convert_checkpoint, export_checkpoint, find_checkpoint
from .modeling_baichuan_audio import BaichuanAudioForCausalLM


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of config entries.")
    return values


def require_training_extra() -> None:
    missing = [name for name in ("accelerate", "datasets", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'Training needs {", ".join(missing)}: pip install "baichuan-audio[train]".')


@contextmanager
def byte_progress(description: str):
    """A progress bar, as the function of bytes done and bytes in all that moves it."""
    with tqdm(unit="B", unit_scale=True, desc=description, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Original (or converted) checkpoint: folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    hift: Annotated[
        Optional[Path], typer.Option(help="hift.pt of CosyVoice 2: the vocoder, which the checkpoints do not carry.")
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help='"float32", "bfloat16" or "float16"; unchanged by default.')] = None,
) -> None:
    """Convert an original checkpoint, or add a vocoder to a converted one."""
    with one_line_errors():
        torch_dtype = named_dtype(dtype)
        with byte_progress("converting") as progress:
            report = convert_checkpoint(checkpoint, output, hift, torch_dtype, progress)
        typer.echo(
            f"{output}: {report.tensors} tensors, {report.total_bytes / 1e9:.2f} GB in {len(report.shards)} files; "
            f"{report.dropped} unused tensors dropped, {report.vision} vision tensors ignored."
        )


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help='Checkpoint: folder, Hub id, "untrained" or "miniature".')],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    push: Annotated[Optional[str], typer.Option(help="Hub repository to upload it to as well.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
) -> None:
    """Write a folder for the Hub that works without this package."""
    with one_line_errors():
        with byte_progress("exporting") as progress:
            report = export_checkpoint(checkpoint, folder, push, private, progress=progress)
        pushed = "" if push is None else f"; pushed to {push}"
        typer.echo(
            f"{folder}: {report.tensors} tensors, {report.total_bytes / 1e9:.2f} GB in {len(report.shards)} weight files{pushed}"
        )


@app.command()
def build(
    llm: Annotated[str, typer.Option(help="Any causal language model of transformers: folder or Hub id.")],
    encoder: Annotated[str, typer.Option(help="Any Whisper checkpoint: folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    config: Annotated[
        Optional[Path], typer.Option(help="YAML or JSON file of config entries that win over the derived ones.")
    ] = None,
    vocoder: Annotated[Optional[str], typer.Option(help="hift.pt, or a folder with a vocoder.")] = None,
    seed: Seed = 0,
    dtype: Annotated[Optional[str], typer.Option(help='"float32", "bfloat16" or "float16"; the sources\' by default.')] = None,
) -> None:
    """Start a new speech model from a language model and a Whisper encoder."""
    with one_line_errors():
        torch_dtype = named_dtype(dtype)
        overrides = None if config is None else read_yaml(config)
        report = build_checkpoint(llm, encoder, output, overrides, vocoder, seed, torch_dtype)
        typer.echo(
            f"{output}: {report.parameters:,} parameters; {report.llm_tensors} tensors from the language model, "
            f"{report.encoder_tensors} from the encoder, {report.new_tensors} new; vocabulary {report.vocab_size}."
        )


@app.command()
def tokenize(
    data: Annotated[list[str], typer.Argument(help="JSONL or Parquet files, folders or Hub ids; see docs/data.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the Parquet shards.")],
    checkpoint: Checkpoint = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Rows of a shard.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks of at most 30 s encoded at once.")] = 8,
    max_tokens: Annotated[Optional[int], typer.Option(min=1, help="Skip longer rows.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as they come.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Replace the audio of training rows by its codes, once; goes on where it was interrupted."""
    with one_line_errors():
        require_training_extra()
        from .training.pretokenize import pretokenize

        model, processor = load(checkpoint, device, dtype)
        with tqdm(unit="row", desc="tokenizing", leave=False, disable=not sys.stderr.isatty()) as bar:

            def progress(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            settings = {"shard_size": shard_size, "batch_size": batch_size, "max_tokens": max_tokens, "streaming": streaming}
            summary = pretokenize(data, model.audio_tokenizer, processor, output, progress=progress, **settings)
        skipped = sum(summary["skipped"].values())
        typer.echo(
            f"{output}: {summary['rows_written']} rows in {summary['shards']} shards, {summary['audio_frames']} frames "
            f"({summary['audio_hours']:.2f} h); {skipped} rows skipped {summary['skipped'] or ''}".rstrip()
        )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help='YAML file, or a shipped recipe: "stage1", "lora", "tiny/stage1", ...')],
    changes: Annotated[
        Optional[list[str]], typer.Argument(help="Settings that win over the recipe's, as section.key=value.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = True,
) -> None:
    """Train a part of the model from a recipe; also under torchrun and accelerate launch."""
    with one_line_errors():
        require_training_extra()
        from .training.recipe import read_recipe
        from .training.run import train as run_recipe

        logging.set_verbosity_warning()
        settings = read_recipe(recipe, changes)
        summary = run_recipe(settings, resume)
        skipped = sum(summary["rows_skipped"].values())
        typer.echo(
            f"{summary['final']}: {summary['trained_parameters']:,} parameters trained, final loss {summary['train_loss']:.4f}; "
            f"{skipped} rows skipped {summary['rows_skipped'] or ''}".rstrip()
        )


@app.command()
def info(
    checkpoint: Annotated[str, typer.Argument(help='Folder, Hub id, "untrained" or "miniature".')] = DEFAULT_CHECKPOINT,
) -> None:
    """Say what a checkpoint holds, from its config alone."""
    with one_line_errors():
        folder = find_checkpoint(checkpoint)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: it is not a checkpoint.")
        config = BaichuanAudioConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = BaichuanAudioForCausalLM(config)
        parts = {
            "language model": model.model.language_model,
            "text head": model.lm_head,
            "audio embeddings": model.model.audio_embed_layers,
            "audio tokenizer": model.audio_tokenizer,
            "audio head": model.audio_head,
            "flow matching": model.flow_matching,
            "vocoder": model.vocoder,
        }
        tokenizer = config.audio_tokenizer_config
        typer.echo(f"checkpoint: {folder}")
        typer.echo(
            f"language model: {config.text_config.model_type}, {config.text_config.num_hidden_layers} layers, "
            f"width {config.text_config.hidden_size}, vocabulary {config.text_config.vocab_size}"
        )
        typer.echo(
            f"codes: {tokenizer.num_codebooks} codebooks of {tokenizer.codebook_sizes} at {tokenizer.frame_rate:g} Hz, "
            f"{bits_per_second(config, tokenizer.codebook_sizes):.1f} bit/s"
        )
        typer.echo(
            f"audio in: {tokenizer.sampling_rate} Hz, chunks of {tokenizer.max_audio_seconds} s; audio out: {config.sampling_rate} Hz"
        )
        for name, part in parts.items():
            if part is None:
                typer.echo(f"{name}: none (add one with `baichuan-audio convert {folder} OUTPUT --hift hift.pt`)")
            else:
                typer.echo(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
        typer.echo(f"total: {sum(p.numel() for p in model.parameters()):,} parameters")
