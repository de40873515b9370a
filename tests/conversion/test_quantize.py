"""8-bit and 4-bit weights: which parts have them, what they weigh, and that the model still says nearly the same."""

import sys

import pytest
import torch

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import eight_bit_weights, find_checkpoint, four_bit_weights


LAYERS = ("model.language_model.layers.", "audio_head.layers.")
PROMPT = torch.arange(20, 60)[None]


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of what a tensor holds, subclasses taken apart."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@pytest.fixture(scope="module")
def full():
    return BaichuanAudioForCausalLM.from_pretrained(find_checkpoint("miniature"))


@torch.no_grad()
def check_outputs(model, full, most: float, agreeing: float) -> None:
    """Logits that moved by less than `most` on average, their likeliest tokens, and a reply that can be heard."""
    ours, theirs = model(PROMPT).logits, full(PROMPT).logits
    assert (ours - theirs).abs().mean() < most * theirs.abs().mean()
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > agreeing
    reply = model.generate(PROMPT[:, :9], generation_mode="audio", seed=0, max_new_tokens=12, forced_text_ids=[[[30]]])
    assert reply.audio_codes.shape[2] > 0 and reply.audio[0].isfinite().all()


def test_eight_bits_for_the_llm_and_the_audio_head_alone(full):
    pytest.importorskip("torchao")
    folder = find_checkpoint("miniature")
    model = BaichuanAudioForCausalLM.from_pretrained(folder, quantization_config=eight_bit_weights())
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    small = {name for name, tensor in weights.items() if hasattr(tensor, "__tensor_flatten__")}
    assert small == {
        name for name, tensor in weights.items() if name.startswith((*LAYERS, "audio_head.heads.")) and tensor.dim() == 2
    }
    before = sum(stored_bytes(parameter.data) for name, parameter in full.named_parameters() if name in small)
    after = sum(stored_bytes(weights[name]) for name in small)
    assert 3.8 < before / after <= 4.0
    check_outputs(model, full, most=0.02, agreeing=0.9)


def load_in_four_bits():
    pytest.importorskip("bitsandbytes")
    config = four_bit_weights(compute_dtype=torch.float32)
    return BaichuanAudioForCausalLM.from_pretrained(find_checkpoint("miniature"), quantization_config=config)


def test_four_bits_for_the_llm_and_the_audio_head_alone(full):
    model = load_in_four_bits()
    small = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert set(small) == {name for name, parameter in full.named_parameters() if name.startswith(LAYERS) and parameter.dim() == 2}
    before = sum(stored_bytes(full.get_parameter(name).data) for name in small)
    after = sum(stored_bytes(parameter.data) + stored_bytes(parameter.quant_state.absmax) for parameter in small.values())
    assert 7.0 < before / after <= 8.0
    check_outputs(model, full, most=0.1, agreeing=0.8)


def test_four_bits_survive_saving(tmp_path):
    model = load_in_four_bits()
    model.save_pretrained(tmp_path)
    again = BaichuanAudioForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


def test_an_adapter_on_four_bits():
    """QLoRA: the gradient passes the quantised weights, the adapter alone moves."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        peft.prepare_model_for_kbit_training(load_in_four_bits()),
        peft.LoraConfig(target_modules=r"model\.language_model\..*\.[qv]_proj", r=4),
    )
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(PROMPT, labels=PROMPT).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("weights", "library", "hidden"),
    [(eight_bit_weights, "torchao", "torchao.quantization"), (four_bit_weights, "bitsandbytes", "bitsandbytes")],
)
def test_without_the_library(weights, library, hidden, monkeypatch):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ValueError, match=f"need {library}"):
        weights()
