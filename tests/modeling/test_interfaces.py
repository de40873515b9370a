"""What users of transformers reach for: dtypes, devices, attention kernels, hidden states, vocabulary, export, parallelism, workers."""

import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import tiny_config, tiny_model


IDS = torch.tensor([[10, 11, 12, 13]])


def spoken_prompt(model, frames: int = 4) -> dict[str, torch.Tensor]:
    config = model.config
    ids = [10, 11, config.audio_start_token_id, *[config.audio_pad_token_id] * frames, config.audio_end_token_id, 12]
    return {"input_ids": torch.tensor([ids]), "audio_codes": torch.arange(8 * frames).reshape(1, 8, frames) % 16}


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    result = model(**spoken_prompt(model), output_audio_logits=True)
    return [result.logits, *result.audio_logits]


def assert_same(ours: list[torch.Tensor], reference: list[torch.Tensor], atol: float = 1e-5) -> None:
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


# --- loading -------------------------------------------------------------------------------------------------------------------


def test_dtype_of_the_checkpoint(tiny, tmp_path):
    """ "auto" is what the checkpoint was saved in; codebooks and vocoder stay in float32."""
    tiny.bfloat16().save_pretrained(tmp_path)
    for kwargs in ({"dtype": "auto"}, {}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
        assert {model.dtype, model.lm_head.weight.dtype, model.audio_tokenizer.encoder.conv1.weight.dtype} == {torch.bfloat16}
        assert model.vocoder.conv_pre.weight.dtype == model.audio_tokenizer.quantizer.codebooks[0].embed.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_device_map(tiny_folder):
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert_same(outputs(AutoModelForCausalLM.from_pretrained(tiny_folder, device_map=device_map)), outputs(reference), 0)


def test_layers_of_the_llm_on_disk(tiny_folder, tmp_path):
    """What does not fit into memory is the LLM: its layers come from the disk when they are needed, in spoken replies too."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    parts = ["lm_head", "audio_head", "flow_matching", "vocoder", "model.audio_embed_layers", "model.audio_tokenizer"]
    parts += [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")]
    device_map = dict.fromkeys(parts, "cpu") | {"model.language_model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map=device_map, offload_folder=tmp_path)
    assert model.model.language_model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert_same(outputs(model), outputs(reference))
    settings = {"generation_mode": "audio", "seed": 0, "max_new_tokens": 14, "max_text_tokens": 3}
    ours, theirs = (each.generate(IDS, **settings) for each in (model, reference))
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.audio_codes, theirs.audio_codes)
    torch.testing.assert_close(ours.audio[0], theirs.audio[0])
    # Caches are kept in lists, and the hooks that move arguments between devices copy lists.
    settings = {name: value for name, value in settings.items() if name != "generation_mode"}
    streams = [list(each.stream(input_ids=IDS, latency="low_latency", **settings)) for each in (model, reference)]
    sounds = [torch.cat([event.waveform for event in events if event.waveform is not None]) for events in streams]
    # How many frames a push holds depends on the threads' pace, and the running statistics on that: so no sample by sample.
    assert len(sounds[0]) == len(sounds[1]) and sounds[0].isfinite().all()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_of_every_part(tiny_folder, kernel):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation=kernel)
    parts = [model.model.language_model, model.audio_tokenizer, model.audio_head, model.flow_matching]
    assert [part.config._attn_implementation for part in parts] == [kernel] * 4
    assert_same(outputs(model), outputs(AutoModelForCausalLM.from_pretrained(tiny_folder)))
    model.set_attn_implementation("eager")
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="flex attention is compiled, which needs a C++ compiler")
def test_flex_attention_of_the_llm(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation={"text_config": "flex_attention", "": "sdpa"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    assert model.audio_tokenizer.config._attn_implementation == "sdpa"
    assert_same(outputs(model), outputs(AutoModelForCausalLM.from_pretrained(tiny_folder)))


def test_attention_that_is_not_there_is_refused(tiny_folder):
    with pytest.raises(ValueError, match="flex_attention"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="surprise"):
        AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="surprise")
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match="FlashAttention2"):
            AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="flash_attention_2")


def test_what_is_missing_is_listed_where_asked_for(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        BaichuanAudioForCausalLM.from_pretrained(tmp_path)
    model, info = BaichuanAudioForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {"lm_head.weight", "audio_head.norm.weight"} <= set(info["missing_keys"])
    assert not any(name.startswith("model.") for name in info["missing_keys"])
    assert torch.equal(model.get_input_embeddings().weight, tiny.get_input_embeddings().weight)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# --- outputs -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_states_and_attentions(tiny):
    tiny.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    prompt, features = spoken_prompt(tiny), torch.randn(2, 128, 40)
    whole = tiny(**prompt, **asked)
    length = prompt["input_ids"].shape[1]
    assert [tuple(states.shape) for states in whole.hidden_states] == [(1, length, 64)] * 3
    assert [tuple(weights.shape) for weights in whole.attentions] == [(1, 4, length, length)] * 2
    assert torch.equal(whole.hidden_states[-1], whole.last_hidden_state)
    assert tiny(**prompt).hidden_states is None
    encoded, features_of_llm = tiny.audio_tokenizer.encode(features, **asked), tiny.get_audio_features(features, **asked)
    for result in (encoded, features_of_llm, tiny.audio_tokenizer(features, **asked)):
        assert [tuple(states.shape) for states in result.hidden_states] == [(2, 20, 32)] * 3, "of the encoder alone"
        assert [tuple(weights.shape) for weights in result.attentions] == [(2, 2, 20, 20)] * 2
    assert torch.equal(encoded.hidden_states[-1], encoded.last_hidden_state)
    flow = tiny.flow_matching(torch.randn(1, 8, 32), seed=0, **asked)
    assert [tuple(states.shape) for states in flow.hidden_states] == [(1, 8, 32)] * 3, "of the pre-net"
    assert [tuple(weights.shape) for weights in flow.attentions] == [(1, 2, 8, 8)] * 2


@torch.no_grad()
def test_logits_to_keep(shared_tiny_model):
    prompt = spoken_prompt(shared_tiny_model)
    every = shared_tiny_model(**prompt).logits
    for kept, expected in ((0, every), (1, every[:, -1:]), (3, every[:, -3:]), (torch.tensor([2, 5]), every[:, [2, 5]])):
        torch.testing.assert_close(shared_tiny_model(**prompt, logits_to_keep=kept).logits, expected, atol=1e-6, rtol=0)


def test_tuples_where_asked_for(shared_tiny_model):
    prompt = spoken_prompt(shared_tiny_model)
    with torch.no_grad():
        as_tuple, as_output = (shared_tiny_model(**prompt, return_dict=flag) for flag in (False, True))
        assert torch.equal(as_tuple[0], as_output.logits)
        mel = torch.randn(1, 8, 80)
        assert torch.equal(
            shared_tiny_model.vocoder(mel, seed=0, return_dict=False)[0], shared_tiny_model.vocoder(mel, seed=0)[0]
        )


# --- training and vocabulary ---------------------------------------------------------------------------------------------------


def test_activation_checkpointing_of_every_part():
    gradients = []
    for checkpointing in (True, False):
        model = tiny_model()
        if checkpointing:
            # The second name is of older releases.
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
            assert all(layer.gradient_checkpointing for layer in layers.values())
            for part in ("language_model", "encoder", "mel_decoder", "audio_head", "prenet", "estimator"):
                assert any(part in name for name in layers), part
        model.train()
        features = torch.linspace(-1, 1, 128 * 33).reshape(1, 128, 33)
        loss = model.audio_tokenizer(
            features,
            coarse_labels=torch.zeros(1, 2 * (4 * 4 - 1), 80),
            mel_labels=torch.zeros_like(model.audio_tokenizer(features).refined_mel),
            generator=torch.Generator().manual_seed(0),
        ).loss
        loss.backward()
        gradients.append(
            [layer.weight.grad for layer in (model.audio_tokenizer.encoder.conv1, model.audio_tokenizer.mel_decoder.in_proj)]
        )
    for ours, reference in zip(*gradients):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary(tied, tmp_path):
    config = tiny_config(tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = tied
    model = tiny_model(config=config)
    reference = outputs(model)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model.config.text_config.vocab_size == model.vocab_size == 300
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.shape == again.get_input_embeddings().weight.shape == (300, 64)
    found = outputs(again)
    assert_same([found[0][..., :288], *found[1:]], reference)
    prompt = spoken_prompt(again)
    assert again(**prompt, labels=prompt["input_ids"]).loss.isfinite()
    assert again.generate(**prompt, max_new_tokens=2, do_sample=False).shape == (1, prompt["input_ids"].shape[1] + 2)


# --- export --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_export_of_the_encoder(shared_tiny_model):
    """One program for every batch and length."""
    encoder = shared_tiny_model.audio_tokenizer.encoder
    batch, frames = Dim("batch", min=1, max=64), Dim("frames", min=16, max=3000)
    example = torch.randn(2, 128, 40), torch.tensor([40, 33])
    program = export(encoder, example, dynamic_shapes=({0: batch, 2: frames}, {0: batch})).module()
    for rows, length in ((2, 40), (3, 101), (1, 57)):
        features, lengths = torch.randn(rows, 128, length), torch.randint(10, length, (rows,))
        for ours, reference in zip(program(features, lengths), encoder(features, lengths)):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


@torch.no_grad()
def test_export_of_the_flow_estimator(shared_tiny_model):
    estimator = shared_tiny_model.flow_matching.estimator
    batch, frames = Dim("batch", min=1, max=64), Dim("frames", min=4, max=3000)
    example = torch.randn(2, 30, 80), torch.tensor([0.2, 0.5]), torch.randn(2, 30, 80)
    shapes = ({0: batch, 1: frames}, {0: batch}, {0: batch, 1: frames})
    program = export(estimator, example, dynamic_shapes=shapes).module()
    for rows, length in ((2, 30), (3, 77), (1, 12)):
        inputs = torch.randn(rows, length, 80), torch.rand(rows), torch.randn(rows, length, 80)
        torch.testing.assert_close(program(*inputs), estimator(*inputs), atol=1e-5, rtol=0)


# --- processes -----------------------------------------------------------------------------------------------------------------


def test_plans_name_what_is_there(shared_tiny_model):
    names = {name for name, _ in shared_tiny_model.named_modules()}
    for plan in (shared_tiny_model.tp_plan, shared_tiny_model.fsdp_plan):
        assert "lm_head" in plan and "model.language_model.embed_tokens" in plan
        assert all(name.replace("*", "0") in names for name in plan)
    inner = {name for name in shared_tiny_model.tp_plan if name.startswith("model.language_model.layers.*.")}
    assert len(inner) >= len(shared_tiny_model.config.text_config.base_model_tp_plan)


SHARDED = """
import sys, torch
import torch.distributed as dist
from transformers.distributed.configuration_utils import DistributedConfig
from modeling_baichuan_audio import BaichuanAudioForCausalLM

folder, out = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = BaichuanAudioForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
inputs = torch.load(f"{out}/inputs.pt")
with torch.no_grad():
    result = model(**inputs, output_audio_logits=True)
sequences = model.generate(**inputs, do_sample=False, max_new_tokens=6)
width = model.model.language_model.layers[0].mlp.up_proj.weight.to_local().shape[0]
if dist.get_rank() == 0:
    torch.save({"outputs": [result.logits, *result.audio_logits], "sequences": sequences, "width": width}, f"{out}/found.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_llm(tiny_folder, tmp_path):
    """Tensor parallelism by `base_model_tp_plan`: half of each layer in each process, the same logits."""
    distributed = pytest.importorskip("transformers.distributed.configuration_utils", reason="needs a newer transformers")
    assert "tp_size" in inspect.signature(distributed.DistributedConfig).parameters
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    inputs = spoken_prompt(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tiny_folder), str(tmp_path)], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert_same(found["outputs"], outputs(model))
    assert torch.equal(found["sequences"], model.generate(**inputs, do_sample=False, max_new_tokens=6))
    assert found["width"] == model.config.text_config.intermediate_size // 2


class Prompts(torch.utils.data.Dataset):
    """Recordings that a worker process turns into inputs with its copy of the processor."""

    def __init__(self, processor):
        self.processor = processor

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        waveform = torch.sin(torch.arange(4000 + 1600 * index) / 20).numpy()
        return self.processor.apply_transcription_request(waveform)


def test_the_processor_in_worker_processes(tiny_folder):
    """Spawned workers know nothing but what they are sent: the processor itself has to arrive whole."""
    prompts = Prompts(AutoProcessor.from_pretrained(tiny_folder))
    loader = torch.utils.data.DataLoader(prompts, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for index, inputs in enumerate(loader):
        reference = prompts[index]
        assert set(inputs) == set(reference)
        assert all(torch.equal(inputs[name], reference[name]) for name in reference)
