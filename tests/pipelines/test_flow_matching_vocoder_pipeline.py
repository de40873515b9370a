"""Codes -> sound through the pipeline, and that the LLM is left alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import pipeline

from modeling_baichuan_audio import BaichuanAudioWaveformDecoder, FlowMatchingVocoderPipeline
from modeling_baichuan_audio.conversion import tiny_config, tiny_model


FRAMES = (6, 3, 4)
CLIPS = [np.random.default_rng(frames).integers(0, 16, (8, frames)) for frames in FRAMES]
FAST = {"seed": 1, "num_steps": 2}
PARTS = ("model.audio_tokenizer.quantizer.", "model.audio_tokenizer.mel_decoder.", "flow_matching.", "vocoder.")


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return pipeline("flow-matching-vocoder", model=str(tiny_folder))


@pytest.fixture(scope="module")
def expected(shared_tiny_model, tiny_folder):
    """Each clip alone, by the whole model."""
    model = type(shared_tiny_model).from_pretrained(tiny_folder)
    return [model.decode_audio([torch.from_numpy(clip)], **FAST)[0].numpy() for clip in CLIPS]


def check(records, expected):
    assert isinstance(records, list) and len(records) == len(expected)
    for record, waveform in zip(records, expected):
        assert record.keys() == {"audio", "sampling_rate"} and record["sampling_rate"] == 24000
        assert record["audio"].dtype == np.float32 and record["audio"].shape == waveform.shape
        np.testing.assert_allclose(record["audio"], waveform, atol=1e-4)


# -------------------- forms of input


@pytest.mark.parametrize("form", ["array", "int32", "tensor", "list"])
def test_one_clip(form, pipe, expected):
    clip = CLIPS[0]
    forms = {"array": clip, "int32": clip.astype(np.int32), "tensor": torch.from_numpy(clip), "list": clip.tolist()}
    record = pipe(forms[form], **FAST)
    assert isinstance(record, dict)
    check([record], expected[:1])
    assert record["audio"].shape == ((4 * FRAMES[0] - 1) * 480,)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_clips_of_unequal_length(batch_size, pipe, expected):
    check(pipe(CLIPS, batch_size=batch_size, **FAST), expected)


@pytest.mark.parametrize("form", ["tensors", "lists", "tuple", "padded batch"])
def test_several_clips(form, pipe, expected):
    padded = np.full((3, 8, max(FRAMES)), -1)
    for row, clip in zip(padded, CLIPS):
        row[:, : clip.shape[1]] = clip
    forms = {
        "tensors": [torch.from_numpy(clip) for clip in CLIPS],
        "lists": [clip.tolist() for clip in CLIPS],
        "tuple": tuple(CLIPS),
        "padded batch": torch.from_numpy(padded),
    }
    check(pipe(forms[form], **FAST), expected)


def test_column_of_a_dataset(pipe, expected):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"codes": [clip.tolist() for clip in CLIPS], "name": ["a", "b", "c"]})
    check(pipe(rows["codes"], batch_size=2, **FAST), expected)
    check(pipe(rows.with_format("numpy")["codes"], **FAST), expected)


def test_generator_is_consumed_as_it_goes(pipe, expected):
    taken = []

    def clips():
        for clip in CLIPS:
            taken.append(len(clip))
            yield clip

    sounds = iter(pipe(clips(), **FAST))
    assert len(taken) <= 1  # transformers looks at the first
    first = next(sounds)
    assert len(taken) <= 2
    check([first, *sounds], expected)


def test_no_clips(pipe):
    assert pipe([]) == []


def test_codes_of_a_reply(pipe, tiny_folder, shared_tiny_model):
    model = type(shared_tiny_model).from_pretrained(tiny_folder)
    codes = model.generate(
        torch.tensor([[65, 66, 268]]), generation_mode="audio", output_audio=False, seed=0, max_new_tokens=12
    ).audio_codes
    assert pipe(codes[0], **FAST)["audio"].shape == pipe(codes, **FAST)[0]["audio"].shape


# -------------------- settings


def test_settings_reach_the_solver(pipe):
    def sound(**settings):
        return pipe(CLIPS[1], **(FAST | settings))["audio"]

    assert (sound() == sound()).all()
    for other in ({"seed": 2}, {"num_steps": 3}, {"guidance": 0.0}, {"num_codebooks": 2}):
        assert not np.array_equal(sound(), sound(**other)), other


def test_settings_of_the_pipeline(tiny_folder, expected):
    pipe = FlowMatchingVocoderPipeline(model=BaichuanAudioWaveformDecoder.from_pretrained(tiny_folder), **FAST)
    check(pipe(CLIPS), expected)


def test_unknown_setting(pipe):
    with pytest.raises(TypeError, match="temperature"):
        pipe(CLIPS[0], temperature=1.0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((8, 3)), "integers of shape"),
        (np.zeros(5, dtype=int), "integers of shape"),
        ([[1, 2], [3]], "regular array"),
        (np.zeros((7, 3), dtype=int), "8, frames"),
        (np.full((8, 3), 10000), "reach"),
        (np.zeros((8, 0), dtype=int), "1 to"),
        ("codes.npy", "must be a clip or several, got str"),
        (5, "must be a clip or several, got int"),
    ],
)
def test_bad_codes(codes, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe(codes)


# -------------------- streaming

LONG = np.random.default_rng(0).integers(0, 16, (8, 60))


@pytest.mark.parametrize("form", ["clip", "nested list", "pieces"])
def test_stream_gives_what_a_call_gives(form, pipe):
    forms = {"clip": LONG, "nested list": LONG.tolist(), "pieces": iter(np.split(LONG, [7, 31], axis=1))}
    chunks = list(pipe.stream(forms[form], **FAST))
    assert len(chunks) > 2 and all(chunk.dtype == np.float32 and chunk.size for chunk in chunks)
    np.testing.assert_allclose(np.concatenate(chunks), pipe(LONG, **FAST)["audio"], atol=1e-4)


def test_stream_begins_before_the_clip_is_complete(pipe):
    taken = []

    def pieces():
        for piece in np.split(LONG, 12, axis=1):
            taken.append(piece)
            yield piece

    stream = pipe.stream(pieces(), latency="low_latency", **FAST)
    first = next(stream)
    assert 0 < len(taken) < 12
    assert sum(map(len, [first, *stream])) == (4 * 60 - 1) * 480


def test_stream_refuses_what_it_cannot_do(pipe):
    with pytest.raises(ValueError, match="`latency` must be one of exact, low_latency, got 'fast'"):
        pipe.stream(LONG, latency="fast")
    with pytest.raises(ValueError, match="integers of shape"):
        pipe.stream(LONG.astype(float))
    with pytest.raises(ValueError, match="reach"):
        list(pipe.stream(LONG * 1000))


# -------------------- loading


def test_from_pretrained(tiny_folder, expected, pipe):
    other = FlowMatchingVocoderPipeline.from_pretrained(tiny_folder)
    assert type(other) is type(pipe) is FlowMatchingVocoderPipeline
    check([other(CLIPS[0], **FAST)], expected[:1])


def test_with_a_model_that_is_loaded_already(tiny_folder, shared_tiny_model, expected):
    model = type(shared_tiny_model).from_pretrained(tiny_folder)
    check(FlowMatchingVocoderPipeline(model=model)(CLIPS, **FAST), expected)


def test_original_checkpoint_has_no_vocoder(original_folder):
    with pytest.raises(ValueError, match="baichuan-audio convert CHECKPOINT OUTPUT --hift hift.pt"):
        FlowMatchingVocoderPipeline.from_pretrained(original_folder)


def test_parts_of_their_own(pipe, tmp_path, tiny_folder, expected):
    pipe.save_pretrained(tmp_path)
    stored, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_folder))
    assert stored.keys() < whole.keys()
    assert stored.keys() == {name for name in whole if name.startswith(PARTS)}
    check(pipeline("flow-matching-vocoder", model=str(tmp_path))(CLIPS, **FAST), expected)
    check(FlowMatchingVocoderPipeline.from_pretrained(tmp_path)(CLIPS, **FAST), expected)


def test_llm_is_neither_read_nor_allocated(tmp_path, tiny_folder, expected):
    """The config's LLM, audio head and encoder are far larger than memory, and their tensors of a type that cannot be read."""
    folder = shutil.copytree(tiny_folder, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 2**28, "intermediate_size": 2**34}
    config["audio_head_config"]["intermediate_size"] = 2**34
    config["audio_tokenizer_config"]["encoder_ffn_dim"] = 2**34
    (folder / "config.json").write_text(json.dumps(config))
    small, other = {}, {"__metadata__": {"format": "pt"}}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith(PARTS):
            small[name] = tensor
        else:
            start = 3 * (len(other) - 1)
            other[name] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [start, start + 3]}
    (folder / "model.safetensors").unlink()
    save_file(small, folder / "small.safetensors", metadata={"format": "pt"})
    header = json.dumps(other).encode()
    (folder / "other.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3 * (len(other) - 1)))
    weight_map = dict.fromkeys(small, "small.safetensors") | dict.fromkeys(list(other)[1:], "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with safe_open(folder / "other.safetensors", framework="pt") as file, pytest.raises(SafetensorError):
        file.get_slice("lm_head.weight")[...]

    pipe = pipeline("flow-matching-vocoder", model=str(folder))
    assert set(pipe.model.state_dict()) == set(small)
    check(pipe(CLIPS, **FAST), expected)
    check(FlowMatchingVocoderPipeline.from_pretrained(folder)(CLIPS[:1], **FAST), expected[:1])


def test_names_are_those_of_the_whole_model():
    whole = tiny_model().state_dict()
    decoder = BaichuanAudioWaveformDecoder(tiny_config())
    assert set(decoder.state_dict()) < set(whole)
    assert decoder.audio_tokenizer.encoder is None


def test_half_precision_keeps_the_vocoder_in_float32(tiny_folder):
    decoder = BaichuanAudioWaveformDecoder.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.vocoder.parameters()} == {torch.float32}
    assert decoder.flow_matching.prenet.out_proj.weight.dtype == torch.bfloat16
    record = FlowMatchingVocoderPipeline(model=decoder)(CLIPS[1], **FAST)
    assert record["audio"].dtype == np.float32 and np.isfinite(record["audio"]).all()
