"""The memory benchmark at a small size."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_near_the_largest_shard(tmp_path):
    command = [sys.executable, str(SCRIPT), "--gigabytes", "0.3", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    size = float(re.search(r"^checkpoint +([\d.]+) GB in 4 shards", done.stdout, re.M)[1])
    assert 0.25 < size < 0.35
    peak = float(re.search(r"^peak over it +(\d+) MB", done.stdout, re.M)[1])
    largest_tensor = float(re.search(r"^largest tensor +(\d+) MB", done.stdout, re.M)[1])
    assert peak > largest_tensor / 2, "the measurement missed the conversion"
    ratio = float(re.search(r"^peak / largest shard +([\d.]+) ", done.stdout, re.M)[1])
    assert ratio <= 1.3
    assert list(tmp_path.iterdir()) == [], "the checkpoints were left behind"
