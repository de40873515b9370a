"""The libraries' own tests on this package. They come from the package index; without it and without its cache these tests skip."""

import os
import signal
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .__main__ import DOCUMENT
from .not_applicable import NEEDS_NO_MODEL, NOT_APPLICABLE, SKIPPED_BY_THE_TESTS
from .run import run_tests, summarise
from .stand_ins.distributed import _start_rank_processes
from .tree import HERE, SourcesUnavailable


TESTERS = sorted(path.stem for path in (HERE / "testers").glob("*.py") if path.stem != "shared")


def check(tester: str) -> None:
    try:
        summary = summarise(run_tests([tester]))
    except SourcesUnavailable as error:
        pytest.skip(str(error))
    assert sum(counts["passed"] for counts in summary.counts.values()) > 0
    found = [*summary.failed, *summary.empty, *summary.unexplained]
    assert summary.is_clean, "\n".join(f"{test}: {reason}" for test, reason in found)


@pytest.mark.parametrize("tester", ["feature_extraction", "processing"])
def test_the_quick_ones(tester):
    check(tester)


@pytest.mark.slow
@pytest.mark.parametrize("tester", [name for name in TESTERS if name not in ("feature_extraction", "processing")])
def test_the_long_ones(tester):
    if tester == "peft":
        pytest.importorskip("peft")
    check(tester)


def result(outcome: str, home: str = "ModelTesterMixin", models: int = 1, reason: str = "", parts: tuple[str, ...] = ()) -> dict:
    """A test's outcome; beside the skipped parts one part passed."""
    outcomes = {"outcome": outcome, "home": home, "models": models, "reason": reason}
    return outcomes | {"parts": len(parts) + 1, "skipped_parts": list(parts)}


def test_only_what_was_checked_counts_as_clean():
    declared = next(iter(NOT_APPLICABLE["SpeechModelTest"].values()))
    fine = {"a.py::T::test_a": result("passed"), "a.py::T::test_config": result("passed", models=0)}
    fine |= {
        "a.py::T::test_b": result("skipped", reason=declared),
        "a.py::T::test_c": result("skipped", reason="test requires MPS"),
    }
    summary = summarise(fine)
    assert summary.is_clean and summary.counts["ModelTesterMixin"] == {"passed": 2, "skipped": 2}
    for kind, wrong in (
        ("failed", result("failed", reason="boom")),
        ("empty", result("passed", models=0)),
        ("unexplained", result("skipped", reason="a reason that nobody gave")),
        ("unexplained", result("passed", parts=("half of it was left out",))),
    ):
        found = summarise(fine | {"a.py::T::test_x": wrong})
        assert not found.is_clean and len(getattr(found, kind)) == 1


def test_a_test_of_which_no_part_ran_was_skipped():
    whole = result("passed", parts=("test requires MPS", "test requires MPS"))
    assert summarise({"a.py::T::test_x": whole}).counts["ModelTesterMixin"] == {"passed": 1}
    assert summarise({"a.py::T::test_x": whole | {"parts": 2}}).counts["ModelTesterMixin"] == {"skipped": 1}


def test_the_document_holds_every_reason():
    """It is written by `python -m tests.conformance`; a reason that changed in the table has to be written anew."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "Not as it should be" not in text
    for tests in NOT_APPLICABLE.values():
        for name, reason in tests.items():
            assert reason in text, f"{name}: run `python -m tests.conformance`"
    assert all("|" not in reason for tests in NOT_APPLICABLE.values() for reason in tests.values())
    assert SKIPPED_BY_THE_TESTS and NEEDS_NO_MODEL


def fail_and_note(rank: int, notes: Path, how: str) -> None:
    starts = len(list(notes.iterdir()))
    (notes / str(starts)).touch()
    if how == "aborts always" or (how == "aborts once" and starts == 0):
        os.kill(os.getpid(), signal.SIGABRT)
    if how == "raises":
        raise AssertionError("a comparison failed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "starts", "error"),
    [
        ("aborts once", 2, None),
        ("aborts always", 2, ProcessExitedException),
        ("raises", 1, ProcessRaisedException),
    ],
)
def test_only_processes_that_a_signal_ended_start_again(tmp_path, how, starts, error):
    if error:
        with pytest.raises(error):
            _start_rank_processes(fail_and_note, (tmp_path, how), nprocs=1)
    else:
        _start_rank_processes(fail_and_note, (tmp_path, how), nprocs=1)
    assert len(list(tmp_path.iterdir())) == starts
