"""The untrained checkpoint that commands and examples fall back on."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_baichuan_audio.conversion import (
    convert,
    find_checkpoint,
    make_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    untrained_checkpoint,
)
from modeling_baichuan_audio.processors.processing_baichuan_audio import SPECIAL_TOKENS


@pytest.fixture
def no_torch_randomness_used():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_checkpoint(tmp_path, assert_same_tensors):
    first, second = (make_tiny_checkpoint(tmp_path / name, seed=3) for name in ("first", "second"))
    assert_same_tensors(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())


def test_another_seed_another_checkpoint():
    first, second = tiny_model(seed=0).state_dict(), tiny_model(seed=1).state_dict()
    assert first.keys() == second.keys()
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert not {name for name in same if first[name].dim() > 1 and first[name].any()}, "weights that no seed changes"
    assert "lm_head.weight" not in same


def test_model_leaves_the_callers_random_state_alone(no_torch_randomness_used):
    tiny_model(seed=1)


def test_checkpoint_leaves_the_callers_random_state_alone(no_torch_randomness_used, tmp_path):
    make_tiny_checkpoint(tmp_path / "checkpoint")


def test_model_does_not_depend_on_the_callers_random_state(assert_same_tensors):
    torch.manual_seed(1)
    first = tiny_model().state_dict()
    torch.manual_seed(2)
    assert_same_tensors(first, tiny_model().state_dict())


def test_every_part_is_there_and_small():
    model = tiny_model()
    assert model.vocoder is not None
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_special_tokens_are_the_tokenizers():
    vocabulary, config = tiny_tokenizer().get_vocab(), tiny_config()
    for name, token in SPECIAL_TOKENS.items():
        assert getattr(config, f"{name}_token_id") == vocabulary[token]
    assert max(vocabulary.values()) < config.text_config.vocab_size


def test_tokenizer_spells_any_text():
    tokenizer = tiny_tokenizer()
    text = "Speech, 语音! \n\t 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_overrides_reach_the_config():
    assert tiny_config(vocoder_config=None).vocoder_config is None


def test_checkpoint_loads_and_stops(tiny_folder):
    model, processor = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoProcessor.from_pretrained(tiny_folder)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.audio_switch_token_ids == processor.audio_switch_token_ids() != []
    assert model.generation_config.max_audio_frames == 25


def test_checkpoint_replaces_an_older_one(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    make_tiny_checkpoint(folder)
    assert not (folder / "old.txt").exists()
    assert (folder / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"], "temporary files were left"


def test_untrained_checkpoint_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = untrained_checkpoint()
    assert folder.is_relative_to(tmp_path / "cache" / "baichuan-audio")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert untrained_checkpoint() == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert AutoModelForCausalLM.from_pretrained(folder).vocoder is not None


@pytest.mark.parametrize("value", ["", None])
def test_untrained_checkpoint_without_xdg_cache_home(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert untrained_checkpoint().is_relative_to(tmp_path / ".cache" / "baichuan-audio")


def test_half_made_untrained_checkpoint_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = untrained_checkpoint()
    (folder / "config.json").unlink()
    assert (untrained_checkpoint() / "config.json").is_file()


def test_checkpoints_with_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_checkpoint("untrained") == untrained_checkpoint()
    monkeypatch.setattr(convert, "__file__", str(tmp_path / "conversion" / "convert.py"))
    with pytest.raises(ValueError, match="comes without the miniature"):
        find_checkpoint("miniature")
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature" / "config.json").write_text("{}")
    assert find_checkpoint("miniature") == tmp_path / "miniature"
