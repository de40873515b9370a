import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modeling_baichuan_audio.conversion import tiny_config, tiny_model
from modeling_baichuan_audio.training.stages import STAGES, apply_stage, lora_config


def batch(model, seed: int = 0):
    """Audio in, text and audio out: every part of the LLM takes part."""
    torch.manual_seed(seed)
    config = model.config
    start, pad, end = config.audiogen_start_token_id, config.audio_pad_token_id, config.audiogen_end_token_id
    ids = torch.tensor([[1, 2, start, *[pad] * 4, end, 5, 6]])
    codes = torch.stack([torch.randint(0, size, (1, 4)) for size in config.audio_tokenizer_config.codebook_sizes], dim=1)
    audio_labels = torch.full((1, 8, 10), -100)
    audio_labels[:, :, 3:7] = codes
    audio_labels[:, 0, 7] = 64
    labels = torch.full_like(ids, -100)
    labels[0, 8:] = ids[0, 8:]
    return {"input_ids": ids, "audio_codes": codes, "labels": labels, "audio_labels": audio_labels}


def expected_names(model, stage: str) -> set[str]:
    """The stages spelled out, not by the patterns that the code uses."""
    names = [name for name, _ in model.named_parameters()]
    audio = {
        name for name in names if name.split(".")[:2] == ["model", "audio_embed_layers"] or name.split(".")[0] == "audio_head"
    }
    body = {name for name in names if name.startswith("model.language_model.")}
    return {
        "stage1": audio,
        "stage2": audio | body - {"model.language_model.embed_tokens.weight"},
        "sft": audio | body | {"lm_head.weight"},
        "tokenizer": {name for name in names if ".audio_tokenizer." in name},
        "mel_decoder": {name for name in names if ".audio_tokenizer.mel_decoder." in name},
        "flow_matching": {name for name in names if name.startswith("flow_matching.")},
        "mel_and_flow": {n for n in names if ".audio_tokenizer.mel_decoder." in n or n.startswith("flow_matching.")},
        "vocoder": {name for name in names if name.startswith("vocoder.")},
    }[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_exactly_its_parameters(stage):
    model = tiny_model()
    assert set(apply_stage(model, stage)) == expected_names(model, stage)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected_names(model, stage)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_gradients_reach_exactly_what_trains(stage):
    model = tiny_model().train()
    trained = set(apply_stage(model, stage))
    model(**batch(model)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    # The last codebook's embedding is heard by the LLM; the end-of-audio rows alone have no gradient.
    silent = {name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert not silent


def test_stages_of_a_tied_model():
    config = tiny_config(tie_word_embeddings=True)
    config.text_config.tie_word_embeddings = True
    model = tiny_model(config=config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any("embed_tokens" in name or "lm_head" in name for name in apply_stage(model, "stage2"))
    assert any("embed_tokens" in name for name in apply_stage(model, "sft"))


def test_unknown_and_missing_stages_are_refused():
    with pytest.raises(ValueError, match="must be one of stage1"):
        apply_stage(tiny_model(), "stage3")
    with pytest.raises(ValueError, match="nothing to train"):
        apply_stage(tiny_model(config=tiny_config(vocoder_config=None)), "vocoder")


@pytest.mark.parametrize(
    ("target", "saved"), [("backbone", []), ("audio_head", []), ("both", ["audio_embed_layers"]), ("backbone", ["audio_head"])]
)
def test_lora_trains_exactly_its_targets(target, saved):
    model = tiny_model()
    adapted = get_peft_model(model, lora_config(model, target, rank=4, modules_to_save=saved)).train()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    for name in trained:
        in_backbone, in_head = ".language_model." in name, ".audio_head." in name
        if "modules_to_save" in name:
            assert any(f".{part}." in name for part in saved), name
        else:
            assert "lora_" in name and (
                in_backbone if target == "backbone" else in_head if target == "audio_head" else in_backbone or in_head
            )
    layers = 2
    per_layer = {"backbone": 7, "audio_head": 4 + 2 * 8}
    expected = 2 * layers * sum(per_layer[part] for part in per_layer if target in (part, "both"))
    assert sum("lora_" in name for name in trained) == expected
    adapted(**batch(model)).loss.backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == trained


@pytest.fixture
def trained_adapter(tiny_folder, tmp_path):
    """Three steps of LoRA on both parts, saved."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = get_peft_model(base, lora_config(base, "both", rank=4, modules_to_save=["audio_embed_layers"])).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        adapted(**batch(base, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted.eval(), tmp_path / "adapter"


@torch.no_grad()
def outputs(model, base):
    result = model(**batch(base), output_audio_logits=True)
    return [result.logits, *result.audio_logits]


@torch.no_grad()
def test_adapters_load_three_ways_and_merge(trained_adapter, tiny_folder):
    adapted, folder = trained_adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    reference, untrained = outputs(adapted, base), outputs(base, base)
    assert not torch.allclose(reference[0], untrained[0], atol=1e-3)
    assert not torch.allclose(reference[1], untrained[1], atol=1e-3)
    ways = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ]
    for model in ways:
        for ours, theirs in zip(outputs(model.eval(), base), reference):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    merged = ways[0].merge_and_unload()
    for ours, theirs in zip(outputs(merged, base), reference):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_adapters_switch_per_request(trained_adapter, tiny_folder):
    _, folder = trained_adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain = outputs(base, base)[0]
    model = PeftModel.from_pretrained(base, folder, adapter_name="voice").eval()
    with_adapter = outputs(model, base)[0]
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, base)[0], plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs(model, base)[0], with_adapter, atol=0, rtol=0)
    prompt = torch.tensor([[1, 2, 3]])
    options = {"generation_mode": "audio", "output_audio": False, "seed": 0, "max_new_tokens": 12}
    spoken = model.generate(input_ids=prompt, **options)
    with model.disable_adapter():
        other = model.generate(input_ids=prompt, **options)
    assert not torch.equal(spoken.sequences, other.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "everything"}, "must be one of backbone"),
        ({"modules_to_save": ["vocoder"]}, "may hold"),
        ({"target": "both", "modules_to_save": ["audio_head"]}, "not both"),
    ],
)
def test_bad_lora_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(tiny_model(), **options)


def test_frozen_parts_stay_as_they_are(tiny):
    encoder = {name for name, _ in tiny.named_parameters() if name.startswith("model.audio_tokenizer.encoder.")}
    everything = set(apply_stage(tiny, "tokenizer"))
    assert encoder and encoder < everything
    assert set(apply_stage(tiny, "tokenizer", ["model.audio_tokenizer.encoder."])) == everything - encoder
    assert {name for name, parameter in tiny.named_parameters() if parameter.requires_grad} == everything - encoder
    with pytest.raises(ValueError, match="Nothing to freeze is called nowhere."):
        apply_stage(tiny, "tokenizer", ["nowhere."])
