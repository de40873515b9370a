"""A figure of the evaluation, beside what it should reach, what the sources reach and what noise reaches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


_DIGITS = {"%": 1, "points": 1, "MOS": 2, "s": 2, "": 3}


def shown(value: float | None, unit: str) -> str:
    """A number as the card has it."""
    if value is None:
        return "none"
    number = f"{value:+.1f}" if unit == "points" else f"{value:.{_DIGITS[unit]}f}"
    return f"{number} {unit}" if unit in ("%", "points", "s") else number


@dataclass(frozen=True)
class Figure:
    """
    One row of the table.

    Args:
        task, measure: what is done, what is measured.
        value: in `unit`; None where nothing could be measured.
        unit: "%", "points" (of per cent), "MOS", "s", or "" for a bare number.
        n: how many recordings, texts or questions it is about.
        aim, met: what was to be reached in words, and whether it is; empty and None where nothing was.
        ceiling, floor: the same measure of something that is as good as can be, and of noise: name -> value, in `unit` but where the
            measure is an increase, whose source has a value in "%".
    """

    task: str
    measure: str
    value: float | None
    unit: str
    n: int
    aim: str = ""
    met: bool | None = None
    ceiling: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return asdict(self)

    def cells(self) -> list[str]:
        """What the card's table holds."""
        met = {True: "met", False: "**missed**", None: ""}[self.met]
        # Of an increase, the references are rates.
        unit = "%" if self.unit == "points" else self.unit
        references = (
            ", ".join(f"{name} {shown(value, unit)}" for name, value in side.items()) for side in (self.ceiling, self.floor)
        )
        return [self.task, self.measure, shown(self.value, self.unit), str(self.n), self.aim, met, *references]


def at_most(limit: float, unit: str, value: float | None) -> tuple[str, bool]:
    """Aim in words, and whether `value` reaches it; what could not be measured does not."""
    return f"≤ {_limit(limit, unit)}", value is not None and value <= limit


def at_least(limit: float, unit: str, value: float | None) -> tuple[str, bool]:
    """Aim in words, and whether `value` reaches it; what could not be measured does not."""
    return f"≥ {_limit(limit, unit)}", value is not None and value >= limit


def _limit(limit: float, unit: str) -> str:
    if unit == "points":
        return f"{limit:+g} points"
    return f"{limit:g} %" if unit == "%" else f"{limit:.1f}"


def falls(values: Sequence[float]) -> bool:
    """Whether each value is at most the one before."""
    return all(later <= earlier for earlier, later in zip(values, values[1:]))


COLUMNS = ("task", "measure", "figure", "n", "aim", "", "ceiling", "floor")


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table; a task's name stands in its first row only."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    previous = None
    for figure in figures:
        cells = figure.cells()
        if figure.task == previous:
            cells[0] = ""
        previous = figure.task
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
