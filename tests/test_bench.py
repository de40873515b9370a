"""The benchmarks run, at the smallest size, and the command puts their figures together."""

import json

import pytest
import torch
from helpers.processes import load_benchmark
from test_cli import run

from modeling_baichuan_audio.cli_bench import leaves, table


def test_a_frame():
    figures = load_benchmark("frame_step").measure("tiny", frames=1, context=8)
    assert figures["same_codes"] and figures["bytes"]["head"] < figures["bytes"]["head_recomputed"] / 3
    assert set(figures["seconds"]) == {"head_before", "head", "frame_before", "frame"}


def test_the_released_geometry_reads_what_arithmetic_says():
    """Gigabytes a frame, of bfloat16 weights: 28 layers of a 7B LLM; eight positions of three layers, attention eight times."""
    read = load_benchmark("frame_step").arithmetic("released", torch.bfloat16)
    width, mlp = 3584, 18944
    layer = 2 * width * width + 2 * width * 512 + width + 1024 + 3 * width * mlp + 2 * width
    assert read["llm"] == 2 * (28 * layer + width)
    assert read["lm_head"] == 2 * 152064 * width
    assert read["head"] / 1e9 == pytest.approx(5.07, abs=0.01) and read["head_recomputed"] / 1e9 == pytest.approx(23.31, abs=0.01)


def test_first_sound():
    figures = load_benchmark("first_sound").measure(batch_sizes=(1,), frames=12, repeats=1)["1"]
    assert set(figures) == {"at once", "exact", "low_latency"}
    assert all(way["first_sound_seconds"] > 0 and way["real_time_factor"] > 0 for way in figures.values())
    assert figures["at once"]["audio_seconds"] == pytest.approx(figures["exact"]["audio_seconds"])


def test_bench_writes_json_and_a_table(tmp_path):
    run("bench", "--size", "tiny", "--only", "frame_step", "-o", tmp_path / "bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["frame_step"]["size"] == "tiny"
    text = (tmp_path / "bench.md").read_text()
    assert "| frame_step | ratios.head |" in text and text == table(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "huge"], "tiny, mid, released"), (["--only", "luck"], "frame_step"), (["-o", "x.txt"], "must be a .json file")],
)
def test_bad_input_to_bench(arguments, message):
    result = run("bench", *arguments, code=2)
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_leaves():
    assert leaves({"a": {"b": 1, "c": [2, 3]}}) == [("a.b", 1), ("a.c.0", 2), ("a.c.1", 3)]
