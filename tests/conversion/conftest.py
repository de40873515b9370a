"""Small checkpoints with something about them changed, and what two checkpoints are compared by."""

import json

import pytest
import torch
from helpers.golden import formula_state_dict, golden_json
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def golden_state():
    """All tensors of the golden checkpoint under their original names."""
    return formula_state_dict(golden_json()["state_dict"])


@pytest.fixture
def make_original(tmp_path, golden_state):
    """Writes the golden checkpoint in its original form, as one file, with config entries and tensors changed.

    Config entries are named with dots ("audio_config.d_model"). A tensor set to None is left out.
    """

    def make(config=None, tensors=None, name="original"):
        settings = json.loads(json.dumps(golden_json()["config"]))
        for path, value in (config or {}).items():
            *sections, key = path.split(".")
            section = settings
            for part in sections:
                section = section[part]
            section[key] = value
        state = golden_state | (tensors or {})
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        kept = {key: value for key, value in state.items() if value is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def read_tensors():
    """Folder -> all tensors of its safetensors files."""

    def read(folder):
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            part = load_file(file)
            assert not state.keys() & part.keys(), "two files hold the same tensor"
            state |= part
        return state

    return read


@pytest.fixture(scope="session")
def assert_same_tensors():
    """Same names, dtypes, shapes and bits."""

    def check(ours, theirs):
        assert ours.keys() == theirs.keys()
        assert {name: tensor.dtype for name, tensor in ours.items()} == {name: tensor.dtype for name, tensor in theirs.items()}
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    return check


@pytest.fixture(scope="session")
def all_logits():
    """Model of the golden config -> its text and audio logits on a prompt of text and code frames, in one vector."""

    @torch.no_grad()
    def run(model):
        pad = model.config.audio_pad_token_id
        input_ids = torch.tensor([[5, 6, model.config.audio_start_token_id, pad, pad, model.config.audio_end_token_id, 7]])
        codes = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 0], [1, 2], [3, 4], [5, 6], [7, 0]]])
        output = model.eval()(input_ids, audio_codes=codes, output_audio_logits=True)
        return torch.cat([output.logits.flatten(), *(part.flatten() for part in output.audio_logits)])

    return run
