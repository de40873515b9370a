"""The model under FSDP2's `fully_shard`, wrapped as the shipped accelerate config wraps it: two gloo processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modeling_baichuan_audio.training.recipe import SHIPPED_RECIPES


SCRIPT = """
import os, sys
import numpy as np
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from modeling_baichuan_audio.conversion import tiny_model, tiny_processor
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.stages import apply_stage
from modeling_baichuan_audio.training.tasks import make_task
from test_stages import batch

dist.init_process_group("gloo")
recipe = read_recipe("tiny/stage2", ["samples.every=0"])
plain, sharded = tiny_model().train(), tiny_model().train()
for model in (plain, sharded):
    apply_stage(model, "stage2")
task = make_task(sharded, tiny_processor(), recipe, sharded=True)
names = set(sys.argv[1].split(","))
found = [module for module in sharded.modules() if type(module).__name__ in names]
assert len({type(module).__name__ for module in found}) == len(names)
for module in found:
    fully_shard(module)
fully_shard(sharded)
# Batches are made outside of the sharded model's forward pass.
segments = [Segment(waveform=np.sin(np.arange(16000) / 10).astype(np.float32), num_frames=12), Segment(text="hm")]
collated = task.collate([Row("asr", [Turn(None, segments)], prompt="p")])
codes = plain.audio_tokenizer.eval().encode(**task._features([segments[0].waveform])).audio_codes
assert torch.equal(collated["audio_codes"], codes)
inputs = batch(plain, seed=dist.get_rank())
losses = [model(**inputs).loss for model in (plain, sharded)]
torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
for loss in losses:
    loss.backward()
checked = 0
for (name, ours), theirs in zip(plain.named_parameters(), sharded.parameters()):
    if ours.grad is None:
        assert theirs.grad is None, name
        continue
    dist.all_reduce(ours.grad, dist.ReduceOp.SUM)
    torch.testing.assert_close(theirs.grad.full_tensor(), ours.grad / dist.get_world_size(), atol=1e-5, rtol=1e-4, msg=name)
    checked += 1
assert checked > 80, checked
print("equal", checked, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo threads may outlive the interpreter
"""


@pytest.mark.slow
def test_sharded_gradients_equal_the_mean_of_the_ranks(tmp_path):
    config = yaml.safe_load((SHIPPED_RECIPES / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert config["fsdp_version"] == 2
    script = tmp_path / "shard.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests"), str(root / "tests" / "training")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631", str(script)]
    result = subprocess.run(
        [*launch, config["fsdp_transformer_layer_cls_to_wrap"]],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("equal") == 2
