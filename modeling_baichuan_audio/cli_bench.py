"""`baichuan-audio bench`: the benchmarks of a checkout, one after the other, into one JSON file and one table."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from .cli_common import app, one_line_errors
from .conversion.files import replace_text


SCRIPTS = ("frame_step", "audio_head", "flow_matching", "vocoder", "first_sound", "end_to_end")
SIZES = ("tiny", "mid", "released")
# So that all of it ends in minutes: two Euler steps cost a fifth of ten, 20 frames a third of 60.
_MORE = {
    "flow_matching": ["--steps", "2"],
    "first_sound": ["--frames", "20", "--repeats", "1"],
    "end_to_end": ["--frames", "20", "--repeats", "1"],
}
# The whole model of the released size is counted on a CPU, not run: 40 GB of weights.
_COUNTED = ("frame_step", "audio_head", "first_sound", "end_to_end")


def find_benchmarks() -> Path:
    """The folder of the scripts.

    Raises:
        ValueError: the package was installed without its source checkout.
    """
    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "frame_step.py").is_file():
        raise ValueError("The benchmarks are part of a source checkout: install it with `pip install -e .`, and run them there.")
    return folder


def leaves(figures: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Nested figures -> (name with dots, value)."""
    if isinstance(figures, dict):
        return [leaf for name, value in figures.items() for leaf in leaves(value, (*path, str(name)))]
    if isinstance(figures, list):
        return [leaf for index, value in enumerate(figures) for leaf in leaves(value, (*path, str(index)))]
    return [(".".join(path), figures)]


def table(results: dict[str, Any]) -> str:
    """Markdown with a row for each figure."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = [f"| {script} | {name} | {shown(value)} |" for script, part in results.items() for name, value in leaves(part)]
    return "\n".join(["| benchmark | figure | value |", "|---|---|---|", *rows, ""])


@app.command()
def bench(
    size: Annotated[str, typer.Option(help=f"Of a model with random weights: {', '.join(SIZES)}.")] = "mid",
    checkpoint: Annotated[Optional[str], typer.Option("--checkpoint", "-c", help="Measured instead of a size.")] = None,
    only: Annotated[Optional[list[str]], typer.Option(help=f"Only this one; repeat for more: {', '.join(SCRIPTS)}.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file; a table is written beside it.")] = Path("bench.json"),
) -> None:
    """Measure what a frame, flow matching, the vocoder, the first sound and a whole reply cost here, beside what they must cost.

    Without a GPU, a frame and a reply of the released size are counted only: bytes and operations.
    """
    with one_line_errors():
        if size not in SIZES:
            raise ValueError(f"--size must be {', '.join(SIZES)}, got {size}.")
        unknown = [name for name in only or () if name not in SCRIPTS]
        if unknown:
            raise ValueError(f"--only must be {', '.join(SCRIPTS)}, got {unknown[0]}.")
        if output.suffix != ".json" or not output.absolute().parent.is_dir():
            raise ValueError(f"--output must be a .json file in a folder that exists, got {output}.")
        folder, results = find_benchmarks(), {}
        for name in only or SCRIPTS:
            arguments = ["--checkpoint", checkpoint] if checkpoint else ["--size", size]
            if name in _COUNTED and size == "released" and not (checkpoint or torch.cuda.is_available()):
                arguments += ["--dtype", "bfloat16", "--arithmetic"]
            typer.echo(f"{name}:")
            with tempfile.TemporaryDirectory() as scratch:
                figures = Path(scratch) / "figures.json"
                command = [sys.executable, folder / f"{name}.py", *arguments, *_MORE.get(name, []), "--json", figures]
                done = subprocess.run([str(part) for part in command])
                if done.returncode:
                    raise ValueError(f"The benchmark {name} failed with exit code {done.returncode}; see above.")
                results[name] = json.loads(figures.read_text(encoding="utf-8"))
        replace_text(output, json.dumps(results, indent=2) + "\n")
        replace_text(output.with_suffix(".md"), table(results))
        typer.echo(f"{output}, {output.with_suffix('.md')}")
