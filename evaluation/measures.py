"""What the judges make of recordings, as the figures of a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

from .clips import TestClip
from .judges import Judges
from .scores import accuracy, similarity, weighted_mean, word_error_rate


LISTENER = "whisper-base"  # whoever else transcribes, this one judges


class Measures:
    """
    Figures about recordings.

    Args:
        judges: asked, or read from their cache.
        normalize: text -> words, for every comparison of texts.
    """

    def __init__(self, judges: Judges, normalize: Callable[[str], str]):
        self.judges, self.normalize = judges, normalize

    def heard(self, paths: Sequence[Path], listener: str = LISTENER) -> list[str]:
        """What a recogniser writes down of each."""
        return [verdict[listener] for verdict in self.judges.measure(paths, [listener])]

    def word_error_rate(self, clips: Sequence[TestClip], texts: Sequence[str]) -> float:
        """Of what was written down against what was said, in %."""
        return 100 * word_error_rate(((clip.text, text) for clip, text in zip(clips, texts)), self.normalize)

    def heard_error_rate(self, clips: Sequence[TestClip], paths: Sequence[Path] | None = None, listener: str = LISTENER) -> float:
        """Word error rate, in %, of a recogniser on recordings of the clips' texts: the clips' own by default."""
        return self.word_error_rate(clips, self.heard(own_paths(clips) if paths is None else paths, listener))

    def accuracy(self, clips: Sequence[TestClip], answers: Sequence[str]) -> float:
        """Share of answers that are the clips', in %."""
        return 100 * accuracy(((clip.answer, answer) for clip, answer in zip(clips, answers)), self.normalize)

    def heard_accuracy(self, clips: Sequence[TestClip], paths: Sequence[Path]) -> float:
        """Share of recordings of the clips' texts that are understood without an error, in %."""
        return 100 * accuracy(((clip.text, text) for clip, text in zip(clips, self.heard(paths))), self.normalize)

    def quality(self, paths: Sequence[Path]) -> float:
        """Mean DistillMOS."""
        return mean([verdict["mos"] for verdict in self.judges.measure(paths, ["mos"])])

    def similarity(self, paths: Sequence[Path], others: Sequence[Path]) -> float:
        """Mean cosine of the speaker embeddings of pairs of recordings."""
        sides = [[verdict["speaker"] for verdict in self.judges.measure(side, ["speaker"])] for side in (paths, others)]
        return mean([similarity(one, other) for one, other in zip(*sides)])

    def same_voice(self, clips: Sequence[TestClip]) -> float | None:
        """Mean cosine of each recording and another by the same voice; None where there are no two."""
        by_voice: dict[str, list[Path]] = {}
        for clip in clips:
            by_voice.setdefault(clip.voice, []).append(clip.path)
        pairs = [pair for paths in by_voice.values() if len(paths) > 1 for pair in zip(paths, [*paths[1:], paths[0]])]
        return self.similarity(*zip(*pairs)) if pairs else None


def own_paths(clips: Sequence[TestClip]) -> list[Path]:
    """The clips' recordings."""
    return [clip.path for clip in clips]


def mean(values: Sequence[float]) -> float:
    return weighted_mean((value, 1.0) for value in values)
