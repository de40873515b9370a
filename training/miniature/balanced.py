"""Lines that say the words of the domain about equally often, for the model's own voice.

Grammars say their small kinds of sentences, and the words of answers, hardly ever beside their large ones; and what was hardly ever
heard is neither spoken well by the LLM nor decoded well from its codes.
"""

import random
from collections import Counter
from collections.abc import Container, Iterable
from functools import cache

from . import facts
from .phrases import phrase
from .sentences import MOST_SENTENCES, Line, capitalized, distinct, of_any_kind, questions, sentences


TRIED = 16  # lines that are drawn for one that is kept
_NAMES = {
    *("I", *facts.PEOPLE, *facts.DAYS, *facts.MONTHS, *facts.LETTERS),
    *(word for pair in facts.CAPITALS.items() for name in pair for word in name.split()),
}


def words(text: str) -> list[str]:
    """A line's words as they are written inside of a sentence."""
    found, opening = [], True
    for word in text.split():
        bare = word.strip(".,?!")
        found.append(bare.lower() if opening and bare.removesuffix("'s") not in _NAMES else bare)
        opening = word[-1] in ".?!"
    return found


@cache  # plans without these lines ask for it too
def vocabulary() -> tuple[str, ...]:
    """Every word of the domain's sentences and answers, in order."""
    texts = [line.text for line in sentences(MOST_SENTENCES)] + [line.answer for line in questions()]
    return tuple(sorted({word for text in texts for word in words(text)} - {""}))


def balanced(count: int, said: Iterable[str], tested: Container[str], seed: int = 0) -> list[Line]:
    """
    `count` distinct lines, each of two or three parts of other lines or of single words: of some that are drawn the one whose words
    were said least so far, as sentences are chosen for speech corpora. A longer list from the same seed starts with the shorter one.

    Args:
        said: what is said otherwise.
        tested: sentences of which no part is taken.
    """
    rng = random.Random(f"{seed} balanced")
    known, answers = vocabulary(), sorted({line.answer for line in questions() if not line.held_out})
    said_often = Counter(word for text in said for word in set(words(text)))

    def sentence() -> str:
        while True:
            text = of_any_kind(rng)
            if text not in tested:
                return text

    def part() -> list[str]:
        kind = rng.random()
        if kind < 0.25:
            return rng.choices(known, k=rng.randint(1, 2))
        found = words(sentence() if kind < 0.65 else rng.choice(answers) if kind < 0.9 else phrase(rng))
        length = rng.randint(2, 5)
        start = rng.randrange(max(len(found) - length, 0) + 1)
        return found[start : start + length]

    def rarity(line: list[str]) -> float:
        return sum(1 / (1 + said_often[word]) for word in set(line)) / len(line) ** 0.5

    def draw() -> Line:
        tried = [[word for _ in range(rng.randint(2, 3)) for word in part()] for _ in range(TRIED)]
        chosen = max(tried, key=rarity)
        said_often.update(set(chosen))
        return Line(capitalized(" ".join(chosen)) + ".", "balanced")

    return distinct(draw, count)
