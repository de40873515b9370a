"""Folders for the Hub: what is in them, and that they work with this package and without it."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ecosystem
from helpers.processes import run_elsewhere
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, pipeline
from typer.testing import CliRunner

from modeling_baichuan_audio import (
    BaichuanAudioForCausalLM,
    BaichuanAudioTokenizerModel,
    BaichuanAudioVocoder,
    BaichuanAudioWaveformDecoder,
    hub_card,
)
from modeling_baichuan_audio.cli import app
from modeling_baichuan_audio.conversion import (
    convert_checkpoint,
    export,
    export_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)


ROOT = Path(__file__).parents[2]
SHARD = 1_000_000


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "folder"
    export_checkpoint(tiny_folder, folder, max_shard_size=SHARD)
    return folder


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_modules(folder):
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def check_code(folder):
    """Every name that the folder's settings refer to is there, and so is every file that its code imports."""
    modules = code_modules(folder)
    config = read_json(folder / "config.json")
    processor = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    references = [*config["auto_map"].values(), *(entry["impl"] for entry in config.get("custom_pipelines", {}).values())]
    references += [*processor.get("auto_map", {}).values(), *processor.get("feature_extractor", {}).get("auto_map", {}).values()]
    for reference in references:
        module, name = reference.split(".")
        assert re.search(rf"^class {name}\b", modules[module], flags=re.MULTILINE), reference
    for name, source in modules.items():
        imported = re.findall(r"^\s*from (\.\S*) import", source, flags=re.MULTILINE)
        assert {module.removeprefix(".") for module in imported} <= modules.keys(), name
        assert "modeling_baichuan_audio import" not in re.sub(r'""".*?"""', "", source, flags=re.DOTALL).replace(
            "from .modeling_baichuan_audio import", ""
        ), name


# -------------------- what is in the folder


def test_folder_is_complete(exported, tiny_folder, assert_same_tensors, read_tensors):
    check_code(exported)
    assert_same_tensors(read_tensors(exported), load_file(tiny_folder / "model.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "README.md"):
        assert (exported / name).is_file(), name
    ours, theirs = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (exported, tiny_folder))
    assert ours == theirs
    assert exported.parent.joinpath(f".{exported.name}.part").exists() is False


def test_code_of_a_saved_model_is_that_of_an_exported_one(exported, tiny_folder):
    ours, saved = code_modules(exported), code_modules(tiny_folder)
    assert ours == saved
    package = ROOT / "modeling_baichuan_audio"
    for part in ("streaming", "pipeline", "modeling", "generation"):
        for path in package.glob(f"{part}_*.py"):
            assert path.stem in ours, f"{path.name} is not carried along: nothing that is saved imports it"


def test_weights_are_in_shards(exported):
    index = read_json(exported / "model.safetensors.index.json")
    shards = sorted(exported.glob("*.safetensors"))
    assert {path.name for path in shards} == set(index["weight_map"].values()) and len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= SHARD


def test_every_kind_of_class_is_named(exported):
    config = read_json(exported / "config.json")
    assert config["auto_map"].keys() == {
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoModel",
        "AutoModelForAudioTokenization",
        "AutoModelForCausalLM",
        "AutoModelForMultimodalLM",
        "AutoModelForTextToSpectrogram",
        "AutoModelForTextToWaveform",
        "AutoProcessor",
    }
    assert config["custom_pipelines"].keys() == {"any-to-any", "flow-matching-vocoder", "text-to-audio", "text-to-speech"}


@pytest.mark.parametrize(
    "part", [BaichuanAudioTokenizerModel, BaichuanAudioVocoder, BaichuanAudioWaveformDecoder], ids=lambda part: part.__name__
)
def test_a_part_saved_alone_carries_its_code(part, tiny_folder, tmp_path):
    part.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    check_code(tmp_path)
    assert "modeling_baichuan_audio" not in code_modules(tmp_path), "the LLM's file has no part in it"


def test_original_checkpoint(make_original, tmp_path):
    original = make_original()
    with pytest.raises(ValueError, match="has no tokenizer"):
        export_checkpoint(original, tmp_path / "out")
    convert_checkpoint(original, tmp_path / "converted")  # and where no processor is saved, none is named
    check_code(tmp_path / "converted")
    tiny_tokenizer().save_pretrained(original)
    (original / "README.md").write_text("Card of the original")
    export_checkpoint(original, tmp_path / "out")
    check_code(tmp_path / "out")
    assert "| vocoder | none |" in (tmp_path / "out" / "README.md").read_text()
    assert "omni" not in (tmp_path / "out" / "config.json").read_text()


# -------------------- model card


def test_metadata_of_the_card(exported):
    metadata = ModelCard.load(exported / "README.md").data.to_dict()
    assert metadata == ModelCard.load(ROOT / "model_card.md").data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "any-to-any"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["zh", "en"]


def test_text_of_the_card(exported):
    text = (exported / "README.md").read_text(encoding="utf-8")
    model = tiny_model()
    for part in (model.audio_tokenizer, model.audio_head, model.flow_matching, model.vocoder):
        assert f"| {sum(parameter.numel() for parameter in part.parameters()):,} |" in text
    assert "8 codebooks of 64, 32," in text and "trust_remote_code=True" in text
    assert "## Limits" in text and "miniature" not in text and "here-only" not in text
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]+)\)", text))
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    compile(code, "README.md", "exec")


def test_card_without_a_vocoder(monkeypatch):
    model = tiny_model(config=tiny_config(vocoder_config=None))
    assert "| vocoder | none |" in hub_card.checkpoint_card(model) and "output_audio=False" in hub_card.checkpoint_card(model)
    monkeypatch.setattr(hub_card, "package_card", lambda: None)  # code from a checkpoint's folder
    short = hub_card.checkpoint_card(model)
    assert short.startswith("---\n") and "## This checkpoint" in short


def test_a_card_that_somebody_wrote_stays(tiny, tmp_path, tiny_folder):
    tiny.save_pretrained(tmp_path)
    made = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(made + "\nedited")
    tiny.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == made
    (tmp_path / "README.md").write_text("My model")
    tiny.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My model"
    export_checkpoint(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "My model"


# -------------------- push


class FakeApi:
    """Stands for the Hub: keeps what is uploaded."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create", repo_id, kwargs.get("private")))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **kwargs):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    def create_commit(self, repo_id, operations, **kwargs):
        texts = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self.calls.append(("commit", repo_id, {name: Path(path).read_bytes() for name, path in texts.items()}))


def test_push(tiny_folder, tmp_path, monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(export, "HfApi", lambda: api)
    export_checkpoint(tiny_folder, tmp_path / "out", push="me/model", private=True)
    assert api.calls[0] == ("create", "me/model", True)
    assert api.calls[1] == ("upload", "me/model", sorted(path.name for path in (tmp_path / "out").iterdir()))


def test_push_that_fails_leaves_the_folder(tiny_folder, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    monkeypatch.setattr(export, "HfApi", FakeApi)
    with pytest.raises(ValueError, match="is written, but cannot be pushed to me/model: no network"):
        export_checkpoint(tiny_folder, tmp_path / "out", push="me/model")
    check_code(tmp_path / "out")


def test_push_to_hub_sends_our_card(tiny, monkeypatch):
    api = FakeApi()

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no card")

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args: api)
    monkeypatch.setattr(ModelCard, "load", no_card)
    tiny.push_to_hub("me/model")
    files = api.calls[-1][2]
    assert b"pipeline_tag: any-to-any" in files["README.md"] and b"## This checkpoint" in files["README.md"]
    assert "modeling_baichuan_audio.py" in files and "pipeline_speech.py" in files


# -------------------- command


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_command(tiny_folder, tmp_path):
    result = run(tiny_folder, tmp_path / "out")
    assert result.exit_code == 0 and re.search(r"out: \d+ tensors, 0.00 GB in 1 weight files", result.stdout)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is BaichuanAudioForCausalLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "{full}"], "exists already"),
        (["/nowhere", "{out}"], "neither a folder nor"),
        (["{empty}", "{out}"], "has no config.json"),
        (["{bare}", "{out}"], "has no tokenizer"),
        (["{tiny}", "{out}", "--push", "a/b/c"], "Repo id must be"),
    ],
)
def test_bad_input(arguments, message, tiny_folder, tmp_path):
    places = {name: tmp_path / name for name in ("full", "empty", "bare", "out")}
    for name in ("full", "empty", "bare"):
        places[name].mkdir()
    (places["full"] / "file").write_text("")
    (places["bare"] / "config.json").write_text((tiny_folder / "config.json").read_text())
    result = run(*[argument.format(tiny=tiny_folder, **places) for argument in arguments])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr
    assert not places["out"].exists() and not list(tmp_path.glob(".*part*"))


# -------------------- with the package and without it


@pytest.mark.slow
def test_folders_work_with_the_package_and_without_it(exported, tmp_path, assert_same_tensors):
    """Every Auto class and every pipeline, on an exported folder, a changed copy of it, and a copy saved where the package is not."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.vocoder.conv_post.bias.add_(0.1)
    changed, target = tmp_path / "changed", tmp_path / "results"
    model.save_pretrained(changed)
    AutoProcessor.from_pretrained(exported).save_pretrained(changed)
    target.mkdir()
    run_elsewhere(tmp_path, ecosystem.__file__, str(target), str(exported), str(changed), timeout=900)
    for number, folder in enumerate([exported, changed, target / "copy"]):
        ours, classes = ecosystem.all_results(str(folder), pipelines=number != 1)
        assert all(named.__module__.startswith("modeling_baichuan_audio.") for named in classes)
        assert_same_tensors(ours, load_file(target / f"{number}.safetensors"))
    first, second = (load_file(target / f"{number}.safetensors") for number in (0, 1))
    assert not torch.equal(first["causal"], second["causal"]) and not torch.equal(first["decoder"], second["decoder"])
    assert_same_tensors(first, load_file(target / "2.safetensors"))
    for folder in (changed, target / "copy", target / "decoder"):
        check_code(folder)
    parts = load_file(target / "parts.safetensors")
    assert parts["sizes"][0] == parts["sizes"][1]
    whole = pipeline("flow-matching-vocoder", model=str(exported))
    assert (whole(ecosystem.CODES[0], seed=2)["audio"] == parts["sound"].numpy()).all()
