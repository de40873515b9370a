import json

import numpy as np
import pytest
import soundfile
from evaluation_corpus import ENTRIES, write_corpus

from modeling_baichuan_audio.evaluation.clips import Outputs, TestClip, TestSets, batches, checkpoint_identity


def clip(name: str, duration: float = 1.0) -> TestClip:
    return TestClip(name, "text", "", "ann", f"{name}.wav", duration)


def names(clips) -> list[str]:
    return [item.id for item in clips]


def test_the_sets_of_a_corpus(corpus):
    sets = TestSets(corpus, 120)
    assert names(sets.voices) == ["test_voice-v1", "test_voice-v2", "test_voice-v3"]
    assert names(sets.sentences) == ["test_sentence-s1", "test_sentence-s2"]
    assert names(sets.human) == ["human-digits-1", "human-menu"]
    assert names(sets.known) == ["test_voice-q1", "test_voice-q2", "test_voice-q3"]
    assert names(sets.operands) == ["test_operands-o1", "test_operands-o2"]
    assert sets.questions == [*sets.known, *sets.operands]
    # Of the recorded answers, those that are asked for.
    assert [item.text for item in sets.answers] == ["Two plus three is five.", "A cat says meow."]
    first = sets.voices[0]
    assert (first.text, first.voice, first.path, first.duration) == (
        "It is three o'clock.",
        "ann",
        corpus / "test_voice/v1.wav",
        0.5,
    )


def test_of_several_takes_of_an_answer_the_first_is_heard(tmp_path):
    takes = [("train", "answer", "b1", "A cat says meow.", "", "own"), ("train", "answer", "b2", "Tuesday.", "", "own")]
    sets = TestSets(write_corpus(tmp_path, [*ENTRIES, *takes]), 120)
    assert names(sets.answers) == ["train-a1", "train-a2", "train-b2"]


def test_the_limit_keeps_both_kinds_of_questions(corpus):
    sets = TestSets(corpus, 2)
    assert (len(sets.voices), len(sets.human), len(sets.known), len(sets.operands)) == (2, 2, 1, 1)
    # Where one kind is short, the other fills up.
    assert (len(TestSets(corpus, 4).known), len(TestSets(corpus, 4).operands)) == (2, 2)
    assert (len(TestSets(corpus, 5).known), len(TestSets(corpus, 5).operands)) == (3, 2)


def test_the_manifest_identifies_the_corpus(corpus, tmp_path):
    same, other = write_corpus(tmp_path / "same"), write_corpus(tmp_path / "other", ENTRIES[:-1])
    assert TestSets(corpus, 1).sha256 == TestSets(same, 1).sha256 != TestSets(other, 1).sha256


def test_a_corpus_that_cannot_be_used(corpus, tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        TestSets(corpus, 0)
    with pytest.raises(ValueError, match="has no manifest.jsonl"):
        TestSets(tmp_path, 5)
    with pytest.raises(ValueError, match="no held-out clips of human"):
        TestSets(write_corpus(tmp_path / "a", [entry for entry in ENTRIES if entry[0] != "human"]), 5)
    (corpus / "test_voice" / "v2.wav").unlink()
    with pytest.raises(ValueError, match="v2.wav, which .* names, does not exist"):
        TestSets(corpus, 5)
    lines = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    (corpus / "manifest.jsonl").write_text("".join(json.dumps(line | {"voice": None}) + "\n" for line in lines[1:]))
    for missing in ("voice", "split"):
        lines[0].pop(missing)
        (corpus / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match=f"has no {missing}"):
            TestSets(corpus, 1)


def test_an_interrupted_run_goes_on(tmp_path):
    outputs, seen = Outputs(tmp_path), []
    clips = [clip("a", 3.0), clip("b", 1.0), clip("c", 2.0)]

    def step(batch):
        seen.append(names(batch))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [{"id": item.id, "number": len(seen)} for item in batch]

    with pytest.raises(KeyboardInterrupt):
        outputs.complete("task", clips, 2, step)
    again = Outputs(tmp_path)
    assert names(again.missing("task", clips)) == ["b"]
    # The longest come first; the result is in the order of the clips.
    assert [item["number"] for item in again.complete("task", clips, 2, step)] == [1, 3, 1]
    assert seen == [["a", "c"], ["b"], ["b"]]
    again.complete("task", clips, 2, step)
    assert len(seen) == 3 and Outputs(tmp_path).items("other") == {}


def test_a_line_that_was_cut_off_is_made_anew(tmp_path):
    outputs = Outputs(tmp_path)
    outputs.add("task", [{"id": "a"}])
    with open(tmp_path / "task" / "items.jsonl", "a") as file:
        file.write('{"id": "b", "te')
    assert list(outputs.items("task")) == ["a"]
    outputs.add("task", [{"id": "b"}])
    assert list(Outputs(tmp_path).items("task")) == ["a", "b"]


def test_wav_files(tmp_path):
    outputs = Outputs(tmp_path)
    outputs.save_wav("task", "a", np.array([0.5, -2.0, 2.0], np.float32), 24000)
    samples, rate = soundfile.read(outputs.wav("task", "a"))
    assert rate == 24000 and samples.tolist() == pytest.approx([0.5, -1.0, 1.0], abs=1e-4)
    assert [path.name for path in (tmp_path / "task").iterdir()] == ["a.wav"]


def test_batches_are_of_similar_length():
    clips = [clip("a", 1.0), clip("b", 3.0), clip("c", 2.0), clip("d", 3.0)]
    assert [names(batch) for batch in batches(clips, 3)] == [["b", "d", "c"], ["a"]]


def test_the_identity_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    before = checkpoint_identity(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of it")
    assert checkpoint_identity(tmp_path) == before and list(before["files"]) == ["config.json", "model.safetensors"]
    (tmp_path / "model.safetensors").write_text("other weights")
    assert checkpoint_identity(tmp_path)["sha256"] != before["sha256"]
