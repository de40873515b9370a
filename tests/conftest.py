"""Shared fixtures, and the parity table at the end of a run."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose time to threads

import pytest
import torch
from helpers.golden import write_hift, write_original_checkpoint

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import convert_checkpoint, make_tiny_checkpoint, tiny_model, tiny_processor


PARITY: dict[str, float] = {}


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory):
    return write_original_checkpoint(tmp_path_factory.mktemp("checkpoints") / "original")


@pytest.fixture(scope="session")
def converted_folder(original_folder):
    folder = original_folder.parent / "converted"
    convert_checkpoint(original_folder, folder, hift=write_hift(original_folder.parent / "hift.pt"))
    return folder


@pytest.fixture(scope="session")
def original_model(original_folder):
    return BaichuanAudioForCausalLM.from_pretrained(original_folder)


@pytest.fixture(scope="session")
def converted_model(converted_folder):
    return BaichuanAudioForCausalLM.from_pretrained(converted_folder)


@pytest.fixture(scope="session")
def shared_tiny_model():
    """A small random model with every part. Tests that change it take `tiny` instead."""
    return tiny_model()


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def check_parity():
    """Compares with a golden tensor and keeps the largest difference of each group for the table."""

    def check(group: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
        assert ours.shape == theirs.shape, f"{group}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        difference = float((ours.double() - theirs.double()).abs().max())
        PARITY[group] = max(PARITY.get(group, 0.0), difference)
        assert difference <= tolerance, f"{group}: largest difference {difference:.3g} exceeds {tolerance:g}"

    return check


def pytest_terminal_summary(terminalreporter):
    if PARITY:
        terminalreporter.section("parity with the original (largest absolute difference)")
        for group, difference in sorted(PARITY.items()):
            terminalreporter.write_line(f"{group:32s} {difference:.2e}")
