"""Everyday sentences and those of telephone menus with other words in them, for the model's own voice.

Where a kind has few words to put in ("Let us play football together."), it has few sentences, the tests hold back half of them, and
what is left is learnt by heart: the words around the gap are then spoken well after no others. Here they stand around many.
"""

import random
from collections.abc import Container
from types import SimpleNamespace

from . import facts
from .prompts import FEATURES, ONE, PLACES
from .sentences import Line, distinct, of_any_kind


_VERBS = "read write learn clean watch visit buy find open close wash carry sell draw paint fix move bring share keep".split()
_NOUNS = [*facts.THINGS, *facts.SPELLED]
_ADJECTIVES = [word for pair in facts.OPPOSITES[:-2] for word in pair]  # the last two pairs are no adjectives
_NAMED = [f"{whose} {noun}" for whose in ("the", "my", "our") for noun in _NOUNS]


def _beside(known: list[str], others: list[str]) -> list[str]:
    """Both, so that either is drawn as often as the other."""
    return known * max(1, len(others) // len(known)) + others


_WORDS = SimpleNamespace(
    **{name: value for name, value in vars(facts).items() if name.isupper()}
    | {
        "PEOPLE": _beside(facts.PEOPLE, [f"{whose} {who}" for whose in ("the", "my", "our") for who in facts.RELATIVES]),
        "RELATIVES": _beside(facts.RELATIVES, [*ONE, "king", "queen", "boy", "girl", "baby"]),
        "PLACES": _beside(facts.PLACES, [f"the {noun}" for noun in _NOUNS] + [f"the old {noun}" for noun in _NOUNS]),
        "THINGS": _beside(facts.THINGS, facts.SPELLED),
        "ADJECTIVES": _beside(facts.ADJECTIVES, _ADJECTIVES),
        "ACTIVITIES": _beside(facts.ACTIVITIES, [f"{verb} {named}" for verb in _VERBS for named in _NAMED]),
        "FOODS": _beside(facts.FOODS, [f"some {noun}" for noun in _NOUNS]),
        "DRINKS": _beside(facts.DRINKS, ["lemon water", "apple juice", "cold soup", *(f"a {noun}" for noun in _NOUNS)]),
        "WEATHER": _beside(facts.WEATHER, _ADJECTIVES),
        "MENU_ITEMS": _beside(facts.MENU_ITEMS, [*FEATURES, *PLACES]),
    }
)


def frames(count: int, tested: Container[str], seed: int = 0) -> list[Line]:
    """
    `count` distinct sentences of all kinds, each kind as often as it can be; a longer list from the same seed starts with the shorter.

    Args:
        tested: sentences that are not among them.
    """
    rng = random.Random(f"{seed} frames")

    def draw() -> Line:
        while True:
            text = of_any_kind(rng, _WORDS, ("menu", "daily"))
            if text not in tested:
                return Line(text, "frame")

    return distinct(draw, count)
