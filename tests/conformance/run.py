"""Runs transformers' and PEFT's own tests on this package, and sorts the outcomes."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .not_applicable import NEEDS_NO_MODEL, NOT_APPLICABLE, SKIPPED_BY_THE_TESTS
from .tree import NAME, build_tree


TESTS = Path(__file__).resolve().parents[1]
DECLARED = {(test_class, test): reason for test_class, tests in NOT_APPLICABLE.items() for test, reason in tests.items()}
# Of these mixins' tests, one that builds no model has checked nothing. (The multi-process tests build theirs elsewhere.)
_MODEL_MIXINS = {"ModelTesterMixin", "TrainingTesterMixin"}


@dataclass
class Summary:
    """What a run came to; lists hold (test, reason)."""

    counts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    failed: list[tuple[str, str]] = field(default_factory=list)
    empty: list[tuple[str, str]] = field(default_factory=list)
    unexplained: list[tuple[str, str]] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def is_clean(self) -> bool:
        return not (self.failed or self.empty or self.unexplained)


def _run_one(tree: Path, file: Path, pytest_arguments: list[str], try_skips: bool, quiet: bool) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "RUN_SLOW": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # Later entries of the path matter too: the package under test may be a source checkout that is not installed.
        environment["PYTHONPATH"] = os.pathsep.join([str(tree), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        if try_skips:
            environment["CONFORMANCE_TRY_SKIPS"] = "1"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "conformance.plugin",
            "--rootdir",
            str(tree),
            "-c",
            str(tree / "pytest.ini"),
        ]
        command += ["-q", "--no-header", "--tb=short", "--results", str(results), *pytest_arguments, str(file)]
        stream = subprocess.PIPE if quiet else None
        done = subprocess.run(
            command, cwd=tree, env=environment, stdout=stream, stderr=subprocess.STDOUT if quiet else None, text=True
        )
        if not results.is_file():
            raise RuntimeError(f"{file.name} gave no results (pytest status {done.returncode}):\n{(done.stdout or '')[-4000:]}")
        found = json.loads(results.read_text(encoding="utf-8"))
        if not found and done.returncode != 5:  # 5: nothing selected
            raise RuntimeError(f"{file.name} ran no test (pytest status {done.returncode}):\n{(done.stdout or '')[-4000:]}")
        return found


def run_tests(
    names: list[str] | None = None,
    pytest_arguments: list[str] | None = None,
    jobs: int = 1,
    try_skips: bool = False,
    quiet: bool = True,
) -> dict[str, dict]:
    """
    Args:
        names (*optional*): the testers to run, by the names of their files in `testers`; all by default.
        pytest_arguments (*optional*): more of them, such as `["-k", "cache"]`.
        jobs: testers that run at once.
        try_skips: also run what is declared as not applicable.

    Returns:
        Outcome, reason, parts and origin of every test, by its id.

    Raises:
        SourcesUnavailable: the tests are not cached and cannot be fetched.
        RuntimeError: a tester could not be run at all.
    """
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        tree = Path(folder).resolve()
        files = build_tree(tree, with_peft=names is None or "peft" in names)
        wanted = [file for file in files if names is None or file.stem.removeprefix("test_").removesuffix(f"_{NAME}") in names]
        with ThreadPoolExecutor(jobs) as pool:
            parts = list(pool.map(lambda file: _run_one(tree, file, pytest_arguments or [], try_skips, quiet), wanted))
    return {test: outcome for part in parts for test, outcome in part.items()}


def _explained(reason: str) -> str | None:
    for pattern, explanation in SKIPPED_BY_THE_TESTS:
        if re.search(pattern, reason):
            return explanation
    return None


def summarise(results: dict[str, dict]) -> Summary:
    """Counts by mixin, and everything that must not be: failures, tests that checked nothing, skips without a reason of ours."""
    summary = Summary()
    declared = set(DECLARED.values())
    for test, result in results.items():
        test_class, _, name = test.rpartition("::")
        label = f"{test_class.rpartition('::')[2]}.{name}"
        outcome, reason, home = result["outcome"], result["reason"], result.get("home", "-")
        if outcome == "passed" and result["skipped_parts"] and len(result["skipped_parts"]) == result["parts"]:
            outcome, reason = "skipped", result["skipped_parts"][0]  # nothing of it ran
        summary.counts[home][outcome] += 1
        if outcome == "failed":
            summary.failed.append((label, reason))
        elif outcome == "skipped":
            explanation = reason if reason in declared else _explained(reason)
            if explanation is None:
                summary.unexplained.append((label, reason))
            else:
                summary.skipped[explanation].append(label)
        elif result.get("models") == 0 and home in _MODEL_MIXINS and name not in NEEDS_NO_MODEL:
            summary.empty.append((label, "passed without building a model"))
        for part in result["skipped_parts"]:
            if _explained(part) is None:
                summary.unexplained.append((f"{label} (a part of it)", part))
    return summary
