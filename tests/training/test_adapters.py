"""An adapter's way from training into another process, and into the weights. What an adapter trains is tested in test_stages.py."""

import pytest
import torch
from helpers.processes import run_elsewhere
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_baichuan_audio.conversion import export_checkpoint
from modeling_baichuan_audio.training.stages import lora_config


# One line per way of loading: `adapter` and `merged` are folders, `base` that of the model below.
LOADING = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
import modeling_baichuan_audio

base, adapter, merged, out = sys.argv[1:]
plain = AutoModelForCausalLM.from_pretrained(base)
plain.load_adapter(adapter)
ways = {
    "PeftModel.from_pretrained": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "load_adapter": plain,
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModelForCausalLM of the adapter": AutoModelForCausalLM.from_pretrained(adapter),
    "merged": AutoModelForCausalLM.from_pretrained(merged),
}
inputs, found = torch.load(f"{out}/inputs.pt"), {}
for name, model in ways.items():
    with torch.no_grad():
        result = model.eval()(**inputs, output_audio_logits=True)
    found[name] = [result.logits, *result.audio_logits]
torch.save(found, f"{out}/found.pt")
"""

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["modeling_baichuan_audio"] = None  # as if it were not installed, also where it is
import torch
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    result = model(**torch.load(f"{out}/inputs.pt"), output_audio_logits=True)
torch.save([result.logits, *result.audio_logits], f"{out}/found.pt")
"""


def spoken_row(model) -> dict[str, torch.Tensor]:
    config = model.config
    start, pad, end = config.audiogen_start_token_id, config.audio_pad_token_id, config.audiogen_end_token_id
    return {
        "input_ids": torch.tensor([[1, 2, start, *[pad] * 4, end, 5, 6]]),
        "audio_codes": torch.arange(32).reshape(1, 8, 4) % 16,
    }


@torch.no_grad()
def outputs(model, row) -> list[torch.Tensor]:
    result = model(**row, output_audio_logits=True)
    return [result.logits, *result.audio_logits]


@pytest.fixture
def trained(tiny_folder):
    """Three steps of LoRA on LLM and audio head, with the audio embeddings trained whole."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    row = spoken_row(base)
    audio_labels = torch.full((1, 8, 10), -100)
    audio_labels[:, :, 3:7] = row["audio_codes"]
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(base, "both", rank=4, modules_to_save=["audio_embed_layers"])).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**row, labels=row["input_ids"], audio_labels=audio_labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), row


def test_an_adapter_in_a_fresh_process(trained, tiny_folder, tmp_path):
    model, row = trained
    reference = outputs(model, row)
    assert not torch.allclose(reference[0], outputs(AutoModelForCausalLM.from_pretrained(tiny_folder), row)[0], atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    for ours, expected in zip(outputs(merged, row), reference, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.save(row, tmp_path / "inputs.pt")

    folders = [str(tiny_folder), str(tmp_path / "adapter"), str(tmp_path / "merged"), str(tmp_path)]
    run_elsewhere(tmp_path, "-c", LOADING, *folders, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 5
    for way, ours in found.items():
        for one, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(one, expected, atol=1e-5, rtol=0, msg=lambda text, way=way: f"{way}: {text}")


def test_a_merged_model_is_a_model_like_any_other(trained, tmp_path):
    model, row = trained
    reference = outputs(model, row)
    merged = model.merge_and_unload()
    assert not any("lora_" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    for step in range(2):  # saved, loaded, and both once more
        merged.save_pretrained(tmp_path / str(step))
        merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(step), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for ours, expected in zip(outputs(merged.eval(), row), reference, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    spoken = merged.generate(row["input_ids"][:, :2], generation_mode="audio", seed=0, max_new_tokens=8, max_text_tokens=2)
    assert spoken.audio[0].isfinite().all()


def test_a_merged_model_exports_and_loads_without_the_package(trained, tiny_folder, tmp_path):
    model, row = trained
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path / "merged")
    export_checkpoint(tmp_path / "merged", tmp_path / "exported")
    torch.save(row, tmp_path / "inputs.pt")
    run_elsewhere(tmp_path, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "exported"), str(tmp_path), timeout=300)
    for ours, expected in zip(torch.load(tmp_path / "found.pt"), outputs(merged, row), strict=True):
        assert torch.equal(ours, expected)
