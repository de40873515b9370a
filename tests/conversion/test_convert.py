"""Original checkpoint -> converted checkpoint."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers.golden import formula_state_dict, write_hift, write_original_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioTokenizerModel, BaichuanAudioVocoder
from modeling_baichuan_audio.conversion import convert, convert_checkpoint, convert_vocoder, find_checkpoint, tiny_tokenizer
from modeling_baichuan_audio.conversion.convert import PlannedTensor


GATE = "model.layers.0.mlp.gate_proj.weight"
W_PACK = "model.layers.0.self_attn.W_pack"
HEAD_LINEAR1 = "audio_head.transformer_layers.0.linear1.weight"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------- what comes out


@pytest.mark.parametrize("shards", [1, 3])
def test_equals_loading_the_original(tmp_path, shards, read_tensors, assert_same_tensors, all_logits):
    original = write_original_checkpoint(tmp_path / "original", shards=shards)
    report = convert_checkpoint(original, tmp_path / "converted")
    theirs = AutoModelForCausalLM.from_pretrained(original)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    assert_same_tensors(read_tensors(tmp_path / "converted"), theirs.state_dict())
    assert torch.equal(all_logits(ours), all_logits(theirs))
    assert len(report.shards) == shards
    assert report.tensors == len(theirs.state_dict())
    assert (report.dropped, report.vision) == (7, 0)  # three position tables, two biases in each of two head layers


def test_index_and_report_are_true(tmp_path, original_folder, read_tensors):
    report = convert_checkpoint(original_folder, tmp_path / "converted")
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    state = read_tensors(tmp_path / "converted")
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert index["metadata"]["total_size"] == report.total_bytes == size
    assert index["weight_map"].keys() == state.keys()
    assert sorted(set(index["weight_map"].values())) == report.shards
    assert names_in(tmp_path) == ["converted"], "temporary files were left"
    assert not {"plan.json", "hift.pt"} & set(names_in(tmp_path / "converted"))


def test_config_is_written_in_our_form(tmp_path, original_folder):
    convert_checkpoint(original_folder, tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "baichuan_audio"
    assert config["architectures"] == ["BaichuanAudioForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_baichuan_audio.BaichuanAudioConfig",
        "AutoModel": "modeling_baichuan_audio.BaichuanAudioModel",
        "AutoModelForCausalLM": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
        "AutoModelForMultimodalLM": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
        "AutoModelForTextToWaveform": "modeling_baichuan_audio.BaichuanAudioForCausalLM",
        "AutoModelForAudioTokenization": "modeling_baichuan_audio.TokenizerOfCheckpoint",
        "AutoModelForTextToSpectrogram": "modeling_waveform_decoder.BaichuanAudioWaveformDecoder",
        "AutoFeatureExtractor": "feature_extraction_baichuan_audio.BaichuanAudioFeatureExtractor",
    }  # and no processor, for this checkpoint has no tokenizer
    assert "omni" not in json.dumps(config)
    for entry in config["auto_map"].values():
        assert (tmp_path / "converted" / f"{entry.split('.')[0]}.py").is_file()


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_fused_attention_is_cut_by_head_counts(tmp_path, make_original, read_tensors, kv_heads):
    """The query has 8 heads of 32; keys and values have fewer, so that the three pieces differ in size."""
    rows = (8 + 2 * kv_heads) * 32
    shapes = {f"model.layers.{i}.self_attn.W_pack.{leaf}": [rows, 256] for i in range(2) for leaf in ("weight", "bias")}
    fused = formula_state_dict({name: shape[:1] if name.endswith("bias") else shape for name, shape in shapes.items()})
    original = make_original({"num_key_value_heads": kv_heads}, fused)
    convert_checkpoint(original, tmp_path / "converted")
    ours = read_tensors(tmp_path / "converted")
    theirs = AutoModelForCausalLM.from_pretrained(original).state_dict()
    for leaf in ("weight", "bias"):
        whole, start = fused[f"{W_PACK}.{leaf}"], 0
        for piece, heads in (("q", 8), ("k", kv_heads), ("v", kv_heads)):
            name = f"model.language_model.layers.0.self_attn.{piece}_proj.{leaf}"
            assert torch.equal(ours[name], whole[start : start + 32 * heads])
            assert torch.equal(ours[name], theirs[name])
            start += 32 * heads


def test_head_feed_forward_is_cut_by_codebook(converted_folder, golden_state, read_tensors):
    """`linear1` (2D, 8D) holds the weights of the eight positions side by side, `linear2` (D, 8 * 2D) too (MODEL.md 7)."""
    ours = read_tensors(converted_folder)
    width = 256
    first = golden_state[HEAD_LINEAR1].view(2 * width, 8, width)
    second = golden_state[HEAD_LINEAR1.replace("linear1", "linear2")].view(width, 8, 2 * width)
    for position in range(8):
        assert torch.equal(ours[f"audio_head.layers.0.mlps.{position}.fc1.weight"], first[:, position])
        assert torch.equal(ours[f"audio_head.layers.0.mlps.{position}.fc2.weight"], second[:, position])


def test_vocoder_is_added(tmp_path, converted_folder, read_tensors):
    config, vocoder = convert_vocoder(torch.load(write_hift(tmp_path / "hift.pt")))
    state = {name: tensor for name, tensor in read_tensors(converted_folder).items() if name.startswith("vocoder.")}
    assert state.keys() == {f"vocoder.{name}" for name in vocoder}
    assert all(torch.equal(state[f"vocoder.{name}"], tensor) for name, tensor in vocoder.items())
    model = BaichuanAudioForCausalLM.from_pretrained(converted_folder)
    config.dtype = model.config.vocoder_config.dtype
    assert model.config.vocoder_config.to_dict() == config.to_dict()
    assert len(model.decode_audio(torch.zeros(1, 8, 3, dtype=torch.long), seed=0)[0]) == 11 * 480


def test_adding_the_vocoder_later_is_the_same(tmp_path, original_folder, converted_folder, read_tensors, assert_same_tensors):
    convert_checkpoint(original_folder, tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").vocoder is None
    report = convert_checkpoint(tmp_path / "plain", tmp_path / "with vocoder", hift=write_hift(tmp_path / "hift.pt"))
    assert report.dropped == 0
    assert_same_tensors(read_tensors(tmp_path / "with vocoder"), read_tensors(converted_folder))
    assert names_in(tmp_path / "with vocoder") == names_in(converted_folder)
    assert (tmp_path / "with vocoder" / "config.json").read_text() == (converted_folder / "config.json").read_text()


def test_converted_checkpoint_passes_through(tmp_path, converted_folder, read_tensors, assert_same_tensors):
    convert_checkpoint(converted_folder, tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(converted_folder)
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(converted_folder))
    assert (tmp_path / "again" / "config.json").read_text() == (converted_folder / "config.json").read_text()


@pytest.fixture(params=["original", "converted", "saved"])
def any_form(request, tmp_path, original_folder, converted_folder, converted_model):
    """The golden checkpoint as folder and `hift.pt` still to be added, in each form that can be converted."""
    if request.param == "original":
        return original_folder, write_hift(tmp_path / "hift.pt")
    if request.param == "converted":
        return converted_folder, None
    converted_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", None


def test_dtype_casts_all_but_the_vocoder(tmp_path, any_form, converted_model, read_tensors):
    (source, hift), dtype = any_form, torch.bfloat16
    convert_checkpoint(source, tmp_path / "cast", hift=hift, dtype=dtype)
    state = read_tensors(tmp_path / "cast")
    full = converted_model.state_dict()
    assert state.keys() == full.keys()
    wrong = [name for name in state if not torch.equal(state[name], full[name] if "vocoder." in name else full[name].to(dtype))]
    assert wrong == []
    kept = {name for name, tensor in state.items() if tensor.dtype != dtype}
    assert kept == {name for name in state if name.startswith("vocoder.")}
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_of_the_model_and_its_parts_loaded_alone(tmp_path, any_form):
    source, hift = any_form
    convert_checkpoint(source, tmp_path / "cast", hift=hift, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cast")
    assert model.lm_head.weight.dtype == model.audio_head.norm.weight.dtype == torch.bfloat16
    assert model.vocoder.conv_pre.weight.dtype == torch.float32
    assert BaichuanAudioTokenizerModel.from_pretrained(tmp_path / "cast").encoder.conv1.weight.dtype == torch.bfloat16
    if hift is not None:  # a vocoder that is added says its own dtype
        assert BaichuanAudioVocoder.from_pretrained(tmp_path / "cast").conv_pre.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_float_is_cast(tmp_path, make_original, read_tensors, dtype):
    others = {GATE: torch.float64, "model.layers.1.mlp.gate_proj.weight": torch.bfloat16}
    original = make_original(tensors={name: torch.ones(512, 256, dtype=other) for name, other in others.items()})
    convert_checkpoint(original, tmp_path / "cast", dtype=dtype)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "cast").values()} == {dtype}


def test_omni_checkpoint_loses_its_vision_parts(tmp_path, make_original, original_model, read_tensors, assert_same_tensors):
    vision = {"visual_model.blocks.0.attn.qkv.weight": torch.ones(3, 3), "visual_bridge_model.proj.0.weight": torch.ones(2)}
    original = make_original({"visual_config.enable": True, "visual_config.hidden_size": 4}, vision)
    report = convert_checkpoint(original, tmp_path / "converted")
    assert report.vision == 2
    assert_same_tensors(read_tensors(tmp_path / "converted"), original_model.state_dict())


def test_companion_files_come_along(tmp_path, original_folder):
    source = shutil.copytree(original_folder, tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "temperature": 0.5, "do_sample": True}))
    (source / "LICENSE").write_text("the licence")
    convert_checkpoint(source, tmp_path / "converted")
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").generation_config
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    assert (generation.eos_token_id, generation.temperature) == (3, 0.5), "the source's own settings win"
    assert generation.pad_token_id == processor.tokenizer.pad_token_id
    assert generation.audio_switch_token_ids == processor.audio_switch_token_ids()
    assert processor.feature_extractor.max_audio_seconds == 4
    assert (tmp_path / "converted" / "LICENSE").read_text() == "the licence"
    assert (tmp_path / "converted" / "processing_baichuan_audio.py").is_file()


def test_leftover_ids_of_the_original_config_are_dropped(tmp_path, original_folder):
    """config.json says bos 1, eos 2, pad 0, which nothing uses."""
    convert_checkpoint(original_folder, tmp_path / "converted")
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (None, None, None)


def test_progress_adds_up(tmp_path, original_folder):
    calls = []
    hift = write_hift(tmp_path / "hift.pt")
    report = convert_checkpoint(original_folder, tmp_path / "converted", hift, progress=lambda *call: calls.append(call))
    assert {total for _, total in calls} == {report.total_bytes}
    assert calls == sorted(calls) and calls[-1][0] == report.total_bytes


@pytest.mark.parametrize("output", ["new", "empty", "deep/er/new"])
def test_output_folder_may_be_new_or_empty(tmp_path, original_folder, output):
    if output == "empty":
        (tmp_path / output).mkdir()
    convert_checkpoint(original_folder, tmp_path / output)
    assert (tmp_path / output / "config.json").is_file()


def test_output_may_be_the_current_folder(tmp_path, original_folder, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert_checkpoint(original_folder, ".")
    assert (tmp_path / "here" / "config.json").is_file()


# -------------------- what is refused


@pytest.fixture
def refused(tmp_path):
    """Converts, expects a ValueError, checks that nothing was written, and returns the message."""

    def run(checkpoint, output=tmp_path / "output", **settings):
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(ValueError) as error:
            convert_checkpoint(checkpoint, output, **settings)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was written"
        return str(error.value)

    return run


@pytest.mark.parametrize(
    "tensors, listed",
    [
        (
            {GATE: None, "lm_head.weight": None},
            ["model.language_model.layers.0.mlp.gate_proj.weight is missing", "lm_head.weight is"],
        ),
        ({GATE: torch.ones(3, 4)}, ["model.language_model.layers.0.mlp.gate_proj.weight has shape [3, 4] instead of [512, 256]"]),
        ({"surprise.weight": torch.ones(1)}, ["surprise.weight is unknown"]),
        ({f"{W_PACK}.weight": None}, [f"self_attn.{x}_proj.weight is missing" for x in "qkv"]),
        ({f"{W_PACK}.weight": torch.ones(368, 256)}, ["v_proj.weight has shape [48, 256] instead of [64, 256]"]),
        ({f"{W_PACK}.weight": torch.ones(400, 256)}, ["v_proj.weight has shape [80, 256] instead of [64, 256]"]),
        ({f"{W_PACK}.bias": torch.ones(100)}, ["q_proj.bias has shape [100]", "k_proj.bias has shape [0]"]),
        ({HEAD_LINEAR1: torch.ones(512, 2049)}, ["mlps.7.fc1.weight has shape [512, 257] instead of [512, 256]"]),
        ({HEAD_LINEAR1: torch.ones(7)}, ["linear1.weight is unknown", "mlps.0.fc1.weight is missing"]),
        (
            {"model.language_model.norm.weight": torch.ones(256)},
            ["model.language_model.norm.weight is there twice", "model.norm"],
        ),
        ({GATE: torch.ones(512, 256).to(torch.float8_e4m3fn)}, ["gate_proj.weight has the unsupported type F8_E4M3"]),
    ],
    ids=[
        "two missing",
        "other shape",
        "unknown",
        "fused missing",
        "fused too small",
        "fused too large",
        "fused far too small",
        "head too wide",
        "head without its dimension",
        "twice",
        "8-bit float",
    ],
)
def test_tensors_that_do_not_fit_are_listed(make_original, refused, tensors, listed):
    message = refused(make_original(tensors=tensors))
    for part in listed:
        assert part in message


def test_every_problem_is_listed_at_once(make_original, refused):
    message = refused(make_original(tensors={GATE: None, "surprise": torch.ones(1), "model.norm.weight": torch.ones(2)}))
    assert "in 3 tensors" in message
    for part in ("gate_proj.weight is missing", "surprise is unknown", "norm.weight has shape [2] instead of [256]"):
        assert part in message


@pytest.mark.parametrize(
    "setting, value, sentence",
    [
        ("flow_matching_config.cfm_params.solver", "rk4", "cfm_params.solver='rk4'; only 'euler' is supported."),
        ("flow_matching_config.spk_emb_dim", 192, "flow_matching_config.spk_emb_dim=192; only 0 is supported."),
        ("flow_matching_config.channels", [32, 32], "flow_matching_config.channels [32, 32]; exactly one stage is supported."),
        ("flow_matching_config.unet_use_omni_attn", True, "unet_use_omni_attn=True; only False is supported."),
        ("flow_matching_config.use_hidden_states_before_dconv2", False, "dconv2=False; only True is supported."),
        ("audio_config.split_overlap", 0.5, "audio_config.split_overlap=0.5; only 0.0 is supported."),
        ("vocoder_config.channels", [24, 24, 12], "refine-net channels [24, 24, 12]; all must be equal."),
        ("use_norm_head", True, "asks for a normalised lm_head or sparse attention layers, which are not supported."),
        ("sparse_attention_layers", [1], "asks for a normalised lm_head or sparse attention layers, which are not supported."),
        ("flow_matching_config", None, "lacks flow_matching_config: is this a Baichuan-Audio checkpoint?"),
        ("audio_config.audio_pad_token_id", 300, "Two special tokens share an id"),
        ("audio_config.audio_pad_token_id", 1000, "Special token id 1000 lies outside the vocabulary of 330."),
    ],
)
def test_unsupported_original_settings_are_refused(make_original, refused, setting, value, sentence):
    original = make_original({setting: value})
    assert sentence in refused(original)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AutoModelForCausalLM.from_pretrained(original)


@pytest.mark.parametrize("content", ["folder", "file"])
def test_occupied_output_is_refused(tmp_path, original_folder, refused, content):
    output = tmp_path / "output"
    if content == "folder":
        output.mkdir()
        (output / "mine.txt").write_text("keep me")
    else:
        output.write_text("keep me")
    assert f"{output} exists already" in refused(original_folder, output)


def test_missing_shard_is_named(tmp_path, refused):
    original = write_original_checkpoint(tmp_path / "original", shards=3)
    (original / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in refused(original)


def test_damaged_shard_is_named(tmp_path, refused):
    original = write_original_checkpoint(tmp_path / "original")
    file = original / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file} is damaged" in refused(original)


def test_what_is_not_a_checkpoint_is_refused(tmp_path, refused):
    assert "neither a folder nor a Hub repository" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    assert "cannot be had from the Hub" in refused("nobody/nothing")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    save_file({"a": torch.ones(1)}, other / "model.safetensors")
    assert "model of type qwen2" in refused(other)


def test_checkpoint_without_safetensors_is_refused(tmp_path, make_original, refused):
    original = make_original()
    (original / "model.safetensors").rename(original / "pytorch_model.bin")
    assert "lacks model.safetensors" in refused(original)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16"])
def test_other_dtypes_are_refused(original_folder, refused, dtype):
    assert "float32, float16, bfloat16" in refused(original_folder, dtype=dtype)


def test_second_vocoder_is_refused(tmp_path, converted_folder, refused):
    assert "has a vocoder already" in refused(converted_folder, hift=write_hift(tmp_path / "hift.pt"))


def test_unusable_vocoder_is_refused(tmp_path, original_folder, refused):
    assert "does not exist" in refused(original_folder, hift=tmp_path / "hift.pt")
    torch.save({"conv_pre.weight": torch.ones(1, 1, 1)}, tmp_path / "hift.pt")
    assert "not a HiFT vocoder" in refused(original_folder, hift=tmp_path / "hift.pt")


def test_find_checkpoint(tmp_path, monkeypatch):
    assert find_checkpoint(tmp_path) == tmp_path
    monkeypatch.setattr(convert, "snapshot_download", lambda name: {"someone/model": str(tmp_path)}[name])
    assert find_checkpoint("someone/model") == tmp_path


# -------------------- interruptions


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A conversion that stops after its first shard: original folder, output, folder of unfinished work."""
    original = write_original_checkpoint(tmp_path / "original", shards=3)
    with monkeypatch.context() as patch:
        write_shard, done = convert.write_shard, []

        def stop_after_first(path, *args):
            if done:
                raise KeyboardInterrupt
            done.append(path)
            return write_shard(path, *args)

        patch.setattr(convert, "write_shard", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(original, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    return original, tmp_path / "output", tmp_path / ".output.part"


@pytest.fixture
def written(monkeypatch):
    """Names of the shards that are written from now on."""
    names, write_shard = [], convert.write_shard

    def note(path, *args):
        names.append(path.name)
        return write_shard(path, *args)

    monkeypatch.setattr(convert, "write_shard", note)
    return names


def identity(path):
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns


def test_interrupted_conversion_goes_on(interrupted, written, original_model, read_tensors, assert_same_tensors):
    original, output, part = interrupted
    first = "model-00001-of-00003.safetensors"
    before = identity(part / first)
    calls = []
    report = convert_checkpoint(original, output, progress=lambda *call: calls.append(call))
    assert written == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert identity(output / first) == before
    assert calls[-1] == (report.total_bytes, report.total_bytes)
    assert_same_tensors(read_tensors(output), original_model.state_dict())
    assert not part.exists()


def test_other_settings_start_anew(interrupted, written, original_model, read_tensors):
    original, output, part = interrupted
    convert_checkpoint(original, output, dtype=torch.bfloat16)
    assert len(written) == 3
    state = read_tensors(output)
    wrong = [name for name, tensor in original_model.state_dict().items() if not torch.equal(state[name], tensor.bfloat16())]
    assert wrong == []
    assert not part.exists()


def test_changed_source_starts_anew(interrupted, written, read_tensors):
    """Same names and shapes, other values: the shard that was finished before is stale."""
    original, output, _ = interrupted
    file = original / "model-00001-of-00003.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    state["model.embed_tokens.weight"] += 1
    save_file(state, file, metadata={"format": "pt"})
    convert_checkpoint(original, output)
    assert len(written) == 3
    assert torch.equal(read_tensors(output)["model.language_model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_added_vocoder_starts_anew(interrupted, written, tmp_path):
    original, output, _ = interrupted
    convert_checkpoint(original, output, hift=write_hift(tmp_path / "hift.pt"))
    assert written == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def test_interruption_within_a_shard_leaves_no_half_shard(tmp_path, original_folder, monkeypatch, read_tensors, original_model):
    reads, read = [], PlannedTensor.read

    def fail(self, file):
        reads.append(self.name)
        if len(reads) == 100:
            raise OSError("no space left on device")
        return read(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(PlannedTensor, "read", fail)
        with pytest.raises(OSError, match="no space left"):
            convert_checkpoint(original_folder, tmp_path / "output")
    assert not (tmp_path / "output").exists()
    assert list((tmp_path / ".output.part").glob("*.safetensors")) == []
    convert_checkpoint(original_folder, tmp_path / "output")
    assert read_tensors(tmp_path / "output").keys() == original_model.state_dict().keys()
    assert [name for name in names_in(tmp_path / "output") if name.endswith(".part")] == []
