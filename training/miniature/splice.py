"""Recordings that are taken apart between words and put together anew: nothing but the sound tells what comes next."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .reader import CodeReader


@dataclass(frozen=True)
class Word:
    """A word of a clip: how it is written, and its codes `(num_codebooks, frames)`."""

    text: str
    codes: torch.Tensor


def cut_into_words(reader: CodeReader, codes: torch.Tensor, ids: torch.Tensor, tokenizer) -> list[Word]:
    """
    A clip's words, cut half-way between where one's last token and the next one's first is read; none where the reader is mistaken.

    Args:
        codes (`(num_codebooks, frames)`), ids (`(tokens,)`): the clip and its transcript.
    """
    read = reader.read(codes)
    if [token for token, _ in read] != ids.tolist():
        return []
    words: list[list[tuple[int, int]]] = []
    for token, frame in read:
        if not words or tokenizer.decode([token]).startswith(" "):
            words.append([])
        words[-1].append((token, frame))
    cuts = [(before[-1][1] + after[0][1]) // 2 + 1 for before, after in zip(words, words[1:])]
    bounds = zip([0, *cuts], [*cuts, codes.shape[1]])
    texts = [tokenizer.decode([token for token, _ in word]).strip() for word in words]
    return [Word(text, codes[:, start:end]) for text, (start, end) in zip(texts, bounds)]


def splice(clips: list[list[Word]], task: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """
    Rows of runs of one to four words from clips drawn at random, three to twelve words in all.

    Args:
        clips: words of each. task: "asr" (to be transcribed) or "tts" (to be spoken). count: of rows.
    """
    rng = random.Random(f"{seed} splice {task}")
    for _ in range(count if clips else 0):
        words: list[Word] = []
        wanted = rng.randint(3, 12)
        while len(words) < wanted:
            clip = rng.choice(clips)
            start = rng.randrange(len(clip))
            words += clip[start : start + rng.choice((1, 1, 2, 2, 3, 4))]
        segments = [{"audio_codes": torch.cat([word.codes for word in words], dim=1).tolist()}]
        segments.insert(1 if task == "asr" else 0, {"text": " ".join(word.text for word in words)})
        yield {"task": task, "segments": segments}
