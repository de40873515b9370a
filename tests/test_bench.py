"""The benchmarks run, at the smallest size, and the command puts their figures together."""

import json

import pytest
import torch
from helpers.processes import BENCHMARKS, load_benchmark, run_elsewhere
from test_cli import run

from benchmarks.limits import counted_flops, sound_flops, weight_bytes
from benchmarks.models import make_config, make_flow, make_model
from benchmarks.replies import WAYS, least_before_sound
from modeling_baichuan_audio.cli_bench import leaves, table
from modeling_baichuan_audio.streaming_baichuan_audio import SpeechPieceStream


def test_a_frame():
    figures = load_benchmark("frame_step").measure(make_model("tiny"), frames=1, context=8)
    assert figures["bytes"]["head"] < figures["bytes"]["head_recomputed"] / 3
    assert set(figures["seconds"]) == {"before", "frame"}
    assert figures["over_limit"] == pytest.approx(figures["seconds"]["frame"] / figures["limit_seconds"])


def test_the_audio_head_alone():
    figures = load_benchmark("audio_head").measure(make_model("tiny"), rows=2, repeats=1)
    assert figures["same_codes"] and set(figures["seconds"]) == {"before", "head"}
    assert figures["over_limit"] == pytest.approx(figures["seconds"]["head"] / figures["limit_seconds"])


def test_a_checkpoint_is_measured():
    figures = load_benchmark("frame_step").measure(make_model(checkpoint="untrained"), frames=1, context=8)
    assert figures["bytes"] == weight_bytes(make_model("tiny"))


def test_the_released_geometry_reads_what_arithmetic_says():
    """Gigabytes a frame, of bfloat16 weights: 28 layers of a 7B LLM; eight positions of three layers, attention eight times."""
    read = load_benchmark("frame_step").arithmetic("released", torch.bfloat16)
    width, mlp = 3584, 18944
    layer = 2 * width * width + 2 * width * 512 + width + 1024 + 3 * width * mlp + 2 * width
    assert read["llm"] == 2 * (28 * layer + width)
    assert read["lm_head"] == 2 * 152064 * width
    assert read["head"] / 1e9 == pytest.approx(5.07, abs=0.01) and read["head_recomputed"] / 1e9 == pytest.approx(23.31, abs=0.01)


def test_mid_is_what_its_name_says():
    config = make_config("mid")
    text, head = config.text_config, config.audio_head_config
    assert (text.hidden_size, text.num_hidden_layers, head.num_hidden_layers) == (1024, 12, 3)
    assert head.codebook_sizes == make_config("released").audio_head_config.codebook_sizes


def test_flow_matching():
    flow = make_flow("tiny")
    figures = load_benchmark("flow_matching").measure(flow, seconds=3.0, steps=2, repeats=1, stream_seconds=4.0)
    assert figures["largest_difference"] < 1e-4 and figures["stream"]["largest_difference"] < 1e-4
    assert figures["flops"]["ours"] < figures["flops"]["reference"]
    for name, taken in figures["times"].items():
        assert figures["over_limit"][name] == pytest.approx(
            taken["seconds"] * figures["flops_per_second"] / figures["flops"][name]
        )


def test_quality_of_flow_matching_by_steps_and_grids():
    flow = make_flow("tiny")
    states = [torch.randn(60, flow.config.input_size, generator=torch.Generator().manual_seed(0))]
    rows = load_benchmark("flow_quality").measure(flow, states, steps=(4, 10), schedules=("cosine", "linear"))
    found = {(row["schedule"], row["steps"]): row for row in rows}
    assert found["cosine", 10]["from_ten"] == 0 < found["cosine", 4]["from_ten"]
    assert found["linear", 10]["from_ten"] > 0
    assert [row["passes"] for row in rows] == [8, 20, 8, 20]
    assert all(row["from_fifty"] > 0 for row in rows)


def test_first_sound():
    result = load_benchmark("first_sound").measure(make_model("tiny"), batch_sizes=(1,), frames=30, repeats=1)
    figures = result["1"]
    assert set(figures) == set(WAYS)
    assert all(way["over_limit"] == pytest.approx(way["seconds"] / way["limit_seconds"]) for way in figures.values())
    frames = [figures[way]["frames"] for way in ("low_latency", "exact", "at once")]
    assert 0 < frames[0] < frames[1] < frames[2] <= 60
    assert figures["low_latency"]["limit_seconds"] < figures["exact"]["limit_seconds"] < figures["at once"]["limit_seconds"]


def test_end_to_end():
    result = load_benchmark("end_to_end").measure(make_model("tiny"), batch_sizes=(2,), frames=12, repeats=1)
    figures = result["2"]
    assert set(figures) == set(WAYS)
    assert figures["at once"]["audio_seconds"] == pytest.approx(figures["exact"]["audio_seconds"])
    assert "flow_seconds" in figures["exact"] and "flow_seconds" not in figures["at once"]
    for way in figures.values():
        assert way["seconds"] == pytest.approx(way["real_time_factor"] * 2 * way["audio_seconds"])
        assert way["limit_seconds"] == pytest.approx(
            way["bytes"] / result["machine"]["bytes_per_second"] + way["flops"] / result["machine"]["flops_per_second"]
        )


@pytest.mark.parametrize("way", ["exact", "low_latency"])
def test_sound_comes_after_as_many_frames_as_the_limit_counts(way):
    model, frames = make_model("tiny"), 40
    codes = torch.stack([torch.arange(frames) % size for size in model.config.audio_tokenizer_config.codebook_sizes])
    stream, heard = SpeechPieceStream(model, seed=0, latency=way), None
    with torch.no_grad():
        for frame in range(frames):
            if list(stream.push(codes[:, frame : frame + 1], final=frame == frames - 1)):
                heard = frame + 1
                break
    assert heard == least_before_sound(model, way, 1, first_piece=frames)["frames"]


def test_operations_of_sound_are_those_that_torch_counts():
    """Attention of the mel decoder and of the pre-net is left out; nothing else is."""
    model, frames = make_model("tiny"), 50
    codes = torch.stack([torch.arange(frames) % size for size in model.config.audio_tokenizer_config.codebook_sizes])[None]

    def sound():
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            hidden = model.audio_tokenizer.decode(codes).hidden_states
            model.vocoder(model.flow_matching(hidden, seed=0).mel, seed=0)

    mel, chunk = 4 * frames - 1, model.config.flow_matching_config.attention_chunk_size
    assert sound_flops(model, frames, mel, mel, [chunk]) == pytest.approx(counted_flops(sound), rel=0.05)


@pytest.mark.parametrize("name", ["audio_head", "frame_step", "first_sound", "end_to_end"])
def test_arithmetic_allocates_nothing(name, tmp_path):
    """The released geometry, 20 GB of bfloat16 weights, is counted in a process of its own."""
    script = BENCHMARKS / f"{name}.py"
    arguments = ["--size", "released", "--arithmetic", "--dtype", "bfloat16", "--json", str(tmp_path / "figures.json")]
    run_elsewhere(tmp_path, str(script), *arguments, timeout=120)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"] == "released, random weights" and figures["hardware"] and figures["versions"]


def test_bench_writes_json_and_a_table(tmp_path):
    run("bench", "--size", "tiny", "--only", "frame_step", "-o", tmp_path / "bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["frame_step"]["model"] == "tiny, random weights"
    text = (tmp_path / "bench.md").read_text()
    assert "| frame_step | over_limit |" in text and text == table(results)
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
