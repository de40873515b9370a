"""A toy corpus, and judges that only look up what they are to say."""

import json
import os
import sys
from pathlib import Path

import pytest
from evaluation_corpus import write_corpus

from modeling_baichuan_audio.evaluation import judges as judges_module
from modeling_baichuan_audio.evaluation.clips import Outputs, TestSets
from modeling_baichuan_audio.evaluation.judges import Judges
from modeling_baichuan_audio.evaluation.subject import Subject


# The judges' side of the protocol: transcripts of the corpus's recordings by file name, poor marks for everything else, and a line in
# `asked.log` for each job. `broken` names a file to fail at, `otherwise` is heard in whatever is not of the corpus.
FAKE_JUDGE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
said = json.loads((folder / "said.json").read_text())
for line in sys.stdin:
    job = json.loads(line)
    path = pathlib.Path(job["path"])
    assert path.is_file()
    if path.name == said.get("broken"):
        print("the model went up in smoke", file=sys.stderr)
        raise SystemExit(3)
    with open(folder / "asked.log", "a") as log:
        log.write(path.name + " " + ",".join(job["measures"]) + "\\n")
    source = path.parent.parent.name == "corpus"
    values = {"mos": 4.5 if source else 1.5, "speaker": [0.6, 0.8] if source else [1.0, 0.0], "whisper-tiny.en": "hello"}
    values["whisper-base"] = said["heard"].get(path.name, "") if source else said.get("otherwise", "")
    values = {name: values[name] for name in job["measures"]}
    print(json.dumps({"path": job["path"], **values}), flush=True)
"""


class FakeJudges:
    """A folder like the one of `fetch_judges`, and what its process was asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        python = folder / "environment" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(os.path.realpath(sys.executable))
        (folder / "models").mkdir()
        (folder / "models" / "english.json").write_text('{"colour": "color"}')
        self.says({})

    def says(self, heard: dict[str, str], **others: str) -> None:
        """Transcripts by file name; see above for `others`."""
        (self.folder / "said.json").write_text(json.dumps({"heard": heard} | others))

    def asked(self) -> list[str]:
        log = self.folder / "asked.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def fake_judges(tmp_path, monkeypatch):
    script = tmp_path / "fake_judge.py"
    script.write_text(FAKE_JUDGE)
    monkeypatch.setattr(judges_module, "SCRIPT", script)
    monkeypatch.setattr(judges_module, "check_models", lambda folder: None)
    return FakeJudges(tmp_path / "judges")


@pytest.fixture
def judges(fake_judges, tmp_path):
    return Judges(fake_judges.folder, tmp_path / "verdicts.jsonl", threads=1)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def sets(corpus):
    return TestSets(corpus, 2)


@pytest.fixture
def subject(shared_tiny_model, processor, tmp_path):
    return Subject(shared_tiny_model, processor, Outputs(tmp_path / "outputs"), batch_size=2)
