"""The README's commands, as written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import soundfile
from test_cli import expected_samples


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def bash_blocks() -> list[list[str]]:
    return [block.strip().splitlines() for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)]


def test_main_command(tmp_path):
    """Set-up lines are run by .ci/run; the last line is the main job, here in a folder that holds only the example."""
    *setup, command = bash_blocks()[0]
    assert setup == ["python3 -m venv .venv && . .venv/bin/activate", "pip install -c constraints.txt ."]
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    scripts = Path(sys.executable).parent
    assert (scripts / "baichuan-audio").is_file(), "install the package first: pip install -e ."
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    frames, pieces = map(int, re.search(r"(\d+) frames in (\d+) pieces", result.stdout).groups())
    waveform, rate = soundfile.read(tmp_path / "answer.wav")
    assert rate == 24000
    assert len(waveform) == expected_samples(frames, pieces) > 24000
    assert abs(waveform).max() > 1e-4


def test_ci_runs_the_test_block():
    assert bash_blocks()[1][-1] == "python -m pytest"
    assert "n == 2" in (ROOT / ".ci" / "run").read_text()


def test_paths_and_commands_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    from typer.main import get_command

    from modeling_baichuan_audio.cli import app

    commands = set(re.search(r"`baichuan-audio ([a-z |]+)`", README)[1].split(" | "))
    assert commands == set(get_command(app).commands)
