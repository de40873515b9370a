import json
import stat

import pytest

from modeling_baichuan_audio.evaluation.card import END, START, split_card, write_card, write_json


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "model_card.md"
    path.write_text(f"# Card\n\n{START}\nold figures\n{END}\n\n## Limits\n", encoding="utf-8")
    return path


def test_only_what_stands_between_the_markers_changes(card):
    card.chmod(0o640)
    write_card(card, "| a | ≤ 8 % |\n")
    expected = f"# Card\n\n{START}\n\n| a | ≤ 8 % |\n\n{END}\n\n## Limits\n"
    assert card.read_text(encoding="utf-8") == expected
    write_card(card, "| a | ≤ 8 % |\n")
    assert card.read_text(encoding="utf-8") == expected and stat.S_IMODE(card.stat().st_mode) == 0o640
    assert [path.name for path in card.parent.iterdir()] == ["model_card.md"]


@pytest.mark.parametrize("text", ["", START, END, f"{END}\n{START}", f"{START}{END}{START}{END}", f"{START}{START}{END}"])
def test_a_card_without_its_markers_is_left_alone(card, text):
    card.write_text(text)
    for refuse in (split_card, lambda path: write_card(path, "new")):
        with pytest.raises(ValueError, match="needs the line <!-- evaluation:start --> and after it the line"):
            refuse(card)
    assert card.read_text() == text


def test_no_card(tmp_path):
    with pytest.raises(ValueError, match="nowhere.md does not exist"):
        split_card(tmp_path / "nowhere.md")


def test_json(tmp_path):
    write_json(tmp_path / "results.json", {"b": "≤", "a": [1.5, None]})
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "≤" in text and list(json.loads(text)) == ["b", "a"]
