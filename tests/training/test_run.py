"""The real command on every tiny recipe: what it trains, writes, resumes, and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_stages import expected_names
from transformers import AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

from modeling_baichuan_audio.cli import app


STAGES = ["stage1", "stage2", "sft", "lora", "tokenizer", "mel_decoder", "flow_matching", "mel_and_flow", "vocoder"]


def run(recipe, train_file, tiny_folder, output, *changes, code=0):
    fixed = [f"data.train={train_file}", f"model={tiny_folder}", f"output={output}", "training.disable_tqdm=true"]
    result = CliRunner().invoke(app, ["train", recipe, *fixed, *changes])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


def logged(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_one_step_of_every_recipe(stage, train_file, tiny_folder, tmp_path):
    everything = "training.per_device_train_batch_size=12"  # rows with and without audio to learn
    result = run(f"tiny/{stage}", train_file, tiny_folder, tmp_path, "training.max_steps=1", "samples.every=1", everything)
    assert "1 rows skipped {'missing_audio': 1}" in result.stdout
    assert list(tmp_path.rglob("events.out.tfevents*")), "TensorBoard"
    first = logged(tmp_path)[0]
    assert first["step"] == 1 and first["loss"] > 0 and len(first) > 5
    wave, rate = soundfile.read(next((tmp_path / "samples").glob("step-0000001-0.wav")))
    assert rate == 24000 and len(wave) > 2400
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows_skipped"] == {"missing_audio": 1}

    before = load_file(tiny_folder / "model.safetensors")
    if stage == "lora":
        adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
        assert any("lora_B" in name and tensor.any() for name, tensor in adapter.items())
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "final") is not None
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert AutoProcessor.from_pretrained(tmp_path / "final").tokenizer is not None
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    buffers = {name for name, _ in model.named_buffers()}
    trained = expected_names(model, stage)
    assert changed - buffers <= trained
    assert len(changed - buffers) > 0.9 * len(trained), sorted(trained - changed)
    assert bool(changed & buffers) == (stage == "tokenizer"), "only tokenizer training moves the codebooks"


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        *((stage, []) for stage in ("stage1", "lora", "tokenizer", "mel_decoder", "flow_matching", "mel_and_flow")),
        ("vocoder", ["loss.pitch=true"]),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(stage, extra, train_file, tiny_folder, tmp_path):
    changes = ["training.max_steps=4", "training.save_steps=2", "samples.every=0", *extra]
    run(f"tiny/{stage}", train_file, tiny_folder, tmp_path / "whole", *changes)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    run(f"tiny/{stage}", train_file, tiny_folder, tmp_path / "cut", *changes)
    whole, cut = (
        {entry["step"]: entry for entry in logged(tmp_path / name) if "grad_norm" in entry} for name in ("whole", "cut")
    )
    assert sorted(whole) == [1, 2, 3, 4] and sorted(cut) == [3, 4]
    assert ("f0_loss" in whole[3]) == (stage == "vocoder")
    for step in (3, 4):
        for key in ("loss", *(key for key in whole[step] if key == "f0_loss")):
            assert cut[step][key] == pytest.approx(whole[step][key], rel=1e-5), key
    weights = [next((tmp_path / name / "final").glob("*.safetensors")) for name in ("whole", "cut")]
    ours, theirs = map(load_file, weights)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)


def test_accumulated_steps_equal_large_batches(train_file, tiny_folder, tmp_path):
    """The same rows in one batch of four or in two of two: the same losses, as means over all targets."""
    common = ["training.max_steps=3", "samples.every=0", "data.group_by_length=false"]
    for name, batch, accumulation in (("large", 4, 1), ("split", 2, 2)):
        sizes = [f"training.per_device_train_batch_size={batch}", f"training.gradient_accumulation_steps={accumulation}"]
        run("tiny/sft", train_file, tiny_folder, tmp_path / name, *common, *sizes)
    large, split = ([entry for entry in logged(tmp_path / name) if "grad_norm" in entry] for name in ("large", "split"))
    for ours, theirs in zip(large, split):
        for key in ("loss", "text_loss", "audio_loss", "codebook_0_loss", "codebook_7_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


def test_packed_rows_have_the_same_losses(train_file, tiny_folder, tmp_path):
    for pack in ("true", "false"):
        changes = ["training.max_steps=1", "samples.every=0", "data.group_by_length=false", f"data.pack={pack}", "loss={}"]
        run("tiny/stage1", train_file, tiny_folder, tmp_path / pack, *changes)
    packed, padded = (logged(tmp_path / name)[0] for name in ("true", "false"))
    assert packed["text_loss"] == pytest.approx(padded["text_loss"], rel=1e-4)
    assert packed["audio_loss"] == pytest.approx(padded["audio_loss"], rel=1e-4)


def test_attention_implementations_have_the_same_losses(train_file, tiny_folder, tmp_path):
    first = []
    for name in ("eager", "sdpa"):
        changes = ["training.max_steps=1", "samples.every=0", f"attn_implementation={name}"]
        run("tiny/stage2", train_file, tiny_folder, tmp_path / name, *changes)
        first.append(logged(tmp_path / name)[0])
    for key in ("text_loss", "audio_loss", "grad_norm"):
        assert first[0][key] == pytest.approx(first[1][key], rel=1e-4), key


def test_streamed_rows_and_evaluation(train_file, tiny_folder, tmp_path):
    changes = ["data.streaming=true", "training.max_steps=2", "samples.every=0", "training.bf16=true"]
    run("tiny/sft", train_file, tiny_folder, tmp_path / "stream", *changes)
    assert len([entry for entry in logged(tmp_path / "stream") if "grad_norm" in entry]) == 2
    changes = [f"data.eval={train_file}", "training.eval_strategy=steps", "training.eval_steps=1", "training.max_steps=1"]
    run("tiny/flow_matching", train_file, tiny_folder, tmp_path / "eval", *changes, "samples.every=0")
    assert any("eval_loss" in entry for entry in logged(tmp_path / "eval"))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("tiny/nothing", [], "does not exist; the package has"),
        ("tiny/sft", ["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        ("tiny/sft", ["loss.speed=3"], "loss options"),
        ("tiny/vocoder", ["loss.pitch=3"], "`loss.pitch` must be true or false"),
        ("tiny/vocoder", ["loss.energy_distance=1"], "`loss.energy_distance` must be true or false, got 1"),
        ("tiny/vocoder", ["loss.energy_distance=true"], "needs their weight alone"),
        ("tiny/vocoder", ["loss.own_mels=0.5", "loss.speed=1.2"], "cannot be joined with `loss.speed`"),
        ("tiny/vocoder", ["loss.own_mels=2"], "`loss.own_mels` must be a number above 0 and at most 1, got 2"),
        ("tiny/tokenizer", ["loss.rooms=all"], "`loss.rooms` must be a number above 0 and at most 1, got 'all'"),
        ("tiny/tokenizer", ["loss.speed=1"], "`loss.speed` must be a number above 1 and at most 2, got 1"),
        ("tiny/sft", ["attn_implementation=nonsense"], "nonsense"),
        ("tiny/sft", ["samples.texts=[]"], "samples.texts"),
        ("tiny/sft", ["data.max_tokens=3"], "None of the"),
        ("tiny/sft", ["data.on_error=raise"], "nowhere.wav"),
        ("tiny/sft", ["training.learning_speed=3"], "`training` section"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, changes, message, train_file, tiny_folder, tmp_path):
    result = run(recipe, train_file, tiny_folder, tmp_path, *changes, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("baichuan-audio: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "tokenizer"])
def test_two_processes_equal_one(stage, train_file, tiny_folder, tmp_path):
    """torchrun with two processes on half batches: the losses of one process on whole batches."""
    common = [f"data.train={train_file}", f"model={tiny_folder}", "training.max_steps=2", "samples.every=0"]
    common += ["data.group_by_length=false", "training.disable_tqdm=true"]
    if stage == "tokenizer":  # random draws differ between one generator and two
        common += ["loss.start_share=1.0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for processes, batch in ((1, 4), (2, 2)):
        output = [f"output={tmp_path / str(processes)}", f"training.per_device_train_batch_size={batch}"]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29617"]
        command = [*launch, "-m", "modeling_baichuan_audio.cli", "train", f"tiny/{stage}", *common, *output]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = ([entry for entry in logged(tmp_path / name) if "grad_norm" in entry] for name in ("1", "2"))
    if stage == "sft":
        for ours, theirs in zip(one, two):
            assert ours["text_loss"] == pytest.approx(theirs["text_loss"], rel=2e-3)
            assert ours["audio_loss"] == pytest.approx(theirs["audio_loss"], rel=2e-3)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
    else:
        assert len(one) == len(two) == 2 and all(entry["loss"] > 0 for entry in two)
