"""Loss curves of training runs: `python -m modeling_baichuan_audio.training.miniature.curves PICTURE RUN...` (needs matplotlib)."""

import argparse
import json
from pathlib import Path


# What is worth a line, in this order; the total loss stands for everything else.
_LOSSES = (
    "loss",
    "text_loss",
    "audio_loss",
    "reconstruction_loss",
    "mel_loss",
    "stft_loss",
    "multi_scale_mel_loss",
    "energy_distance",
    "spread",
    "flow_loss",
    "prior_loss",
    "eval_loss",
)


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """
    Name -> (step, value) of every loss that a run logged; of a step that was logged twice, after an interruption, the last.

    Raises:
        ValueError: the folder has no `metrics.jsonl`.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} has no metrics.jsonl: is it the output of a training run?")
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in _LOSSES:
            if entry.get(name):  # 0 is a loss that the stage does not have
                curves.setdefault(name, {})[entry["step"]] = entry[name]
    return {name: sorted(curves[name].items()) for name in _LOSSES if name in curves}


def draw(picture: Path, runs: list[Path]) -> None:
    """One panel a run, with a logarithmic loss axis.

    Raises:
        ValueError: a folder that is no run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [read_curves(run) for run in runs]
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for panel in panels.flat[len(runs) :]:
        panel.remove()
    for panel, run, lines in zip(panels.flat, runs, curves):
        for name, points in lines.items():
            panel.plot(*zip(*points), label=name, linewidth=1)
        panel.set(title=run.name, xlabel="step", yscale="log")
        panel.legend(fontsize=7)
    figure.tight_layout()
    part = picture.with_name(f".{picture.name}.part")
    figure.savefig(part, dpi=90, format="png")
    part.replace(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        draw(options.picture, options.runs)
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
