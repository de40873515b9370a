"""Running what is not imported: a benchmark's script, a process away from the checkout."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_elsewhere(folder: Path, *arguments: str, timeout: float) -> None:
    """Runs Python in `folder / "elsewhere"`, offline, with a cache of code of its own; it must end well."""
    (folder / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder / "elsewhere", env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
