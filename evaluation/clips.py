"""What is evaluated: the held-out clips of a corpus, a checkpoint's identity, and the outputs that an interrupted run goes on from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from ..conversion.files import sha256_of
from .judges import read_lines


@dataclass(frozen=True)
class TestClip:
    """
    One recording of the corpus.

    Args:
        id: unique; text: what is said; answer: what should be answered, for questions.
        voice: who speaks; path: WAV file; duration: seconds.
    """

    __test__ = False  # no test class, whatever its name

    id: str
    text: str
    answer: str
    voice: str
    path: Path
    duration: float


class TestSets:
    """
    The held-out sets of a corpus, at most `limit` clips each.

    Args:
        folder: with `manifest.jsonl` (see training/miniature/README.md).
        limit: clips of a set.

    Attributes:
        voices: sentences by voices that were not trained on. sentences: new sentences in a known voice. human: recordings of a person.
        questions: by held-out voices, half of them (where there are enough) about held-out operands. answers: the corpus's own
            recordings of answers that these questions ask for, the first of several takes. known, operands: the questions apart.
            sha256: of the manifest.

    Raises:
        ValueError: no manifest, entries without what is needed, a set that is empty, a recording that is missing.
    """

    __test__ = False

    def __init__(self, folder: str | Path, limit: int):
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {limit}.")
        self.folder, self.manifest = Path(folder), Path(folder) / "manifest.jsonl"
        if not self.manifest.is_file():
            raise ValueError(f"{folder} has no manifest.jsonl: make the corpus first (training/miniature/README.md).")
        entries = read_lines(self.manifest)
        try:
            found = {
                "voices": [e for e in entries if e["split"] == "test_voice" and e["kind"] == "sentence"],
                "sentences": [e for e in entries if e["split"] == "test_sentence" and e["kind"] == "sentence"],
                "human": [e for e in entries if e["split"] == "human"],
                "known": [e for e in entries if e["split"] == "test_voice" and e["kind"] == "question"],
                "operands": [e for e in entries if e["split"] == "test_operands"],
            }
            spoken = {e["text"]: e for e in reversed(entries) if e["kind"] == "answer"}
        except KeyError as error:
            raise ValueError(f"An entry of {self.manifest} has no {error.args[0]}.") from error
        empty = [name for name, members in found.items() if not members]
        if empty:
            raise ValueError(f"The corpus in {folder} has no held-out clips of {', '.join(empty)}.")
        self.voices, self.sentences = self._clips(found["voices"][:limit]), self._clips(found["sentences"][:limit])
        self.human = self._clips(found["human"][:limit])
        operands = found["operands"][: max(limit // 2, limit - len(found["known"]))]
        self.known, self.operands = self._clips(found["known"][: limit - len(operands)]), self._clips(operands)
        self.questions = [*self.known, *self.operands]
        self.sha256 = sha256_of(self.manifest)
        wanted = dict.fromkeys(clip.answer for clip in self.questions)
        self.answers = self._clips([spoken[answer] for answer in wanted if answer in spoken])

    def _clips(self, entries: list[dict[str, Any]]) -> list[TestClip]:
        clips = []
        for entry in entries:
            try:
                path = self.folder / entry["path"]
                # One file name each, also for ids of the form "digits/1".
                name = f"{entry['split']}-{entry['id']}".replace("/", "-")
                answer, duration = entry.get("answer", ""), float(entry["duration"])
                clips.append(TestClip(name, entry["text"], answer, entry["voice"], path, duration))
            except KeyError as error:
                raise ValueError(f"An entry of {self.manifest} has no {error.args[0]}.") from error
            if not path.is_file():
                raise ValueError(f"{path}, which {self.manifest} names, does not exist.")
        return clips


def checkpoint_identity(folder: Path) -> dict[str, Any]:
    """`sha256` of a checkpoint and of each of its `files`: weights, configs, tokenizer."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    files = {path.name: sha256_of(path) for path in names}
    digest = hashlib.sha256("".join(f"{name} {value}\n" for name, value in files.items()).encode()).hexdigest()
    return {"sha256": digest, "files": files}


class Outputs:
    """
    What a model made of each clip, kept as it comes.

    Args:
        folder: of one checkpoint and one group of settings; a folder for each task below it, with `items.jsonl` and WAV files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def items(self, task: str) -> dict[str, dict[str, Any]]:
        """id -> item of everything that is done."""
        path = self.folder / task / "items.jsonl"
        return {item["id"]: item for item in read_lines(path)} if path.is_file() else {}

    def missing(self, task: str, clips: Iterable[TestClip]) -> list[TestClip]:
        done = self.items(task)
        return [clip for clip in clips if clip.id not in done]

    def of(self, task: str, clips: Iterable[TestClip]) -> list[dict[str, Any]]:
        """The items of these clips, in order."""
        done = self.items(task)
        return [done[clip.id] for clip in clips]

    def complete(
        self, task: str, clips: Iterable[TestClip], size: int, step: Callable[[list[TestClip]], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Lets `step` make the items of the clips that are missing, `size` clips at once; the items of all clips, in order."""
        clips = list(clips)
        missing = self.missing(task, clips)
        with tqdm(total=len(missing), desc=task, unit="clip", disable=not missing) as bar:
            for batch in batches(missing, size):
                self.add(task, step(batch))
                bar.update(len(batch))
        return self.of(task, clips)

    def add(self, task: str, items: Iterable[dict[str, Any]]) -> None:
        path = self.folder / task / "items.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)

    def wav(self, task: str, clip_id: str) -> Path:
        return self.folder / task / f"{clip_id}.wav"

    def save_wav(self, task: str, clip_id: str, samples: np.ndarray, rate: int) -> None:
        """Writes `(samples,)` float32 as 16-bit WAV; what exceeds [-1, 1] is clipped."""
        path = self.wav(task, clip_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        soundfile.write(part, samples, rate, subtype="PCM_16", format="WAV")
        part.replace(path)


def batches(clips: list[TestClip], size: int) -> Iterator[list[TestClip]]:
    """Batches of clips of similar length, the longest first: what does not fit in memory shows at once."""
    ordered = sorted(clips, key=lambda clip: (-clip.duration, clip.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
