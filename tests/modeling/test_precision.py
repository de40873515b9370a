"""The same modules in bfloat16: finite, and within 5% of float32 (relative to the norm of the result)."""

import copy

import pytest
import torch
from helpers.golden import golden

from modeling_baichuan_audio import BaichuanAudioForCausalLM


@pytest.fixture(scope="module")
def half(converted_folder):
    return BaichuanAudioForCausalLM.from_pretrained(converted_folder, dtype=torch.bfloat16)


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 0.05) -> None:
    assert ours.isfinite().all()
    error = (ours.float() - reference.float()).norm() / reference.float().norm()
    assert error < tolerance, f"relative error {float(error):.3f}"


@torch.no_grad()
def test_encoder(half, converted_model):
    features = golden()["features.2.0"][None]
    lengths = torch.tensor([features.shape[2]])
    ours, _ = half.audio_tokenizer.encoder(features.bfloat16(), lengths)
    reference, _ = converted_model.audio_tokenizer.encoder(features, lengths)
    assert ours.dtype == torch.bfloat16
    close(ours, reference)
    close(half.audio_tokenizer.bridge(reference.bfloat16()), converted_model.audio_tokenizer.bridge(reference))


@torch.no_grad()
def test_mel_decoder(half, converted_model):
    codes = golden()["codes.2.0"].T[None]
    ours, reference = half.audio_tokenizer.decode(codes), converted_model.audio_tokenizer.decode(codes)
    for name in ("hidden_states", "coarse_mel", "refined_mel"):
        close(ours[name], reference[name])


@torch.no_grad()
def test_flow_matching(half, converted_model):
    states, noise = golden()["decoder_hidden.2.0"][None], golden()["z.2.0"].T[None]
    ours, reference = half.flow_matching(states, noise=noise), converted_model.flow_matching(states, noise=noise)
    assert half.flow_matching.prenet.in_fc1.weight.dtype == torch.bfloat16
    close(ours.condition, reference.condition)
    close(ours.mel, reference.mel)


@torch.no_grad()
def test_vocoder(half, converted_model):
    """It is loaded in float32 whatever is asked for. Cast by hand, only its weights are rounded, which alone costs 5.3% here."""
    mel, source = golden()["vocoder_mel.1.0"].T[None], golden()["vocoder_source.1.0"]
    reference = converted_model.vocoder(mel, source=source)
    assert half.vocoder.conv_pre.weight.dtype == torch.float32
    assert torch.equal(half.vocoder(mel, source=source).waveform, reference.waveform)
    cast = copy.deepcopy(converted_model.vocoder).bfloat16()(mel, source=source)
    assert cast.waveform.dtype == torch.float32
    close(cast.waveform, reference.waveform, tolerance=0.08)


@torch.no_grad()
def test_language_model_and_audio_head(half, converted_model):
    ids, codes = golden()["llm.prompt"], golden()["codes.1.0"].T[None]
    ours = half(input_ids=ids, audio_codes=codes, output_audio_logits=True)
    reference = converted_model(input_ids=ids, audio_codes=codes, output_audio_logits=True)
    close(ours.logits, reference.logits)
    for half_logits, logits in zip(ours.audio_logits, reference.audio_logits):
        close(half_logits, logits)


@torch.no_grad()
def test_a_spoken_reply(half):
    result = half.generate(torch.tensor([[5, 6, 7]]), generation_mode="audio", max_new_tokens=20, max_text_tokens=4, seed=0)
    assert result.audio[0].dtype == torch.float32 and result.audio[0].isfinite().all() and result.audio[0].numel() > 0
