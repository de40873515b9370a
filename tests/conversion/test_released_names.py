"""The released checkpoints' tensors, by name and shape alone, against the default (7B) config."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from helpers.golden import FIXTURES

from modeling_baichuan_audio import BaichuanAudioConfig, BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion.convert import renamed_key
from modeling_baichuan_audio.original_format import DROPPED_KEYS, KEY_RENAMES, KEY_SPLITS, VISION_KEYS


POSITION_TABLES = {
    "audio_tokenizer.audio_model.positional_embedding": 1500 * 1280,
    "audio_tokenizer.audio_decoder.positional_embedding": 3000 * 1280,
    "audio_tokenizer.audio_flow_matching_decoder.prenet.positional_embedding": 5000 * 512,
}
UNUSED_BIASES = {f"audio_head.transformer_layers.{i}.linear1.bias": 2 * 3584 for i in range(3)} | {
    f"audio_head.transformer_layers.{i}.linear2.bias": 3584 for i in range(3)
}


@pytest.fixture(scope="module")
def released():
    return json.loads((FIXTURES / "released_state_dict.json").read_text())


@pytest.fixture(scope="module")
def ours():
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in BaichuanAudioForCausalLM(BaichuanAudioConfig()).state_dict().items()}


def is_dropped(name):
    return any(re.search(pattern, name) for pattern in DROPPED_KEYS)


def mapped(name, shape, ours):
    """Our tensors, name and shape, that an original one becomes. Sizes of the parts of W_pack are those of `ours`."""
    name = renamed_key(name)
    for ending, pieces, dim in KEY_SPLITS:
        if name.endswith("." + ending):
            targets = [name.removesuffix(ending) + piece for piece in pieces]
            sizes = [ours[target][dim] if "W_pack" in ending else shape[dim] // len(pieces) for target in targets]
            assert sum(sizes) == shape[dim], name
            return {target: [*shape[:dim], size, *shape[dim + 1 :]] for target, size in zip(targets, sizes, strict=True)}
    return {name: shape}


def test_size_of_the_released_checkpoint(released):
    assert len(released["state_dict"]) == 2022
    assert sum(math.prod(shape) for shape in released["state_dict"].values()) == 10_346_592_920
    assert released["parameters_and_buffers"] == 10_346_592_920


def test_dropped_tensors(released):
    dropped = {name: math.prod(shape) for name, shape in released["state_dict"].items() if is_dropped(name)}
    assert dropped == POSITION_TABLES | UNUSED_BIASES
    assert sum(dropped.values()) == 8_352_256


def test_every_reason_to_drop_is_needed(released):
    for pattern in DROPPED_KEYS:
        assert any(re.search(pattern, name) for name in released["state_dict"]), pattern


def test_mapping_gives_exactly_our_tensors(released, ours):
    kept = {name: shape for name, shape in released["state_dict"].items() if not is_dropped(name)}
    result = [item for name, shape in kept.items() for item in mapped(name, shape, ours).items()]
    assert {name: count for name, count in Counter(name for name, _ in result).items() if count > 1} == {}
    assert dict(result) == ours


def test_no_element_is_lost(released, ours):
    total = sum(math.prod(shape) for shape in ours.values())
    assert total == 10_338_240_664
    assert total + sum((POSITION_TABLES | UNUSED_BIASES).values()) == released["parameters_and_buffers"]


def test_no_released_tensor_counts_as_vision(released, ours):
    assert [name for name in [*released["state_dict"], *ours] if re.search(VISION_KEYS, name)] == []


def test_every_rename_and_split_is_used(released):
    renames, splits = set(), set()
    for name in released["state_dict"]:
        for pattern, replacement in KEY_RENAMES:
            if re.search(pattern, name):
                renames.add(pattern)
                name = re.sub(pattern, replacement, name, count=1)
        splits |= {ending for ending, _, _ in KEY_SPLITS if name.endswith("." + ending)}
    assert renames == {pattern for pattern, _ in KEY_RENAMES}
    assert splits == {ending for ending, _, _ in KEY_SPLITS}


def test_our_own_names_stay_as_they_are(ours):
    """Converted checkpoints pass through the same table."""
    assert [name for name in ours if renamed_key(name) != name] == []
    assert [name for name in ours if is_dropped(name)] == []
    assert [name for name in ours for ending, _, _ in KEY_SPLITS if name.endswith("." + ending)] == []
