"""The evaluation of the miniature from end to end: what it makes of the held-out clips, what the judges say, the results."""

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..processors.processing_baichuan_audio import BaichuanAudioProcessor
from ..training.miniature.sentences import questions
from . import subject as settings
from .clips import Outputs, TestClip, TestSets, checkpoint_identity
from .codec import Codec
from .figures import Figure
from .judges import Judges, judge_versions
from .measures import Measures
from .noise import noise_twins
from .rows import Evaluation, written_rows, written_shares
from .scores import TextNormalizer
from .speed import measured_on
from .subject import Subject


Loader = Callable[[Path], tuple[BaichuanAudioForCausalLM, BaichuanAudioProcessor]]
_WRITTEN = 5  # questions in writing of each kind, per clip of the other sets: they are cheap, and few would hide small losses


@dataclass(frozen=True)
class Plan:
    """
    What is to be evaluated, on what.

    Args:
        checkpoint: folder of the model.
        corpus, judges: folders of the corpus and of the judges.
        work: folder for outputs and verdicts; an interrupted run goes on from them.
        limit: clips of each set. seed: of draws. batch_size: clips at once.
        comparisons: name -> folder of further checkpoints, asked the questions in writing; see `rows.written_rows`.
        earlier: results of an earlier evaluation, whose comparisons stand where no folder is named.
    """

    checkpoint: Path
    corpus: Path
    judges: Path
    work: Path
    limit: int = 120
    seed: int = 0
    batch_size: int = 16
    comparisons: dict[str, Path] = field(default_factory=dict)
    earlier: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What outputs depend on, apart from checkpoint, clips and code."""
        limits = {
            "longest_transcript": settings.LONGEST_TRANSCRIPT,
            "longest_answer": settings.LONGEST_ANSWER,
            "longest_piece": settings.LONGEST_PIECE,
        }
        return {"seed": self.seed, "dtype": "float32", "text": settings.GREEDY_TEXT, "reply": settings.GREEDY_REPLY} | limits


def written_questions(limit: int) -> tuple[list[TestClip], list[TestClip]]:
    """Questions of the domain in writing, at most `limit` of those trained on and of those held out, each evenly spread."""
    picked: list[list[TestClip]] = []
    for kind, held_out in (("known", False), ("operands", True)):
        lines = [line for line in questions() if line.held_out == held_out]
        count = min(limit, len(lines))
        chosen = [lines[index * len(lines) // count] for index in range(count)]
        picked.append([TestClip(f"{kind}-{line.text}", line.text, line.answer, "", Path(), 0.0) for line in chosen])
    return picked[0], picked[1]


def earlier_comparisons(plan: Plan) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """
    Comparisons of earlier results: they are of other checkpoints, which need not be kept to be compared with. They are asked in
    writing, questions of the domain, so the corpus may have grown since.

    Returns:
        Name -> accuracies as `rows.written_rows` takes them, name -> SHA-256 of the checkpoint; those of `plan.comparisons` left out.

    Raises:
        ValueError: a file that holds no results, or results of other judges, settings or counts of clips.
    """
    if plan.earlier is None:
        return {}, {}
    try:
        results = json.loads(plan.earlier.read_text(encoding="utf-8"))
        found = {name: results[name] for name in ("judges", "settings", "limit")}
        figures, identities = results["figures"], results["comparisons"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{plan.earlier} holds no results of `eval miniature`: {error!r}.") from error
    wanted = {"judges": judge_versions(), "settings": plan.settings(), "limit": plan.limit}
    other = [name for name, value in wanted.items() if found[name] != value]
    if other:
        raise ValueError(f"The results of {plan.earlier} cannot be compared with: they have another {', another '.join(other)}.")
    shares = {name: written_shares(figures, name) for name in identities if name not in plan.comparisons}
    shares = {name: share for name, share in shares.items() if share is not None}
    return shares, {name: identities[name] for name in shares}


def evaluate(plan: Plan, load: Loader) -> dict[str, Any]:
    """
    Runs the whole evaluation, or what is left of it.

    Args:
        plan: see above.
        load: folder -> model, in float32 and in evaluation mode, and processor.

    Returns:
        `figures` (list of [`Figure`] as dicts, in the order of the table), `codebooks`, and what they were measured with: `date`,
        `checkpoint`, `comparisons`, `corpus`, `judges`, `machine`, `settings`, `limit`.

    Raises:
        ValueError: a corpus, judges or a checkpoint that cannot be used.
    """
    sets = TestSets(plan.corpus, plan.limit)
    judges = Judges(plan.judges, plan.work / "verdicts.jsonl")
    measures = Measures(judges, TextNormalizer(judges.spelling))
    identities = {name: checkpoint_identity(folder) for name, folder in plan.comparisons.items()}
    identity = checkpoint_identity(plan.checkpoint)

    def subject_of(folder: Path, sha256: str) -> Subject:
        model, processor = load(folder)
        key = json.dumps([sha256, sets.sha256, plan.settings()], sort_keys=True)
        name = f"{sha256[:12]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        return Subject(model.eval(), processor, Outputs(plan.work / name), plan.seed, plan.batch_size)

    known, held_out = written_questions(_WRITTEN * plan.limit)

    def ask_in_writing(subject: Subject) -> tuple[float, float]:
        known_share, held_out_share = (
            measures.accuracy(clips, subject.answer_written("written", clips)) for clips in (known, held_out)
        )
        return known_share, held_out_share

    shares, compared = earlier_comparisons(plan)
    for name, folder in plan.comparisons.items():
        compared[name] = identities[name]["sha256"]
        shares[name] = ask_in_writing(subject_of(folder, compared[name]))
    subject = subject_of(plan.checkpoint, identity["sha256"])
    names = ("voices", "sentences", "human", "questions", "answers")
    noise = {name: noise_twins(getattr(sets, name), plan.work / "noise" / sets.sha256[:12]) for name in names}
    evaluation = Evaluation(sets, noise, subject, Codec(subject), measures)
    evaluation.make()
    shares["this checkpoint"] = ask_in_writing(subject)
    judges.ask(evaluation.jobs())
    usage = evaluation.usage()
    figures: list[Figure] = [
        *evaluation.transcription(),
        *evaluation.resynthesis(),
        *evaluation.codebooks(),
        *evaluation.speaking(),
        *evaluation.answering(),
        *written_rows(shares, (len(known), len(held_out))),
        *evaluation.codebook_rows(usage),
        *evaluation.speed(),
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "checkpoint": identity,
        "comparisons": compared,
        "corpus": {"sha256": sets.sha256, "clips": {name: len(getattr(sets, name)) for name in names}},
        "judges": judge_versions(),
        "machine": measured_on(evaluation.timings()),
        "settings": plan.settings(),
        "limit": plan.limit,
        "figures": [figure.entry() for figure in figures],
        "codebooks": usage,
    }
