"""Loading checkpoints of both forms: whole, in parts, through the Auto classes, and without this package."""

import json
import shutil

import pytest
import torch
from helpers.processes import run_elsewhere
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToWaveform,
    AutoProcessor,
)
from transformers.utils import logging

from modeling_baichuan_audio import (
    BaichuanAudioConfig,
    BaichuanAudioFeatureExtractor,
    BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioForCausalLM,
    BaichuanAudioHead,
    BaichuanAudioModel,
    BaichuanAudioProcessor,
    BaichuanAudioTokenizerModel,
    BaichuanAudioVocoder,
)
from modeling_baichuan_audio.conversion import convert_checkpoint, tiny_tokenizer


GATE = "model.layers.0.mlp.gate_proj.weight"
OUR_GATE = "model.language_model.layers.0.mlp.gate_proj.weight"
# Each part with its prefix in the whole model.
PARTS = [
    (BaichuanAudioTokenizerModel, "model.audio_tokenizer."),
    (BaichuanAudioHead, "audio_head."),
    (BaichuanAudioFlowMatchingDecoder, "flow_matching."),
]
VOCODER = (BaichuanAudioVocoder, "vocoder.")


@pytest.fixture(params=["original", "converted"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def log(caplog):
    """The log, transformers' own lines included."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()  # a command that ran before may have silenced it
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(verbosity)


# -------------------- parts


@pytest.mark.parametrize("part, prefix", PARTS)
def test_part_loads_alone(folder, part, prefix, original_model, assert_same_tensors):
    loaded, info = part.from_pretrained(folder, output_loading_info=True)
    assert (info["missing_keys"], info["mismatched_keys"]) == (set(), set())
    whole = original_model.state_dict()
    assert_same_tensors(loaded.state_dict(), {key.removeprefix(prefix): whole[key] for key in whole if key.startswith(prefix)})


def test_vocoder_loads_alone(converted_folder, converted_model, assert_same_tensors):
    loaded, info = BaichuanAudioVocoder.from_pretrained(converted_folder, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert_same_tensors(loaded.state_dict(), converted_model.vocoder.state_dict())


@pytest.mark.parametrize("form", ["original", "converted"])
def test_vocoder_of_a_checkpoint_without_one(form, tmp_path, original_folder):
    folder = original_folder
    if form == "converted":
        folder = tmp_path / "converted"
        convert_checkpoint(original_folder, folder)
    with pytest.raises(ValueError, match="baichuan-audio convert CHECKPOINT OUTPUT --hift hift.pt"):
        BaichuanAudioVocoder.from_pretrained(folder)


@pytest.mark.parametrize("part, prefix", [*PARTS, VOCODER])
def test_part_saved_alone_loads_again(part, prefix, converted_folder, tmp_path, assert_same_tensors):
    loaded = part.from_pretrained(converted_folder)
    loaded.save_pretrained(tmp_path / "part")
    assert json.loads((tmp_path / "part" / "config.json").read_text())["model_type"] == part.config_class.model_type
    again = AutoModel.from_pretrained(tmp_path / "part")
    assert type(again) is part
    assert_same_tensors(again.state_dict(), loaded.state_dict())


def test_part_with_a_missing_tensor(make_original):
    original = make_original(tensors={"audio_head.headnorm.weight": None})
    BaichuanAudioTokenizerModel.from_pretrained(original)
    with pytest.raises(ValueError, match="BaichuanAudioHead in 1 tensors: norm.weight is missing"):
        BaichuanAudioHead.from_pretrained(original)


# -------------------- Auto classes


def test_auto_config(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is BaichuanAudioConfig
    assert config.model_type == "baichuan_audio"
    assert (config.vocoder_config is None) == (folder.name == "original")


@pytest.mark.parametrize(
    "auto_class, model_class",
    [
        (AutoModel, BaichuanAudioModel),
        (AutoModelForCausalLM, BaichuanAudioForCausalLM),
        (AutoModelForMultimodalLM, BaichuanAudioForCausalLM),
        (AutoModelForTextToWaveform, BaichuanAudioForCausalLM),
    ],
)
def test_auto_model(folder, auto_class, model_class, original_model, assert_same_tensors):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert type(model) is model_class
    assert info["missing_keys"] == set()
    theirs = original_model.model if model_class is BaichuanAudioModel else original_model
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vocoder.")}
    assert_same_tensors(ours, theirs.state_dict())


def test_auto_model_for_audio_tokenization(tmp_path, converted_model):
    converted_model.audio_tokenizer.save_pretrained(tmp_path)
    assert type(AutoModelForAudioTokenization.from_pretrained(tmp_path)) is BaichuanAudioTokenizerModel


def test_both_forms_give_the_same_logits(original_model, converted_model, all_logits):
    assert torch.equal(all_logits(original_model), all_logits(converted_model))


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_remote_code_of_the_original_is_never_run(tmp_path, original_folder, trust_remote_code):
    """Its config.json names modelling files; ours are used instead."""
    source = shutil.copytree(original_folder, tmp_path / "original")
    for name in ("configuration_omni.py", "modeling_omni.py"):
        (source / name).write_text("raise SystemExit('remote code was run')")
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code)
    assert type(model) is BaichuanAudioForCausalLM


def test_auto_feature_extractor_reads_an_original_folder(original_folder):
    extractor = AutoFeatureExtractor.from_pretrained(original_folder)
    assert type(extractor) is BaichuanAudioFeatureExtractor
    assert (extractor.max_audio_seconds, extractor.feature_size, extractor.sampling_rate) == (4, 128, 16000)
    assert (extractor.hop_length, extractor.n_fft, extractor.stride_size, extractor.downsample_factor) == (160, 400, 2, 4)


def test_auto_feature_extractor_follows_the_original_config(make_original):
    original = make_original({"audio_config.max_audio_seconds": 7, "audio_config.num_mel_bins": 64, "audio_config.avg_pooler": 2})
    extractor = AutoFeatureExtractor.from_pretrained(original)
    assert (extractor.max_audio_seconds, extractor.feature_size, extractor.downsample_factor) == (7, 64, 2)


def test_auto_feature_extractor_of_other_folders_fails_as_before(tmp_path):
    with pytest.raises(OSError, match="preprocessor_config.json"):
        AutoFeatureExtractor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(OSError, match="preprocessor_config.json"):
        AutoFeatureExtractor.from_pretrained(tmp_path)


@pytest.mark.parametrize("form", ["original", "converted"])
def test_auto_processor(form, tmp_path, original_folder):
    folder = shutil.copytree(original_folder, tmp_path / "original")
    tiny_tokenizer().save_pretrained(folder)
    if form == "converted":
        convert_checkpoint(folder, tmp_path / "converted")
        folder = tmp_path / "converted"
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is BaichuanAudioProcessor
    assert type(processor.feature_extractor) is BaichuanAudioFeatureExtractor
    assert processor.feature_extractor.max_audio_seconds == 4
    inputs = processor(text="a<audio_start_baichuan><audio_pad_baichuan><audio_end_baichuan>", audio=torch.randn(80000) * 0.1)
    assert inputs["input_features"].shape[0] == 2  # five seconds in chunks of four
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == 50 + 12


# -------------------- what does not fit


def test_missing_tensors_are_listed(make_original):
    original = make_original(tensors={GATE: None, "lm_head.weight": None})
    with pytest.raises(
        ValueError, match=f"BaichuanAudioForCausalLM in 2 tensors: lm_head.weight is missing; {OUR_GATE} is missing"
    ):
        AutoModelForCausalLM.from_pretrained(original)


def test_missing_tensor_of_a_converted_checkpoint_is_listed(tmp_path, converted_folder):
    folder = shutil.copytree(converted_folder, tmp_path / "converted")
    last = sorted(folder.glob("*.safetensors"))[-1]  # the vocoder's
    names = load_file(last).keys()
    last.unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="vocoder.conv_post.bias") as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "name, listed", [(GATE, OUR_GATE), ("model.layers.0.self_attn.W_pack.weight", "layers.0.self_attn.q_proj.weight")]
)
def test_misshaped_tensor_is_named(make_original, name, listed):
    original = make_original(tensors={name: torch.ones(3, 256)})
    with pytest.raises(ValueError, match=listed):
        AutoModelForCausalLM.from_pretrained(original)


def test_sizes_can_be_ignored_on_request(make_original):
    original = make_original(tensors={GATE: torch.ones(3, 256)})
    model = AutoModelForCausalLM.from_pretrained(original, ignore_mismatched_sizes=True)
    assert model.get_parameter(OUR_GATE).shape == (512, 256)


def test_parts_load_without_a_report_of_the_others(converted_folder, log):
    for part in (BaichuanAudioTokenizerModel, BaichuanAudioHead, BaichuanAudioFlowMatchingDecoder, BaichuanAudioVocoder):
        part.from_pretrained(converted_folder)
    AutoModel.from_pretrained(converted_folder)
    assert log.text == ""
    half = BaichuanAudioVocoder.from_pretrained(converted_folder, dtype="auto")
    assert half.conv_pre.weight.dtype == torch.float32


def test_missing_shard_is_named(tmp_path, original_folder):
    folder = shutil.copytree(original_folder, tmp_path / "original")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00002.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_omni_checkpoint_loads_with_one_warning(make_original, log, original_model, assert_same_tensors):
    vision = {"visual_model.blocks.0.attn.qkv.weight": torch.ones(3, 3), "visual_bridge_model.proj.0.weight": torch.ones(2)}
    original = make_original({"visual_config.enable": True, "visual_config.hidden_size": 4}, vision)
    log.clear()
    model, info = AutoModelForCausalLM.from_pretrained(original, output_loading_info=True)
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("Ignored 2 vision tensors")
    assert_same_tensors(model.state_dict(), original_model.state_dict())


@pytest.mark.parametrize("form", ["original", "converted"])
def test_whole_model_loads_without_a_warning(form, request, log):
    folder = request.getfixturevalue(f"{form}_folder")
    log.clear()
    AutoModelForCausalLM.from_pretrained(folder)
    assert [record.getMessage() for record in log.records if record.levelno >= 30] == []


# -------------------- saving


def test_model_from_an_original_folder_is_saved_in_our_form(tmp_path, original_folder, original_model, all_logits, read_tensors):
    model = AutoModelForCausalLM.from_pretrained(original_folder)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "baichuan_audio"
    names = read_tensors(tmp_path / "saved").keys()
    assert names == original_model.state_dict().keys()
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in names
    assert [name for name in names if "W_pack" in name or "in_proj_weight" in name] == []
    for module in ("configuration_baichuan_audio", "modeling_baichuan_audio", "generation_baichuan_audio", "modeling_vocoder"):
        assert (tmp_path / "saved" / f"{module}.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(all_logits(again), all_logits(original_model))


def test_saved_checkpoint_has_the_files_of_a_converted_one(tmp_path, original_folder, converted_folder):
    AutoModelForCausalLM.from_pretrained(original_folder).save_pretrained(tmp_path / "saved")
    folders = (tmp_path / "saved", converted_folder)
    ours, theirs = ({path.name for path in folder.iterdir() if path.suffix == ".py"} for folder in folders)
    assert ours | {"feature_extraction_baichuan_audio.py"} == theirs  # `convert` brings the feature extractor along
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert ours["auto_map"].pop("AutoProcessor")  # this original has no tokenizer, so `convert` made no processor of it
    assert ours["auto_map"] == theirs["auto_map"]


# -------------------- without this package


PROMPT = "Say: <audio_start_baichuan><audio_pad_baichuan><audio_end_baichuan>"
SCRIPT = """
import sys
sys.modules["modeling_baichuan_audio"] = None  # as if it were not installed, also where it is
try:
    import modeling_baichuan_audio
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

prompt, audio, *folders = sys.argv[1:]
for folder in folders:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for ours in (model, processor, processor.feature_extractor, model.config, model.vocoder):
        assert type(ours).__module__.startswith("transformers_modules."), type(ours)
    inputs = processor(text=prompt, audio=load_file(audio)["audio"])
    with torch.no_grad():
        logits = model(**inputs).logits
    waveform = model.decode_audio(torch.zeros(1, 8, 3, dtype=torch.long), seed=0)[0]
    save_file({"logits": logits, "waveform": waveform, **inputs}, folder + ".result")
"""


def test_checkpoints_work_without_this_package(tmp_path, tiny_folder):
    saved = shutil.copytree(tiny_folder, tmp_path / "saved")
    converted = tmp_path / "converted"
    convert_checkpoint(saved, converted)
    audio = torch.sin(torch.arange(16000) / 20) * 0.3
    save_file({"audio": audio}, tmp_path / "audio.safetensors")
    audio_file = str(tmp_path / "audio.safetensors")
    run_elsewhere(tmp_path, "-c", SCRIPT, PROMPT, audio_file, str(saved), str(converted), timeout=300)
    model, processor = AutoModelForCausalLM.from_pretrained(saved).eval(), AutoProcessor.from_pretrained(saved)
    inputs = processor(text=PROMPT, audio=audio)
    with torch.no_grad():
        logits = model(**inputs).logits
    waveform = model.decode_audio(torch.zeros(1, 8, 3, dtype=torch.long), seed=0)[0]
    for folder in (saved, converted):
        result = load_file(f"{folder}.result")
        assert result.keys() - {"logits", "waveform"} == inputs.keys()
        assert [name for name in inputs if not torch.equal(result[name], inputs[name])] == []
        assert torch.equal(result["logits"], logits)
        assert torch.equal(result["waveform"], waveform)
