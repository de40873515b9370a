"""The numbers of the evaluation: word error rate, accuracy of answers, mel error, codebook usage, speaker similarity."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth".split()


def _ordinal(match: re.Match) -> str:
    """ "twenty first" -> "21st", which Whisper's normaliser leaves in two."""
    tens, ones = _TENS.index(match[1].lower()) + 2, _ORDINALS.index(match[2].lower()) + 1
    return f"{tens}{ones}{({1: 'st', 2: 'nd', 3: 'rd'}).get(ones, 'th')}"


# Recognisers write sums and times of day in symbols that Whisper's normaliser drops or joins to their neighbours.
_BEFORE = (
    (rf"(?i)\b({'|'.join(_TENS)})[ -]({'|'.join(_ORDINALS)})\b", _ordinal),
    (r"\b[A-Z]{2,}\b", lambda match: " ".join(match[0])),  # letters that were said one by one
    (r"\s*\+\s*", " plus "),
    (r"(?<=\d)\s*[×*x]\s*(?=\d)", " times "),
    (r"(?<=\d)\s*[-–−]\s+(?=\d)|(?<=\d)\s+[-–−]\s*(?=\d)", " minus "),
    (r"\s*=\s*", " is "),
    (r"\b(\d{1,2}):00\b", r"\1 o'clock"),
    (r"\b(\d{1,2}):(\d\d)\b", r"\1 \2"),
    (r"\b0(?=\d)", "0 "),  # the normaliser would drop the zero
)
_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_AFTER = (
    (r"\+(?=\d)", "plus "),  # the normaliser turns "plus 3" into "+3"
    (rf"\b({_MONTHS}) (\d+)(?:st|nd|rd|th)\b", r"\1 \2"),  # "March 2" is read "March second"
    (r"\bcan not\b", "cannot"),
    (r"\bone\b", "1"),  # it leaves this one number a word
    (r"(?<=\d)[.,](?=\d)", " "),
    (r"(?<=\d)(?=\d)", " "),
    (r"(?<!\S)\W+(?!\S)", " "),
)


class TextNormalizer:
    """
    Text -> words, for comparing what was said with what was understood: Whisper's normaliser (arXiv 2212.04356, appendix C), which
    writes numbers in digits and drops punctuation and case.

    Numbers are compared digit by digit, words in capitals letter by letter: however a recogniser groups the digits or letters that it
    heard ("5512", "55-12", "5 5 1 2"), they are the same. Before the normaliser, sums and times of day in symbols are written out
    ("2 + 3 = 5" as "two plus three is five").

    Args:
        spelling: British -> American spellings.
    """

    def __init__(self, spelling: dict[str, str]):
        self.normalize = EnglishTextNormalizer(spelling)

    def __call__(self, text: str) -> str:
        for pattern, replacement in _BEFORE:
            text = re.sub(pattern, replacement, text)
        text = self.normalize(text)
        for pattern, replacement in _AFTER:
            text = re.sub(pattern, replacement, text)
        return " ".join(text.split())


def readings(text: str) -> list[str]:
    """
    What was understood, and where it has numbers joined by a hyphen, the same as a range and as a difference: "5-8" is also "five to
    eight" and "five minus eight".
    """
    return list(dict.fromkeys([text, *(re.sub(r"(?<=\d)-(?=\d)", word, text) for word in (" to ", " minus "))]))


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Insertions, deletions and substitutions that turn one list of words into the other.

    Raises:
        ValueError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ValueError('The evaluation needs rapidfuzz: pip install "baichuan-audio[eval]".') from error
    return Levenshtein.distance(reference, hypothesis)


def word_error_rate(pairs: Iterable[tuple[str, str]], normalize: Callable[[str], str]) -> float:
    """
    Errors in all (reference, hypothesis) texts over words in all references: above 1 where much is made up. Of a hypothesis that can be
    read in several ways (`readings`), the better one counts.

    Raises:
        ValueError: references without a word.
    """
    errors = words = 0
    for reference, hypothesis in pairs:
        spoken = normalize(reference).split()
        errors += min(edit_distance(spoken, normalize(reading).split()) for reading in readings(hypothesis))
        words += len(spoken)
    if not words:
        raise ValueError("A word error rate needs references with words.")
    return errors / words


def accuracy(pairs: Iterable[tuple[str, str]], normalize: Callable[[str], str]) -> float:
    """
    Share of (expected, given) answers that are the same once normalised, spaces aside, in one of the given one's `readings`: 0 to 1.

    Raises:
        ValueError: no answers.
    """

    def bare(text: str) -> str:
        return normalize(text).replace(" ", "")

    right = [bare(expected) in map(bare, readings(given)) for expected, given in pairs]
    if not right:
        raise ValueError("An accuracy needs answers.")
    return sum(right) / len(right)


def mel_error(one: torch.Tensor, other: torch.Tensor) -> tuple[float, int]:
    """
    Mean absolute difference of two mels `(frames, mel_bins)` over the frames both have, and how many those are.

    Raises:
        ValueError: no common frame, or other mel bins.
    """
    frames = min(len(one), len(other))
    if not frames or one.shape[1:] != other.shape[1:]:
        raise ValueError(f"Mels of {tuple(one.shape)} and {tuple(other.shape)} have nothing to compare.")
    return float((one[:frames].float() - other[:frames].float()).abs().mean()), frames


def weighted_mean(values: Iterable[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs.

    Raises:
        ValueError: no weight.
    """
    pairs = list(values)
    total = sum(weight for _, weight in pairs)
    if not total:
        raise ValueError("A mean needs values.")
    return sum(value * weight for value, weight in pairs) / total


def codebook_usage(codes: np.ndarray, sizes: Sequence[int]) -> list[dict[str, float]]:
    """
    How well each codebook is used.

    Args:
        codes (`(num_codebooks, frames)`, int64): of many clips.
        sizes: entries of each codebook.

    Returns:
        Of each codebook `used`, the share of its entries that occur, and `perplexity`, the number of equally frequent entries that
        would carry as much: 1 to its size.
    """
    usage = []
    for row, size in zip(codes, sizes):
        counts = np.bincount(row, minlength=size).astype(np.float64)
        shares = counts[counts > 0] / counts.sum()
        usage.append({"used": float((counts > 0).mean()), "perplexity": float(np.exp(-(shares * np.log(shares)).sum()))})
    return usage


def similarity(one: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Cosine of two speaker embeddings; 0 where a recording has no voice (None)."""
    if one is None or other is None:
        return 0.0
    first, second = np.asarray(one), np.asarray(other)
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
