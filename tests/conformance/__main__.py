"""`python -m tests.conformance`: runs transformers' and PEFT's own tests and writes docs/conformance.md.

With `--only`, or with arguments for pytest such as `-k cache`, the outcome is printed and the document left alone.
"""

import argparse
import os
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .run import Summary, run_tests, summarise
from .tree import SourcesUnavailable


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
HEAD = """\
# Conformance with the libraries' own tests

Written by `python -m tests.conformance`; do not edit. The common tests of transformers and of PEFT, from the source distributions of
the installed versions, run on this package as if it were part of the library. What the distributions leave out (transformers'
generation and exporter tests, and those of single tasks, without which `PipelineTesterMixin` has nothing to run) is covered by tests of
our own in `tests/modeling` and `tests/pipelines`. A test that passes without building a model, or skips for a reason that is not listed
in `tests/conformance/not_applicable.py`, counts as a failure.

"""


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("transformers", "peft", "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def table(summary: Summary) -> str:
    """One row per mixin, the class that a test is written in."""
    columns = ("passed", "failed", "skipped")
    total = sum(summary.counts.values(), Counter())
    rows = [(f"`{home}`", summary.counts[home]) for home in sorted(summary.counts)] + [("**all**", total)]
    lines = ["| tests of | passed | failed | skipped |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |" for name, counts in rows]
    return "\n".join(lines) + "\n"


def skips(summary: Summary) -> str:
    """The reasons for skipping, most frequent first, with their tests."""
    lines = ["| reason | tests |", "|---|---|"]
    for reason, tests in sorted(summary.skipped.items(), key=lambda item: (-len(item[1]), item[0])):
        by_class: dict[str, list[str]] = {}
        for test in sorted(tests):
            test_class, _, name = test.partition(".")
            by_class.setdefault(test_class, []).append(f"`{name.removeprefix('test_')}`")
        listed = "; ".join(f"{name}: {', '.join(found)}" for name, found in by_class.items())
        lines.append(f"| {reason} ({len(tests)}) | {listed} |")
    return "\n".join(lines) + "\n"


def problems(summary: Summary) -> str:
    groups = (
        ("failed", summary.failed),
        ("checked nothing", summary.empty),
        ("skipped without a reason of ours", summary.unexplained),
    )
    lines = [f"- {test} {what}: {reason}" for what, found in groups for test, reason in found]
    return "\n".join(lines) + "\n" if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TESTER", help="a file of tests/conformance/testers, without .py")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="testers that run at once")
    parser.add_argument("--try-skips", action="store_true", help="also run what is declared as not applicable")
    options, for_pytest = parser.parse_known_args()
    partial = bool(options.only or for_pytest or options.try_skips)
    try:
        results = run_tests(options.only, for_pytest, options.jobs, options.try_skips, quiet=options.jobs > 1)
    except SourcesUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    summary = summarise(results)
    text = f"{_versions()}.\n\n{table(summary)}"
    found = problems(summary)
    print(f"{text}\n{found}" if found else text)
    if not partial:
        sections = f"\n## Not as it should be\n\n{found}" if found else ""
        DOCUMENT.write_text(f"{HEAD}{text}{sections}\n## Skipped, and why\n\n{skips(summary)}", encoding="utf-8")
        print(f"Wrote {DOCUMENT}.")
    return 0 if summary.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
