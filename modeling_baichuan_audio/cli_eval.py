"""Sub-commands of `eval`: the judges, and the evaluation of the miniature by them."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from .cli_common import Checkpoint, Seed, app, load, one_line_errors
from .conversion import find_checkpoint


evaluation = typer.Typer(no_args_is_help=True, help="Evaluate a checkpoint by models from outside; see docs/evaluation.md.")
app.add_typer(evaluation, name="eval")


@evaluation.command()
def judges(folder: Annotated[Path, typer.Argument(help="Folder to make, or to complete: about 1.5 GB.")]) -> None:
    """Fetch the models that judge, into an environment of their own, at pinned versions."""
    with one_line_errors():
        from .evaluation.judges import fetch_judges

        typer.echo(f"{fetch_judges(folder)}: ready")


@evaluation.command()
def miniature(
    checkpoint: Checkpoint = "miniature",
    corpus: Annotated[Path, typer.Option(help="The miniature's corpus; see training/miniature/README.md.")] = Path("corpus"),
    judges: Annotated[Path, typer.Option(help="What `baichuan-audio eval judges` made.")] = Path("judges"),
    work: Annotated[Path, typer.Option(help="Outputs and verdicts, from which an interrupted run goes on.")] = Path(
        "output/evaluation"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Clips of each set.")] = 120,
    text_before: Annotated[
        Optional[str], typer.Option(help="Checkpoint before audio training, to be asked the questions in writing.")
    ] = None,
    two_stage: Annotated[Optional[str], typer.Option(help="The same, after stages 1 and 2.")] = None,
    single_stage: Annotated[Optional[str], typer.Option(help="The same, trained on the same rows in a single stage.")] = None,
    earlier: Annotated[
        Optional[Path], typer.Option(help="Results of an earlier run, for the comparisons that none of these three names.")
    ] = None,
    card: Annotated[Path, typer.Option(help="Model card to write the results into, between its markers.")] = Path(
        "model_card.md"
    ),
    json: Annotated[Path, typer.Option(help="File for the results in full.")] = Path("docs/evaluation-miniature.json"),
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 16,
) -> None:
    """Measure everything that the miniature does, on held-out clips, and write it into the model card."""
    with one_line_errors():
        from .evaluation.card import split_card, write_card, write_json
        from .evaluation.miniature import Plan, evaluate
        from .evaluation.report import card_part
        from .evaluation.rows import BEFORE, SINGLE_STAGE, TWO_STAGES

        # The run is long: what would only be noticed at its end is noticed now.
        split_card(card)
        if not json.parent.is_dir():
            raise ValueError(f"The folder of {json} does not exist.")
        named = {BEFORE: text_before, TWO_STAGES: two_stage, SINGLE_STAGE: single_stage}
        others = {name: find_checkpoint(folder) for name, folder in named.items() if folder is not None}
        folder = find_checkpoint(checkpoint)
        for path in (folder, *others.values()):
            if not (path / "config.json").is_file():
                raise ValueError(f"{path} has no config.json: it is not a checkpoint.")
        plan = Plan(folder, corpus, judges, work, limit, seed, batch_size, others, earlier)
        results = evaluate(plan, lambda path: load(str(path), "cpu", "float32"))
        write_json(json, results)
        write_card(card, card_part(results))
        reached = [row["met"] for row in results["figures"] if row["met"] is not None]
        typer.echo(f"{card}, {json}: {len(results['figures'])} figures, {sum(reached)} of {len(reached)} aims met")
