"""The results' places: a part of the model card between two markers, and a JSON file."""

import json
from pathlib import Path
from typing import Any

from ..conversion.files import replace_text


START, END = "<!-- evaluation:start -->", "<!-- evaluation:end -->"


def split_card(path: Path) -> tuple[str, str]:
    """
    What stands before and after the part between the markers, without the markers.

    Raises:
        ValueError: no card, or not exactly one part between the markers.
    """
    if not path.is_file():
        raise ValueError(f"The model card {path} does not exist.")
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{path} needs the line {START} and after it the line {END}, once each: the results go between them.")
    before, rest = text.split(START)
    return before, rest.split(END)[1]


def write_card(path: Path, part: str) -> None:
    """
    Replaces what stands between the markers.

    Raises:
        ValueError: as in `split_card`.
    """
    before, after = split_card(path)
    replace_text(path, f"{before}{START}\n\n{part.strip()}\n\n{END}{after}")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes the results, readable and in the order they came."""
    replace_text(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
