"""The closed English domain of the miniature model: grammars for sentences, and questions with their answers."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import facts


MOST_SENTENCES = 20_000  # more would be near copies of one another
SUMS = ("arithmetic", "comparison")  # categories of questions with a number for an answer; the others are small facts


@dataclass(frozen=True)
class Line:
    """
    Something to say.

    Args:
        text: as written; numbers are words.
        category: the grammar that it comes from.
        answer: what the model should answer, for questions.
        held_out: its operand pair is kept out of training, questions and answers. Of sums, differences and comparisons in either
            order; of products in one: the other order is taught, for nothing else would tell what seven times eight is.
    """

    text: str
    category: str
    answer: str = ""
    held_out: bool = False


def number(value: int) -> str:
    """0 to 9999 in English words.

    Raises:
        ValueError: outside of that.
    """
    if not 0 <= value <= 9999:
        raise ValueError(f"Numbers run from 0 to 9999, got {value}.")
    if value < 20:
        return facts.ONES[value]
    if value < 100:
        return facts.TENS[value // 10] + (f" {facts.ONES[value % 10]}" if value % 10 else "")
    name, size = ("thousand", 1000) if value >= 1000 else ("hundred", 100)
    return f"{number(value // size)} {name}" + (f" {number(value % size)}" if value % size else "")


def _is_held_out(operation: str, one: int, two: int) -> bool:
    """A fixed 12 % of the unordered operand pairs."""
    low, high = sorted((one, two))
    digest = hashlib.sha256(f"{operation} {low} {high}".encode()).digest()
    return digest[0] / 256 < 0.12


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def distinct(draw: Callable[[], Line], count: int) -> list[Line]:
    """`count` lines of different texts, as they are drawn."""
    found: dict[str, Line] = {}
    while len(found) < count:
        line = draw()
        found.setdefault(line.text, line)
    return list(found.values())


def _arithmetic() -> Iterator[Line]:
    problems = [("plus", a, b, a + b) for a in range(1, 13) for b in range(1, 13)]
    problems += [("minus", a, b, a - b) for a in range(1, 21) for b in range(1, min(a, 10) + 1)]
    problems += [("times", a, b, a * b) for a in range(1, 11) for b in range(1, 11)]
    for operation, a, b, result in problems:
        # Minus undoes plus: pairs are held out by the numbers that the sum has.
        pair = ("plus", b, a - b) if operation == "minus" else (operation, a, b)
        held_out = _is_held_out(*pair) and (operation != "times" or a < b)
        said = f"{number(a)} {operation} {number(b)}"
        answer = f"{capitalized(said)} is {number(result)}."
        for question in (f"What is {said}?", f"How much is {said}?"):
            yield Line(question, "arithmetic", answer, held_out)


WIDE = 100  # written sums have numbers below it
SPOKEN = 20  # most numbers of spoken sums are at most this


def _sum_lines(said: str, result: int) -> list[Line]:
    answer = f"{capitalized(said)} is {number(result)}."
    return [Line(f"{asked} {said}?", "arithmetic", answer) for asked in ("What is", "How much is")]


def wide_arithmetic() -> list[Line]:
    """
    Sums and differences of all numbers below 100, and products of those up to 20, but for the pairs that are held out: from the small
    table that is spoken, the LLM would learn the table by heart, not how to add. Small numbers, whose names follow no rule, four times.
    """
    lines = []
    for a in range(WIDE):
        for b in range(WIDE):
            times = 4 if max(a, b) <= SPOKEN else 1
            if not _is_held_out("plus", a, b):
                lines += _sum_lines(f"{number(a)} plus {number(b)}", a + b) * times
                lines += _sum_lines(f"{number(a + b)} minus {number(b)}", a) * times
            if min(a, b) > 0 and max(a, b) <= SPOKEN and (a > b or not _is_held_out("times", a, b)):
                lines += _sum_lines(f"{number(a)} times {number(b)}", a * b) * times
    return lines


def longer_sums(count: int, seed: int = 0) -> list[Line]:
    """Three numbers to be added, or two and one to be taken away: no step of them, nor its reverse, is of a pair that is held out."""
    rng, lines = random.Random(f"{seed} longer sums"), []
    while len(lines) < count:
        a, b, c = (rng.randint(1, rng.choice((10, 20, 40))) for _ in range(3))
        if rng.random() < 0.5:
            pairs, said, result = ((a, b), (b, c), (a + b, c)), f"plus {number(c)}", a + b + c
        else:
            pairs, said, result = ((a, b), (c, a + b - c)), f"minus {number(c)}", a + b - c
        if result >= 0 and not any(_is_held_out("plus", *pair) for pair in pairs):
            lines.append(_sum_lines(f"{number(a)} plus {number(b)} {said}", result)[0])
    return lines


def _comparison(a: int, b: int) -> Line:
    more = f"{capitalized(number(max(a, b)))} is bigger."
    return Line(f"Which is bigger, {number(a)} or {number(b)}?", "comparison", more, _is_held_out("bigger", a, b))


def _comparisons() -> Iterator[Line]:
    for a in range(1, 21):
        for b in range(1, 21):
            if a != b and (3 * a + 7 * b) % 4 == 0:
                yield _comparison(a, b)


def wide_comparisons() -> list[Line]:
    """Which of two numbers below 100 is bigger, but for held-out pairs: the few that are spoken would be learnt by heart."""
    lines = [_comparison(a, b) for a in range(1, WIDE) for b in range(1, WIDE) if a != b]
    return [line for line in lines if not line.held_out]


def _small_facts() -> Iterator[Line]:
    for country, capital in facts.CAPITALS.items():
        yield Line(f"What is the capital of {country}?", "capital", f"The capital of {country} is {capital}.")
    for pair in facts.OPPOSITES:
        for one, other in (pair, pair[::-1]):
            yield Line(f"What is the opposite of {one}?", "opposite", f"The opposite of {one} is {other}.")
    for thing, colour in facts.COLOURS.items():
        yield Line(f"What color is {thing}?", "color", f"{capitalized(thing)} is {colour}.")
    for animal, sound in facts.SOUNDS.items():
        yield Line(f"What does a {animal} say?", "animal", f"A {animal} says {sound}.")
    for animal, legs in facts.LEGS.items():
        yield Line(f"How many legs does {animal} have?", "animal", f"{capitalized(animal)} has {legs} legs.")
    for question, answer in facts.UNITS.items():
        yield Line(f"How many {question}?", "unit", f"There are {answer}.")


def _orders() -> Iterator[Line]:
    for names, what in ((facts.DAYS, "day"), (facts.MONTHS, "month")):
        for index, name in enumerate(names):
            after, before = names[(index + 1) % len(names)], names[index - 1]
            yield Line(f"What {what} comes after {name}?", what, f"{after} comes after {name}.")
            yield Line(f"What {what} comes before {name}?", what, f"{before} comes before {name}.")
    for value in range(1, 41):
        yield Line(
            f"What number comes after {number(value)}?",
            "number",
            f"{capitalized(number(value + 1))} comes after {number(value)}.",
        )
    for one, two in zip(facts.LETTERS, facts.LETTERS[1:]):
        yield Line(f"What letter comes after {one}?", "letter", f"{two} comes after {one}.")


def spelled(word: str) -> str:
    return ", ".join(word.upper())


def _spelling() -> Iterator[Line]:
    for word in facts.SPELLED:
        yield Line(f"How do you spell {word}?", "spelling", f"{capitalized(word)} is spelled {spelled(word)}.")


def questions() -> list[Line]:
    """Every question of the domain, with its answer, in a fixed order."""
    talk = [Line(text, "small talk", answer) for text, answer in facts.SMALL_TALK.items()]
    return [*_arithmetic(), *_comparisons(), *_small_facts(), *_orders(), *_spelling(), *talk]


# Sentences: one function a grammar, each drawing one sentence, those of several kinds from tables of `facts` or others of their names.


def clock_time(rng: random.Random) -> str:
    hour = number(rng.randint(1, 12))
    return rng.choice(
        [
            f"{hour} o'clock",
            f"half past {hour}",
            f"a quarter past {hour}",
            f"a quarter to {hour}",
            f"{number(rng.choice([5, 10, 20, 25]))} past {hour}",
            f"{number(rng.choice([5, 10, 20, 25]))} to {hour}",
            f"{hour} {number(rng.randint(11, 59))}",
        ]
    )


def date(rng: random.Random) -> str:
    return f"{rng.choice(facts.MONTHS)} {rng.choice(facts.ORDINALS)}"


def _time_sentence(rng, words=facts):
    place, day = rng.choice(words.PLACES), rng.choice(words.DAYS)
    return rng.choice(
        [
            f"It is {clock_time(rng)}.",
            f"The train leaves at {clock_time(rng)}.",
            f"The meeting starts at {clock_time(rng)} on {day}.",
            f"Please be at {place} at {clock_time(rng)}.",
            f"We will meet at {place} at {clock_time(rng)}.",
            f"The bus to {place} comes at {clock_time(rng)}.",
            f"Breakfast is served until {clock_time(rng)}.",
            f"I woke up at {clock_time(rng)} this morning.",
        ]
    )


def _date_sentence(rng, words=facts):
    person = rng.choice(words.PEOPLE)
    return rng.choice(
        [
            f"Today is {rng.choice(words.DAYS)}, {date(rng)}.",
            f"{person} was born on {date(rng)}.",
            f"The holiday begins on {date(rng)}.",
            f"My birthday is on {date(rng)}.",
            f"The office is closed on {date(rng)}.",
            f"{person} will arrive on {rng.choice(words.DAYS)}, {date(rng)}.",
            f"The concert is on {date(rng)} at {clock_time(rng)}.",
        ]
    )


def _number_sentence(rng, words=facts):
    digits = " ".join(words.ONES[rng.randint(0, 9)] for _ in range(rng.randint(3, 6)))
    count, thing, person = number(rng.randint(2, 99)), rng.choice(words.THINGS), rng.choice(words.PEOPLE)
    return rng.choice(
        [
            f"The number is {digits}.",
            f"My telephone number is {digits}.",
            f"The code is {digits}.",
            f"This {thing} costs {number(rng.randint(2, 999))} dollars.",
            f"{person} is {number(rng.randint(2, 99))} years old.",
            f"There are {count} people in {rng.choice(words.PLACES)}.",
            f"Please open page {number(rng.randint(1, 300))}.",
            f"I live at number {number(rng.randint(1, 200))}.",
            f"We need {count} more minutes.",
            f"The answer is {number(rng.randint(0, 200))}.",
            f"He counted {number(rng.randint(100, 9999))} steps.",
        ]
    )


def _spelling_sentence(rng):
    word = rng.choice([*facts.SPELLED, *facts.PEOPLE])
    return rng.choice([f"{capitalized(word)} is spelled {spelled(word)}.", f"My name is {word}, {spelled(word)}."])


def _menu_sentence(rng, words=facts):
    key, item, digit = rng.choice(words.ONES[:10]), rng.choice(words.MENU_ITEMS), number(rng.randint(1, 20))
    return rng.choice(
        [
            f"For {item}, press {key}.",
            f"To reach {item}, press {key}.",
            f"To hear {item} again, press {key}.",
            f"Please press {key} for {item}.",
            "Please hold the line while we connect your call.",
            "All of our lines are busy at the moment.",
            f"You are caller number {digit}.",
            f"You have {digit} new messages.",
            f"You have {digit} old messages and {number(rng.randint(1, 9))} new messages.",
            "Please leave a message after the tone.",
            "Please enter your password, then press the pound key.",
            "Please enter your account number followed by the star key.",
            "The number you have dialed is not in service.",
            f"Your call will be answered in {digit} minutes.",
            "The person you are calling is not available.",
            "Your message has been saved.",
            "Your message has been deleted.",
            f"To delete this message, press {key}.",
            f"To save this message, press {key}.",
            "That was not a valid entry. Please try again.",
            f"To return to the main menu, press {key}.",
            "Thank you for calling. Goodbye.",
            "This call may be recorded.",
            f"Extension {' '.join(words.ONES[rng.randint(0, 9)] for _ in range(3))} is busy.",
            "There is no one else in the conference.",
            f"There are {digit} people in the conference.",
            "You are now leaving the conference.",
        ]
    )


def _daily_sentence(rng, words=facts):
    person, other = rng.sample(words.PEOPLE, 2)
    relative, place = rng.choice(words.RELATIVES), rng.choice(words.PLACES)
    thing, adjective = rng.choice(words.THINGS), rng.choice(words.ADJECTIVES)
    article = "an" if adjective[0] in "aeiou" else "a"
    activity, day = rng.choice(words.ACTIVITIES), rng.choice(words.DAYS)
    return rng.choice(
        [
            f"My {relative} bought {article} {adjective} {thing} at {place}.",
            f"{person} put the {thing} in the {adjective} {rng.choice(['box', 'bag', 'car', 'basket'])}.",
            f"I would like {rng.choice(words.FOODS)} and {rng.choice(words.DRINKS)}, please.",
            f"{person} and {other} want to {activity} on {day}.",
            f"The {thing} on the table is {adjective}.",
            f"Can you bring me the {adjective} {thing}?",
            f"It will be {rng.choice(words.WEATHER)} on {day}.",
            f"It was {rng.choice(words.WEATHER)} and {rng.choice(words.WEATHER)} in the morning.",
            f"My {relative} works at {place}.",
            f"{person} gave the {thing} to {other}.",
            f"We usually {activity} in the evening.",
            f"Where did you find that {adjective} {thing}?",
            f"The {relative} of {person} lives near {place}.",
            f"I forgot my {thing} at {place}.",
            f"{person} drinks {rng.choice(words.DRINKS)} every {day}.",
            f"Turn left after {place} and go straight on.",
            f"Let us {activity} together.",
            f"She lost her {adjective} {thing} near {place}.",
            f"Do you want to {activity} with {person}?",
            f"This {thing} belongs to my {relative}.",
        ]
    )


GRAMMARS: dict[str, tuple[Callable[..., str], float]] = {
    "time": (_time_sentence, 0.14),
    "date": (_date_sentence, 0.12),
    "number": (_number_sentence, 0.2),
    "spelling": (_spelling_sentence, 0.06),
    "menu": (_menu_sentence, 0.12),
    "daily": (_daily_sentence, 0.36),
}


# As many as each grammar has kinds of sentences. Spelled words are among the phrases.
KINDS = {"time": 8, "date": 7, "number": 11, "menu": 27, "daily": 20}


def of_any_kind(rng: random.Random, words: Any = facts, names: Sequence[str] = tuple(KINDS)) -> str:
    """A sentence of these grammars, of all kinds equally often, with the words of these tables."""
    grammar, _ = GRAMMARS[rng.choices(names, [KINDS[name] for name in names])[0]]
    return capitalized(grammar(rng, words))


def sentences(count: int, seed: int = 0) -> list[Line]:
    """
    `count` distinct sentences; a longer list from the same seed starts with the shorter one.

    Raises:
        ValueError: more than the grammars can reasonably give.
    """
    if not 0 <= count <= MOST_SENTENCES:
        raise ValueError(f"`count` must be 0 to {MOST_SENTENCES}, got {count}.")
    rng = random.Random(seed)
    names, weights = list(GRAMMARS), [weight for _, weight in GRAMMARS.values()]

    def draw() -> Line:
        name = rng.choices(names, weights)[0]
        return Line(capitalized(GRAMMARS[name][0](rng)), name)

    return distinct(draw, count)
