"""Phrases of the domain in ever new order, and spelled words: what the model's own voice says to have said every word in many places.

Sentences of small kinds ("We usually read a book in the evening.") are few, whoever learns them by heart says nothing else. Here their
words come after others. Words that questions are answered with come more often than the rest.
"""

import random
from collections.abc import Callable

from . import facts
from .prompts import WORDS
from .sentences import Line, capitalized, clock_time, date, distinct, number, spelled


# What is spelled in questions and in tested sentences is spelled there alone.
SPELLABLE = [
    word for word in dict.fromkeys([*WORDS, *facts.THINGS, *facts.RELATIVES]) if word not in facts.SPELLED and 2 < len(word) < 8
]
ANSWERED = [
    *facts.CAPITALS,
    *facts.CAPITALS.values(),
    *(word for pair in facts.OPPOSITES for word in pair),
    *facts.COLOURS,
    *facts.COLOURS.values(),
    *facts.SOUNDS,
    *facts.SOUNDS.values(),
    *facts.LEGS,
    *facts.LETTERS,
    *facts.DAYS,
    *facts.MONTHS,
]


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(facts.ADJECTIVES)} {rng.choice(facts.THINGS)}"


def _one(*names: str) -> Callable[[random.Random], str]:
    words = [word for name in names for word in getattr(facts, name)]
    return lambda rng: rng.choice(words)


_person, _relative, _place, _activity = _one("PEOPLE"), _one("RELATIVES"), _one("PLACES"), _one("ACTIVITIES")
_food, _weather, _item = _one("FOODS", "DRINKS"), _one("WEATHER"), _one("MENU_ITEMS")


def _answered(rng: random.Random) -> str:
    return rng.choice(ANSWERED)


def phrase(rng: random.Random) -> str:
    """A few words as they may stand in a sentence."""
    count = number(rng.randint(2, 99))
    return rng.choice(
        [
            f"the {_thing(rng)}",
            f"my {_relative(rng)}'s {_thing(rng)}",
            f"{_person(rng)}'s {rng.choice(facts.THINGS)}",
            f"near {_place(rng)}",
            f"in front of {_place(rng)}",
            f"from {_place(rng)} to {_place(rng)}",
            f"we {_activity(rng)}",
            f"they {_activity(rng)} with {_person(rng)}",
            f"{_person(rng)} and my {_relative(rng)}",
            f"the {_relative(rng)} of {_person(rng)}",
            f"{_food(rng)} or {_food(rng)}",
            f"some {_weather(rng)} days",
            f"{_weather(rng)} and {_weather(rng)} on {rng.choice(facts.DAYS)}",
            f"at {clock_time(rng)}",
            f"on {date(rng)}",
            f"{count} {rng.choice(facts.THINGS)}s",
            f"{count} minutes in the evening",
            f"press {number(rng.randint(0, 9))} for {_item(rng)}",
            f"{_item(rng)} or {_item(rng)}",
            f"usually in the {rng.choice(('morning', 'evening'))}",
            f"a {rng.choice(WORDS)} with a {rng.choice(WORDS)}",
            f"the {rng.choice(WORDS)} of the {rng.choice(WORDS)}",
            f"{_answered(rng)} and {_answered(rng)}",
            f"{_answered(rng)} comes after {_answered(rng)}",
            f"{_answered(rng)} is {_answered(rng)}",
            f"the opposite of {_answered(rng)}",
            f"the capital of {_answered(rng)}",
        ]
    )


def _list(rng: random.Random) -> str:
    mark = rng.choice((",", "", ""))
    return f"{mark} ".join(phrase(rng) for _ in range(rng.randint(2, 3)))


def _spelling(rng: random.Random) -> str:
    word = rng.choice(SPELLABLE)
    return rng.choice((f"{word} is spelled {spelled(word)}", f"my name is {word}, {spelled(word)}"))


def _letters(rng: random.Random) -> str:
    return ", ".join(rng.choice(facts.LETTERS) for _ in range(rng.randint(3, 6)))


def phrases(count: int, seed: int = 0) -> list[Line]:
    """`count` distinct lines, one of four of them letters; a longer list from the same seed starts with the shorter one."""
    rng = random.Random(f"{seed} phrases")

    def draw() -> Line:
        return Line(capitalized(rng.choices((_list, _spelling, _letters), (0.75, 0.17, 0.08))[0](rng)) + ".", "phrase")

    return distinct(draw, count)
