"""The pages in docs/: their blocks run in order, as written, on an untrained checkpoint."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers.golden import write_hift
from typer.testing import CliRunner

from modeling_baichuan_audio.cli import app
from modeling_baichuan_audio.conversion import tiny_tokenizer


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
QUICK = ["checkpoints", "codec", "hub", "memory", "quickstart", "streaming", "tts"]
LONG = ["lora", "pipelines", "serving", "speech-chat"]
TABLES = ["conformance", "data", "evaluation", "training"]  # about commands that tests of their own run


@pytest.fixture
def workplace(tmp_path, tmp_path_factory, original_folder, monkeypatch):
    """A folder with the example, an original checkpoint and its vocoder, under the names that the pages use."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    original = shutil.copytree(original_folder, tmp_path / "Baichuan-Audio-Instruct")
    tiny_tokenizer().save_pretrained(original)
    write_hift(tmp_path / "hift.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "docs-cache"))
    return tmp_path


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run_page(page: str) -> None:
    """Python blocks share their names, as in a notebook; of bash blocks, the package's own commands run."""
    names = {"__name__": "__main__"}
    for language, source in blocks(page):
        if language == "python":
            exec(compile(source, f"docs/{page}.md", "exec"), names)
        elif language == "bash":
            for line in source.replace("\\\n", " ").splitlines():
                command, *arguments = shlex.split(line)
                if command == "baichuan-audio":
                    result = CliRunner().invoke(app, arguments)
                    assert result.exit_code == 0, f"{line}\n{result.output}{result.stderr}"
                else:
                    assert command == "pip", line
        else:
            assert language == "text", language


@pytest.mark.parametrize("page", QUICK)
def test_page(page, workplace):
    run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG)
def test_long_page(page, workplace):
    if page == "lora":
        pytest.importorskip("peft")
    run_page(page)


def test_every_page_is_run():
    assert {path.stem for path in DOCS.glob("*.md")} == {*QUICK, *LONG, *TABLES}


def test_links():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{path.name}: {target}"


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if f"docs/{path.name}" not in readme] == []
