"""The rows of the miniature's table, task by task. What the model or the judges have not done yet, they do when a row needs it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .clips import TestClip, TestSets
from .codec import MEL_DECODER, VOCODER, Codec, flow_task
from .figures import Figure, at_least, at_most
from .measures import LISTENER, Measures, own_paths
from .scores import codebook_usage, weighted_mean
from .speed import measure_speed, speed_figures
from .subject import Subject


CODEBOOKS = (1, 4, 6, 8)  # the paper's Table 1
SECOND_LISTENER = "whisper-tiny.en"
BEFORE, TWO_STAGES, SINGLE_STAGE = "before audio training", "stages 1 and 2", "single stage"
TIMED = 10  # clips
SHORT = 10.0  # seconds
References = tuple[dict[str, float], dict[str, float]]  # of a row: ceiling and floor
ALL_MEASURES = (LISTENER, SECOND_LISTENER, "mos", "speaker")


@dataclass
class Evaluation:
    """
    A checkpoint, what it is tried on, and who judges.

    Args:
        sets: the held-out clips. noise: name of a set -> a clip of noise for each of its clips.
        subject, codec: the checkpoint. measures: the judges.
    """

    sets: TestSets
    noise: dict[str, list[TestClip]]
    subject: Subject
    codec: Codec
    measures: Measures

    def made(self, task: str, clips: list[TestClip]) -> list[Path]:
        """Recordings that the model made of the clips."""
        return [self.subject.outputs.wav(task, clip.id) for clip in clips]

    @property
    def ways(self) -> tuple[int, ...]:
        """Numbers of codebooks to decode from; fewer where the checkpoint has fewer."""
        most = self.codec.config.audio_tokenizer_config.num_codebooks
        return tuple(dict.fromkeys(min(count, most) for count in CODEBOOKS))

    def jobs(self) -> list[tuple[Path, tuple[str, ...]]]:
        """Everything that the rows will ask the judges, so that they can be asked at once. The model's part must be done."""
        sets, most = self.sets, flow_task(self.ways[-1])
        jobs = [(path, ALL_MEASURES) for path in own_paths(sets.voices)]
        jobs += [(path, (LISTENER, SECOND_LISTENER, "mos")) for path in own_paths(sets.human)]
        jobs += [(path, (LISTENER, "mos")) for path in own_paths([*sets.sentences, *sets.answers])]
        jobs += [(path, (LISTENER, "mos", "speaker")) for path in own_paths(self.noise["voices"])]
        jobs += [(path, (LISTENER, "mos")) for path in own_paths([*self.noise["sentences"], *self.noise["answers"]])]
        for task in (most, MEL_DECODER, VOCODER):
            jobs += [(path, (LISTENER, "mos", "speaker")) for path in self.made(task, sets.voices)]
        for count in self.ways[:-1]:
            jobs += [(path, (LISTENER,)) for path in self.made(flow_task(count), sets.voices)]
        for task, clips in (("speak", sets.sentences), ("answer-aloud", sets.questions)):
            jobs += [(path, (LISTENER, "mos")) for path in self.made(task, clips)]
        return jobs

    def make(self) -> None:
        """The model's part of everything."""
        sets, subject = self.sets, self.subject
        self.speed()
        for name in ("voices", "human"):
            subject.transcribe(f"transcribe-{name}", getattr(sets, name))
            subject.transcribe(f"transcribe-noise-{name}", self.noise[name])
        self.codec.encode(self._synthetic)
        for count in self.ways:
            self.codec.flow_matching(sets.voices, count)
        self.codec.mel_decoder(sets.voices)
        self.codec.vocoder_alone(sets.voices)
        subject.speak("speak", sets.sentences)
        subject.answer("answer", sets.questions)
        subject.answer("answer-noise", self.noise["questions"])
        subject.answer_written("answer-written", sets.questions)
        subject.answer_aloud("answer-aloud", sets.questions)

    def transcription(self) -> list[Figure]:
        """All clips of both sets; and of the prompts, some of which last a minute, those of a length as in training apart."""
        human = self.sets.human
        short = [clip for clip in human if clip.duration <= SHORT]
        figures = [self._transcribed("voices", self.sets.voices, "held-out voices, in domain", 8.0)]
        figures.append(self._transcribed("human", human, "recorded prompts of a person", 30.0))
        if 0 < len(short) < len(human):
            figures.append(self._transcribed("human", short, f"recorded prompts of at most {SHORT:g} s", None))
        return figures

    def _transcribed(self, name: str, clips: list[TestClip], title: str, limit: float | None) -> Figure:
        measures, ids = self.measures, {f"noise-{clip.id}" for clip in clips}
        noise = [twin for twin in self.noise[name] if twin.id in ids]
        rate = measures.word_error_rate(clips, self.subject.transcribe(f"transcribe-{name}", clips))
        ceiling = {
            "Whisper base": measures.heard_error_rate(clips),
            "Whisper tiny.en": measures.heard_error_rate(clips, listener=SECOND_LISTENER),
        }
        floor = {"noise": measures.word_error_rate(noise, self.subject.transcribe(f"transcribe-noise-{name}", noise))}
        aim = ("", None) if limit is None else at_most(limit, "%", rate)
        return Figure(f"transcribe: {title}", "WER", rate, "%", len(clips), *aim, ceiling, floor)

    def resynthesis(self) -> list[Figure]:
        """By the mel decoder, with flow matching, and the vocoder alone, which is the ceiling of both."""
        clips, measures, count = self.sets.voices, self.measures, len(self.sets.voices)
        sources, noise = own_paths(clips), own_paths(self.noise["voices"])
        rates = {"source": measures.heard_error_rate(clips), "human": measures.heard_error_rate(self.sets.human)}
        marks = {"source": measures.quality(sources), "human": measures.quality(own_paths(self.sets.human))}
        same = measures.same_voice(clips)
        likeness = {} if same is None else {"same voice, other sentence": same}
        noise_rate, noise_mark = measures.heard_error_rate(clips, noise), measures.quality(noise)
        noise_likeness, errors = measures.similarity(noise, sources), self.codec.mel_floor(clips, self.noise["voices"])
        most, figures = self.ways[-1], []
        ways = (
            (MEL_DECODER, "codes → mel decoder → vocoder", {"mel MAE (16 kHz mel)": "refined"}),
            (
                flow_task(most),
                "codes → mel decoder → flow matching → vocoder",
                {"mel MAE (24 kHz mel)": "flow", "mel MAE before the solver (μ)": "prior"},
            ),
            (VOCODER, "the source's mel → vocoder", {}),
        )
        for task, title, mels in ways:
            title, made, aimed = f"resynthesise: {title}", self.made(task, clips), task != VOCODER
            rate, mark = measures.heard_error_rate(clips, made), measures.quality(made)
            increase = rate - rates["source"]
            aims = (at_most(5, "points", increase), at_least(3, "MOS", mark)) if aimed else (("", None), ("", None))
            figures += [
                Figure(title, "WER", rate, "%", count, ceiling=rates, floor={"noise": noise_rate}),
                Figure(title, "WER increase over the source", increase, "points", count, *aims[0]),
                Figure(title, "DistillMOS", mark, "MOS", count, *aims[1], marks, {"noise": noise_mark}),
            ]
            items = self.codec.flow_matching(clips, most) if mels else []
            for measure, key in mels.items():
                floor = {"noise": weighted_mean(errors["refined" if key == "refined" else "flow"])}
                figures.append(Figure(title, measure, weighted_mean(item[key] for item in items), "", count, floor=floor))
            alike = measures.similarity(made, sources)
            figures.append(
                Figure(title, "speaker similarity", alike, "", count, ceiling=likeness, floor={"noise": noise_likeness})
            )
        return figures

    def codebooks(self) -> list[Figure]:
        """Fewer codebooks, the first ones."""
        clips = self.sets.voices
        rates = [self.measures.heard_error_rate(clips, self.made(flow_task(count), clips)) for count in self.ways]
        errors = [weighted_mean(item["refined"] for item in self.codec.flow_matching(clips, count)) for count in self.ways]
        figures = []
        for measure, unit, values in (("WER", "%", rates), ("mel MAE (16 kHz mel)", "", errors)):
            for index, (count, value) in enumerate(zip(self.ways, values)):
                aim = ("≤ with fewer", value <= values[index - 1]) if index else ("", None)
                title = f"{measure}, {count} codebook{'s' if count > 1 else ''}"
                figures.append(Figure("resynthesise from the first codebooks", title, value, unit, len(clips), *aim))
        return figures

    def speaking(self) -> list[Figure]:
        clips, measures = self.sets.sentences, self.measures
        made, noise, human = self.made("speak", clips), own_paths(self.noise["sentences"]), self.sets.human
        rate, mark = measures.heard_error_rate(clips, made), measures.quality(made)
        rates = {"source": measures.heard_error_rate(clips), "human": measures.heard_error_rate(human)}
        marks = {"source": measures.quality(own_paths(clips)), "human": measures.quality(own_paths(human))}
        noise_rate, noise_mark = measures.heard_error_rate(clips, noise), measures.quality(noise)
        title, count = "speak held-out sentences", len(clips)
        return [
            Figure(title, "WER", rate, "%", count, *at_most(15, "%", rate), rates, {"noise": noise_rate}),
            Figure(title, "DistillMOS", mark, "MOS", count, *at_least(3, "MOS", mark), marks, {"noise": noise_mark}),
        ]

    def answering(self) -> list[Figure]:
        """Questions by held-out voices, answered in writing and in speech."""
        sets, measures, subject = self.sets, self.measures, self.subject
        written = subject.answer("answer", sets.questions)
        aloud = measures.heard(self.made("answer-aloud", sets.questions))
        beside = [item["text"] for item in subject.answer_aloud("answer-aloud", sets.questions)]
        in_writing = subject.answer_written("answer-written", sets.questions)
        deaf = subject.answer("answer-noise", self.noise["questions"])

        def alternatives(clips: list[TestClip], part: slice) -> References:
            return (
                {"asked in writing": measures.accuracy(clips, in_writing[part])},
                {"noise": measures.accuracy(clips, deaf[part])},
            )

        title, share = "spoken question → text answer", measures.accuracy(sets.questions, written)
        figures = self._parts(title, written, at_least(90, "%", share), alternatives)
        # What a listener makes of the corpus's own recordings of such answers, and of noise in their place.
        ceiling, floor, marks, noise_marks = {}, {}, {}, {}
        if sets.answers:
            recorded, noise = own_paths(sets.answers), own_paths(self.noise["answers"])
            name = f"recorded answers (n {len(recorded)})"
            ceiling = {name: measures.heard_accuracy(sets.answers, recorded)}
            floor = {"noise": measures.heard_accuracy(sets.answers, noise)}
            marks, noise_marks = {name: measures.quality(recorded)}, {"noise": measures.quality(noise)}
        title, share = "spoken question → spoken answer", measures.accuracy(sets.questions, aloud)
        figures += self._parts(title, aloud, at_least(80, "%", share), lambda clips, part: (ceiling, floor))
        text, mark = measures.accuracy(sets.questions, beside), measures.quality(self.made("answer-aloud", sets.questions))
        count = len(sets.questions)
        return [
            *figures,
            Figure(title, "accuracy of the text beside it", text, "%", count),
            Figure(title, "DistillMOS", mark, "MOS", count, ceiling=marks, floor=noise_marks),
        ]

    def _parts(
        self, title: str, answers: list[str], aim: tuple[str, bool], references: Callable[[list[TestClip], slice], References]
    ) -> list[Figure]:
        """Accuracy of answers to all questions, and to those about known facts and held-out operands apart."""
        figures, split = [], len(self.sets.known)
        parts = {
            "accuracy": slice(None),
            "accuracy, known facts": slice(split),
            "accuracy, held-out operands": slice(split, None),
        }
        for measure, part in parts.items():
            clips = self.sets.questions[part]
            reached = aim if measure == "accuracy" else ("", None)
            if clips:
                share = self.measures.accuracy(clips, answers[part])
                figures.append(Figure(title, measure, share, "%", len(clips), *reached, *references(clips, part)))
        return figures

    def timings(self) -> list[dict[str, Any]]:
        """See `measure_speed`."""
        return measure_speed(self.subject, self.sets.questions, self.sets.voices, TIMED)

    @property
    def _synthetic(self) -> list[TestClip]:
        return [*self.sets.voices, *self.sets.sentences, *self.sets.questions]

    def usage(self) -> list[dict[str, float]]:
        """Of each codebook: its `entries`, the share `used`, the `perplexity`; over `frames` of all synthetic held-out clips."""
        codes = self.codec.encode(self._synthetic)
        sizes = self.codec.config.audio_tokenizer_config.codebook_sizes
        frames = np.concatenate([row.numpy() for row in codes], axis=1)
        used = codebook_usage(frames, sizes)
        return [{"entries": size, "frames": frames.shape[1]} | row for size, row in zip(sizes, used)]

    def codebook_rows(self, usage: list[dict[str, float]]) -> list[Figure]:
        total, frames = sum(row["entries"] for row in usage), usage[0]["frames"]
        used = 100 * sum(row["used"] * row["entries"] for row in usage) / total
        return [Figure("codebooks", f"share of {total} entries that occur in {frames} frames", used, "%", len(self._synthetic))]

    def speed(self) -> list[Figure]:
        found = speed_figures(self.timings())
        names = {
            "first_sound": ("time to the first finished piece of a spoken answer (median)", "s"),
            "reply": ("real-time factor of a spoken answer (median)", ""),
            "resynthesis": ("real-time factor of resynthesis (median)", ""),
            "transcription": ("real-time factor of transcription (median)", ""),
        }
        rows = [(title, unit, *found.get(name, (None, 0))) for name, (title, unit) in names.items()]
        return [Figure("speed on this machine, one at a time", title, value, unit, count) for title, unit, value, count in rows]


_WRITTEN = "written question → text answer"
_KNOWN, _HELD_OUT = "accuracy, known facts", "accuracy, held-out operands"


def written_rows(shares: dict[str, tuple[float, float]], counts: tuple[int, int]) -> list[Figure]:
    """
    The questions in writing, before and after audio training: all of them, and both kinds apart.

    Args:
        shares: name of a checkpoint -> accuracy in % on questions that were trained on, and on those that were held out; with the
            names `BEFORE`, `TWO_STAGES` and `SINGLE_STAGE` where there are such checkpoints.
        counts: of both kinds of questions.
    """
    whole = sum(counts)
    kinds = {
        "accuracy": (whole, {name: (a * counts[0] + b * counts[1]) / whole for name, (a, b) in shares.items()}),
        _KNOWN: (counts[0], {name: share for name, (share, _) in shares.items()}),
        _HELD_OUT: (counts[1], {name: share for name, (_, share) in shares.items()}),
    }
    figures = []
    for measure, (count, values) in kinds.items():
        for name, value in values.items():
            aim = ("", None)
            if measure == "accuracy" and name == TWO_STAGES and SINGLE_STAGE in values:
                aim = ("loses less than a single stage", value > values[SINGLE_STAGE])
            ceiling = {BEFORE: values[BEFORE]} if BEFORE in values and name != BEFORE else {}
            figures.append(Figure(_WRITTEN, f"{measure}: {name}", value, "%", count, *aim, ceiling))
    return figures


def written_shares(figures: Iterable[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """What `written_rows` was told of the checkpoint `name`, from entries of figures; None if they hold nothing of it."""
    found = {row["measure"]: row["value"] for row in figures if row["task"] == _WRITTEN}
    measures = [f"{kind}: {name}" for kind in (_KNOWN, _HELD_OUT)]
    return tuple(found[measure] for measure in measures) if all(measure in found for measure in measures) else None
