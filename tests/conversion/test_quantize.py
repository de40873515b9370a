"""8-bit weights: which parts have them, what they weigh, and that the model still says nearly the same."""

import builtins

import pytest
import torch

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import eight_bit_weights, find_checkpoint


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of what a tensor holds, subclasses taken apart."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def test_eight_bits_for_the_llm_and_the_audio_head_alone():
    pytest.importorskip("torchao")
    folder = find_checkpoint("miniature")
    full = BaichuanAudioForCausalLM.from_pretrained(folder)
    model = BaichuanAudioForCausalLM.from_pretrained(folder, quantization_config=eight_bit_weights())
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    small = {name for name, tensor in weights.items() if hasattr(tensor, "__tensor_flatten__")}
    products = ("model.language_model.layers.", "audio_head.layers.", "audio_head.heads.")
    assert small == {name for name, tensor in weights.items() if name.startswith(products) and tensor.dim() == 2}
    before = sum(stored_bytes(parameter.data) for name, parameter in full.named_parameters() if name in small)
    after = sum(stored_bytes(weights[name]) for name in small)
    assert 3.8 < before / after <= 4.0
    ids = torch.arange(20, 60)[None]
    ours, theirs = model(ids).logits, full(ids).logits
    assert (ours - theirs).abs().mean() < 0.02 * theirs.abs().mean()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9
    reply = model.generate(ids[:, :9], generation_mode="audio", seed=0, max_new_tokens=12, forced_text_ids=[[[30]]])
    assert reply.audio_codes.shape[2] > 0 and reply.audio[0].isfinite().all()


def test_without_torchao(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="need torchao"):
        eight_bit_weights()
