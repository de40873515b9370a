"""`baichuan-audio eval` from end to end, on an untrained checkpoint and a toy corpus."""

import json

import pytest
from evaluation_corpus import ENTRIES
from typer.testing import CliRunner

from modeling_baichuan_audio.cli import app
from modeling_baichuan_audio.evaluation import miniature, rows, subject
from modeling_baichuan_audio.evaluation.card import END, START


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("LONGEST_TRANSCRIPT", "LONGEST_ANSWER", "LONGEST_PIECE"):
        monkeypatch.setattr(subject, name, 5)
    monkeypatch.setattr(subject, "_LONGEST_REPLY", 20)
    monkeypatch.setattr(rows, "TIMED", 1)


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.md"
    path.write_text(f"# Card\n\n{START}\n{END}\n\n## Limits\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(tiny_folder, corpus, fake_judges, card, tmp_path):
    options = {"checkpoint": tiny_folder, "corpus": corpus, "judges": fake_judges.folder, "work": tmp_path / "work", "limit": 2}
    options |= {"card": card, "json": tmp_path / "results.json", "two-stage": tiny_folder, "single-stage": tiny_folder}
    return options


def run(options, code=0):
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["eval", "miniature", *arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def perfectly_heard():
    return {f"{entry[2].replace('/', '-')}.wav": entry[3] for entry in ENTRIES}


def test_end_to_end(arguments, fake_judges, card, tmp_path, monkeypatch):
    fake_judges.says(perfectly_heard() | {"v2.wav": "The color is blue."}, otherwise="hm")
    result = run(arguments)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    figures = {(row["task"], row["measure"]): row for row in results["figures"]}
    assert f"{len(figures)} figures" in result.stdout and len(figures) == len(results["figures"])

    # Of the two sentences by held-out voices, 9 words ("it is 3 o'clock" is 5), one judge mishears one word, the other all.
    heard = figures["transcribe: held-out voices, in domain", "WER"]
    assert heard["ceiling"] == {"Whisper base": pytest.approx(100 / 9), "Whisper tiny.en": 100.0} and heard["n"] == 2
    assert heard["value"] > 8 and heard["met"] is False and heard["aim"] == "≤ 8 %" and heard["floor"]["noise"] > 0
    for title in ("codes → mel decoder → vocoder", "codes → mel decoder → flow matching → vocoder"):
        task = f"resynthesise: {title}"
        assert figures[task, "WER"]["value"] == 100 and figures[task, "WER"]["ceiling"] == {
            "source": pytest.approx(100 / 9),
            "human": 0.0,
        }
        assert figures[task, "WER increase over the source"]["value"] == pytest.approx(800 / 9)
        marks = figures[task, "DistillMOS"]
        assert (marks["value"], marks["met"], marks["ceiling"]["human"], marks["floor"]["noise"]) == (1.5, False, 4.5, 1.5)
        alike = figures[task, "speaker similarity"]
        assert alike["value"] == pytest.approx(0.6) and alike["floor"]["noise"] == pytest.approx(0.6)
        assert alike["ceiling"]["same voice, other sentence"] == pytest.approx(1.0)
    assert figures["resynthesise: the source's mel → vocoder", "DistillMOS"]["met"] is None
    task = "resynthesise from the first codebooks"
    assert [figures[task, f"WER, {count} codebooks"]["met"] for count in (4, 6, 8)] == [True] * 3
    errors = [figures[task, f"mel MAE (16 kHz mel), {count}"]["value"] for count in ("1 codebook", "8 codebooks")]
    assert errors[1] == figures["resynthesise: codes → mel decoder → vocoder", "mel MAE (16 kHz mel)"]["value"] != errors[0]
    assert figures["speak held-out sentences", "WER"]["value"] == 100
    aloud = figures["spoken question → spoken answer", "accuracy"]
    assert (aloud["value"], aloud["met"], aloud["ceiling"], aloud["floor"]) == (
        0.0,
        False,
        {"recorded answers (n 1)": 100.0},
        {"noise": 0.0},
    )
    assert figures["spoken question → text answer", "accuracy, held-out operands"]["n"] == 1
    written = figures["written question → text answer", "accuracy: stages 1 and 2"]
    assert written["aim"] == "loses less than a single stage" and written["met"] is False and written["n"] == 20
    assert figures["speed on this machine, one at a time", "real-time factor of resynthesis (median)"]["value"] > 0
    assert [row["entries"] for row in results["codebooks"]] == [64, 32, 16, 16, 16, 16, 16, 16]
    assert results["corpus"]["clips"]["questions"] == 2 and results["machine"]["torch"]

    text = card.read_text(encoding="utf-8")
    assert text.startswith(f"# Card\n\n{START}\n") and text.endswith(f"{END}\n\n## Limits\n")
    assert (
        "| speak held-out sentences | WER | 100.0 % | 2 | ≤ 15 % | **missed** | source 0.0 %, human 0.0 % | noise 100.0 % |"
        in text
    )
    aims = [row["met"] for row in results["figures"] if row["met"] is not None]
    assert f"{sum(aims)} of {len(aims)} aims are met." in text

    # Again: nothing is generated, nobody is asked, and the results are the same.
    asked = len(fake_judges.asked())
    monkeypatch.setattr(subject.Subject, "write", None)
    monkeypatch.setattr(subject.Subject, "reply", None)
    run(arguments)
    assert len(fake_judges.asked()) == asked
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results

    # The other checkpoints need not be kept: their answers, to written questions, are in the results, whatever corpus those are of.
    (tmp_path / "earlier.json").write_text(json.dumps(results | {"corpus": {}}), encoding="utf-8")
    options = {name: value for name, value in arguments.items() if name not in ("two-stage", "single-stage")}
    options["json"] = tmp_path / "later.json"
    run(options | {"earlier": tmp_path / "earlier.json"})
    assert json.loads((tmp_path / "later.json").read_text(encoding="utf-8")) == results
    run(options)
    without = json.loads((tmp_path / "later.json").read_text(encoding="utf-8"))
    assert not without["comparisons"] and len(without["figures"]) == len(results["figures"]) - 6
    options["seed"] = 1
    assert "cannot be compared with: they have another settings." in run(options | {"earlier": arguments["json"]}, code=2).stderr


def test_goes_on_after_the_judges_failed(arguments, fake_judges, card, tmp_path):
    before = card.read_text(encoding="utf-8")
    fake_judges.says(perfectly_heard(), broken="s2.wav")
    assert "baichuan-audio: The judges stopped after" in run(arguments, code=2).stderr
    assert card.read_text(encoding="utf-8") == before and not (tmp_path / "results.json").exists()
    asked = fake_judges.asked()
    fake_judges.says(perfectly_heard())
    run(arguments)
    # The file that failed was not written down as asked; nothing was asked twice.
    tries = [name.split()[0] for name in fake_judges.asked()]
    assert 0 < len(asked) < len(tries) and tries.count("s1.wav") == tries.count("s2.wav") == 1


def test_questions_in_writing():
    known, held_out = miniature.written_questions(50)
    assert len(known) == len(held_out) == 50 and len({clip.id for clip in [*known, *held_out]}) == 100
    lines = {line.text: line for line in miniature.questions()}
    assert not any(lines[clip.text].held_out for clip in known) and all(lines[clip.text].held_out for clip in held_out)
    assert all(lines[clip.text].answer == clip.answer for clip in [*known, *held_out])
    # Evenly spread: of most kinds of questions, some.
    assert len({lines[clip.text].category for clip in known}) > 6
    everything = miniature.written_questions(10**6)
    assert sum(map(len, everything)) == len(miniature.questions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"card": "{tmp}/none.md"}, "none.md does not exist"),
        ({"json": "{tmp}/nowhere/results.json"}, "The folder of {tmp}/nowhere/results.json does not exist"),
        ({"checkpoint": "{tmp}/nowhere"}, "nowhere is neither a folder nor"),
        ({"checkpoint": "{tmp}"}, "{tmp} has no config.json"),
        ({"two-stage": "{tmp}/nowhere"}, "nowhere is neither a folder nor"),
        ({"earlier": "{tmp}/none.json"}, "none.json holds no results of `eval miniature`: FileNotFoundError"),
        ({"earlier": "{tmp}/card.md"}, "card.md holds no results of `eval miniature`: JSONDecodeError"),
        ({"corpus": "{tmp}"}, "has no manifest.jsonl"),
        ({"judges": "{tmp}"}, "holds no judges"),
    ],
)
def test_bad_input_is_one_line_before_the_work_begins(arguments, tmp_path, changes, message):
    changes = {name: value.format(tmp=tmp_path) for name, value in changes.items()}
    result = run(arguments | changes, code=2)
    assert message.format(tmp=tmp_path) in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "work").exists()


def test_a_card_without_markers(arguments, card, tmp_path):
    card.write_text("# Card\n")
    assert "needs the line <!-- evaluation:start -->" in run(arguments, code=2).stderr
    assert not (tmp_path / "work").exists()


def test_judges_command(tmp_path, monkeypatch):
    from modeling_baichuan_audio.evaluation import judges

    monkeypatch.setattr(judges, "fetch_judges", lambda folder: folder)
    result = CliRunner().invoke(app, ["eval", "judges", str(tmp_path)])
    assert result.exit_code == 0 and result.stdout == f"{tmp_path}: ready\n"

    def refuse(folder):
        raise ValueError("pip could not get it")

    monkeypatch.setattr(judges, "fetch_judges", refuse)
    result = CliRunner().invoke(app, ["eval", "judges", str(tmp_path)])
    assert result.exit_code == 2 and result.stderr == "baichuan-audio: pip could not get it\n"
