"""What does a training step cost, per stage, with and without frame sub-sampling and activation checkpointing?

    python benchmarks/train_step.py --size mid --rows 4 --seconds 20

Every setting runs in a process of its own: a few optimiser steps of a random model on random rows, half text, half audio. Printed are
tokens per second (audio frames count as tokens), the peak memory of the step over the loaded model, and both as ratios to the stage's
plain setting. On a GPU the memory is the allocator's, on a CPU the process's resident peak (Linux).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import hardware, versions, write_figures  # noqa: E402
from modeling_baichuan_audio import BaichuanAudioForCausalLM  # noqa: E402
from modeling_baichuan_audio.conversion import tiny_config  # noqa: E402
from modeling_baichuan_audio.training.stages import apply_stage  # noqa: E402


# Widths and depths of the LLM and the audio head; the vocabulary and the codebooks of "mid" are the released ones.
SIZES = {
    "tiny": {"hidden_size": 64, "layers": 2, "head_layers": 2, "vocab_size": 288, "codebooks": [64, 32, *[16] * 6]},
    "mid": {"hidden_size": 512, "layers": 8, "head_layers": 3, "vocab_size": 32000, "codebooks": [8192, 4096, 2048, *[1024] * 5]},
}
STAGES = ("stage1", "stage2", "sft")
SETTINGS = {
    "plain": {},
    "frames": {"frames": True},
    "checkpointing": {"checkpointing": True},
    "both": {"frames": True, "checkpointing": True},
}


def make_config(size: str):
    chosen = SIZES[size]
    width = chosen["hidden_size"]
    text = {
        "model_type": "qwen2",
        "vocab_size": chosen["vocab_size"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": chosen["layers"],
        "num_attention_heads": max(4, width // 64),
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    tokenizer = tiny_config().audio_tokenizer_config.to_dict() | {"codebook_sizes": chosen["codebooks"]}
    head = {"hidden_size": width, "num_hidden_layers": chosen["head_layers"], "codebook_sizes": chosen["codebooks"]}
    return tiny_config(text_config=text, audio_tokenizer_config=tokenizer, audio_head_config=head)


def make_batch(config, rows: int, seconds: float, device) -> dict[str, torch.Tensor]:
    """Rows of as many text tokens as audio frames, all of them learnt."""
    generator = torch.Generator().manual_seed(0)
    frames = max(1, round(seconds * config.audio_tokenizer_config.frame_rate))
    sizes = config.audio_tokenizer_config.codebook_sizes
    codes = torch.stack([torch.randint(0, size, (rows, frames), generator=generator) for size in sizes], dim=1)
    text = torch.randint(0, 256, (rows, frames), generator=generator)
    marks = [torch.full((rows, 1), getattr(config, f"audiogen_{name}_token_id")) for name in ("start", "end")]
    ids = torch.cat([text, marks[0], torch.full((rows, frames), config.audio_pad_token_id), marks[1]], dim=1)
    labels = ids.clone()
    labels[:, frames + 1 :] = -100
    audio_labels = torch.full((rows, len(sizes), ids.shape[1]), -100)
    audio_labels[:, :, frames + 1 : -1] = codes
    audio_labels[:, 0, -1] = sizes[0]
    batch = {"input_ids": ids, "labels": labels, "audio_codes": codes, "audio_labels": audio_labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, in bytes. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def start_peak(device: torch.device) -> int:
    """Forgets the peak so far; returns the memory in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def measure(size: str, stage: str, setting: str, rows: int, seconds: float, steps: int) -> dict[str, float]:
    """One setting, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options, config = SETTINGS[setting], make_config(size)
    model = BaichuanAudioForCausalLM(config).to(device).train()
    apply_stage(model, stage)
    if options.get("checkpointing"):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the older name
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    batch = make_batch(config, rows, seconds, device)
    frames = batch["audio_codes"].shape[2] * rows
    extra = {"audio_loss_frames": max(1, frames // 8)} if options.get("frames") else {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = start_peak(device)
    times = []
    for _ in range(steps + 1):  # the first one allocates and is not timed
        started = time.perf_counter()
        loss = model(**batch, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"tokens_per_second": steps * batch["input_ids"].numel() / sum(times[1:]), "peak_bytes": peak_bytes(device) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of audio in each row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "SETTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.size, *arguments.one, arguments.rows, arguments.seconds, arguments.steps)))
        return
    print(f"hardware  {hardware('cuda' if torch.cuda.is_available() else 'cpu')}")
    print(f"versions  {versions()}")
    print(f"size      {arguments.size}, {arguments.rows} rows of {arguments.seconds:g} s of audio and as much text\n")
    print(f"{'stage':8s} {'setting':14s} {'tokens/s':>9s} {'ratio':>6s} {'peak MB':>8s} {'ratio':>6s}")
    results = []
    for stage in STAGES:
        plain = None
        for setting in SETTINGS:
            command = [sys.executable, __file__, "--size", arguments.size, "--rows", str(arguments.rows)]
            command += ["--seconds", str(arguments.seconds), "--steps", str(arguments.steps), "--one", stage, setting]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            figures = json.loads(output.splitlines()[-1])
            plain = plain or figures
            results.append({"stage": stage, "setting": setting, **figures})
            speed, memory = (figures[name] / plain[name] for name in ("tokens_per_second", "peak_bytes"))
            rate, peak = figures["tokens_per_second"], figures["peak_bytes"] / 1e6
            print(f"{stage:8s} {setting:14s} {rate:9.0f} {speed:6.2f} {peak:8.0f} {memory:6.2f}")
    write_figures(arguments.json, results)


if __name__ == "__main__":
    main()
