import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "both"])
def test_one_setting_is_measured(setting):
    sizes = ["--size", "tiny", "--rows", "1", "--seconds", "2", "--steps", "1"]
    command = [sys.executable, str(SCRIPT), *sizes, "--one", "stage2", setting]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens_per_second"] > 0 and figures["peak_bytes"] > 0
