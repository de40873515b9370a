"""pytest plugin of the conformance run: notes which class a test was written in, and whether it built a model at all."""

import functools
import json
import os
import re

import pytest
from transformers import PreTrainedModel


_MARKERS = """slow is_pipeline_test accelerate_tests not_device_test torch_compile_test torch_export_test flash_attn_test
flash_attn_3_test flash_attn_4_test all_flash_attn_test generate bitsandbytes training_ci tensor_parallel_ci fsdp_ci is_training_test
is_tensor_parallel_test is_expert_parallel_test is_fsdp_test""".split()
_RESULTS: dict[str, dict] = {}
_BUILT = {"models": 0}


def pytest_addoption(parser):
    parser.addoption("--results", help="JSON file for the outcomes")


def pytest_configure(config):
    for marker in _MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' tests")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    initialise = PreTrainedModel.__init__

    @functools.wraps(initialise)
    def counted(self, *args, **kwargs):
        _BUILT["models"] += 1
        return initialise(self, *args, **kwargs)

    PreTrainedModel.__init__ = counted


def written_in(test_class: type, name: str) -> str:
    """The deepest class that defines the test `name`.

    transformers' model mixin copies every inherited test onto each subclass, so the method resolution order alone does not tell.
    """
    for base in reversed(test_class.__mro__[1:]):
        for known in vars(base):
            # `parameterized` turns `test_x` into `test_x_0_case`, before or after a class replaces it.
            cases = re.escape(min(known, name, key=len)) + r"(_\d+(_.*)?)?"
            if known.startswith("test_") and re.fullmatch(cases, max(known, name, key=len)):
                return base.__name__
    return test_class.__name__


def pytest_collection_modifyitems(items):
    for item in items:
        home = written_in(item.cls, item.name.split("[")[0]) if item.cls else "-"
        item.user_properties.append(("home", home))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    before = _BUILT["models"]
    yield
    item.user_properties.append(("models", _BUILT["models"] - before))


def _reason(report) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())


def pytest_runtest_logreport(report):
    entry = _RESULTS.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "parts": 0, "skipped_parts": []})
    entry.update(dict(report.user_properties or []))
    is_part = type(report).__name__ == "SubtestReport"
    entry["parts"] += is_part
    if report.failed:
        entry |= {"outcome": "failed", "reason": _reason(report)[:400]}
    elif report.skipped and is_part:
        entry["skipped_parts"].append(_reason(report))
    elif report.skipped and entry["outcome"] == "passed":
        entry |= {"outcome": "skipped", "reason": _reason(report)}


def pytest_sessionfinish(session):
    path = session.config.getoption("--results")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(_RESULTS, file, indent=1)
