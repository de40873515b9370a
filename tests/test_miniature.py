"""The checkpoint that the package carries does what it says: it hears, speaks and answers."""

import re
from pathlib import Path

import pytest
import soundfile
from test_cli import run

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import find_checkpoint


FOLDER = find_checkpoint("miniature")
EXAMPLES = Path(__file__).parent.parent / "examples"
# Recordings of voices that it was not trained on, and what they say.
SAID = dict(
    re.findall(r"^\| `(question[-0-9]*\.wav)` \| (.+?) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
)


def test_sizes_and_parts():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    assert max(path.stat().st_size for path in files) < 25e6
    model, info = BaichuanAudioForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.flow_matching is not None and model.vocoder is not None and model.audio_head is not None


def test_transcribes_three_recordings_exactly():
    assert len(SAID) == 3
    result = run("transcribe", *(EXAMPLES / name for name in SAID))
    assert result.stdout.splitlines() == [f"{EXAMPLES / name}\t{text}" for name, text in SAID.items()]


def test_understands_what_it_says(tmp_path):
    text = "What is four times two?"
    run("speak", text, "-o", tmp_path / "said.wav")
    assert run("transcribe", tmp_path / "said.wav").stdout.strip() == text


def test_answers_in_words_and_in_sound(tmp_path):
    result = run("reply", EXAMPLES / "question.wav", "-o", tmp_path / "answer.wav")
    (answer,) = re.findall(r"^text: (.+)$", result.stdout, re.MULTILINE)
    assert answer == re.search(r"answers: “(.+?)”", (EXAMPLES / "README.md").read_text(encoding="utf-8"))[1]
    waveform, rate = soundfile.read(tmp_path / "answer.wav")
    assert rate == 24_000 and len(waveform) > rate / 2


@pytest.mark.parametrize("name", ["answer.wav", "answer.png"])
def test_examples_are_there(name):
    assert (EXAMPLES / name).stat().st_size > 10_000
