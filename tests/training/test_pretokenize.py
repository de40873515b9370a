"""Tokenising beforehand: the same samples as on the fly, kept shards, what was skipped, changes that are noticed."""

import json

import datasets
import numpy as np
import pytest
import soundfile
import torch

from modeling_baichuan_audio.conversion import tiny_model, tiny_processor
from modeling_baichuan_audio.training.audio_codes import AudioCodeEncoder
from modeling_baichuan_audio.training.collators import SpeechCollator
from modeling_baichuan_audio.training.datasets import RowReader, SpeechDataset, SpeechStream
from modeling_baichuan_audio.training.layouts import LayoutBuilder, TokenIds
from modeling_baichuan_audio.training.pretokenize import pretokenize, weights_fingerprint
from modeling_baichuan_audio.training.row_sources import load_rows
from modeling_baichuan_audio.training.rows import AudioReader, BrokenRow


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]
PROCESSOR = tiny_processor()
BUILDER = LayoutBuilder(PROCESSOR.tokenizer, TokenIds.from_tokenizer(PROCESSOR.tokenizer), SIZES)
TEXT = "Hello there, my friend! How are you?"
STAMPS = [("Hello there,", 0.0, 0.7), ("my friend!", 0.9, 1.5), ("How are you?", 1.9, 2.5)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """Every task once, with a cut by timestamps, two broken rows, and entries that the schema does not have."""
    clips = []
    for index, samples in enumerate([3000, 16000, 41000, 7000]):
        clips.append({"audio": f"{index}.wav"})
        sound = np.random.default_rng(index).uniform(-0.5, 0.5, samples)
        soundfile.write(tmp_path / f"{index}.wav", sound, 16000)
    words, stamps = {"text": "words"}, [{"text": text, "start": start, "end": end} for text, start, end in STAMPS]
    answer = [{"type": "text", "text": TEXT}, {"type": "audio", **clips[2], "timestamps": stamps}]
    question = [{"type": "text", "text": "hm"}, {"type": "audio", **clips[0]}]
    return [
        {"task": "asr", "segments": [clips[0], words], "speaker": "Ann", "id": 7},
        {"task": "aqa", "segments": [clips[1], words], "prompt": "what?"},
        {"task": "asr", "segments": [{"audio": "nowhere.wav"}, words]},
        {"task": "s2tt", "segments": [clips[3], words], "prompt": "translate"},
        {"task": "intlv", "segments": [clips[3], words, clips[0]]},
        {"task": "tts", "segments": [words, clips[1]]},
        {"task": "tts", "segments": [clips[1], words]},
        {"task": "itts", "segments": [{"text": TEXT}, {**clips[2], "timestamps": stamps}]},
        {"task": "audio", "segments": [clips[3]]},
        {"task": "chat", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        {"task": "chat", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "speech": True},
    ]


@pytest.fixture
def source(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(data, tokenizer_model=None) -> list[dict]:
    """One batch for each usable row."""
    encoder = None if tokenizer_model is None else AudioCodeEncoder(tokenizer_model, PROCESSOR.feature_extractor)
    reader = RowReader(AudioReader(PROCESSOR.feature_extractor, SIZES), BUILDER)
    collate = SpeechCollator(BUILDER, PROCESSOR.tokenizer.eos_token_id, encoder)
    return [collate([row]) for row in SpeechStream(load_rows(data), reader)]


def run(source, folder, model, **options):
    return pretokenize(source, model.audio_tokenizer, PROCESSOR, folder, **({"shard_size": 3, "batch_size": 2} | options))


def check_same(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference):
        assert set(one) == set(other)
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_are_those_tokenised_on_the_fly(shared_tiny_model, source, tmp_path, streaming):
    steps = []
    summary = run(source, tmp_path / "out", shared_tiny_model, streaming=streaming, progress=lambda *step: steps.append(step))
    reference = samples_of(source, shared_tiny_model.audio_tokenizer)
    check_same(samples_of(tmp_path / "out"), reference)
    frames = sum(batch["audio_codes"].shape[2] for batch in reference if "audio_codes" in batch)
    assert summary == {
        "rows_read": 11,
        "rows_written": 9,
        "audio_clips": 14,
        "audio_frames": frames,
        "text_and_audio_tokens": sum(batch["input_ids"].shape[1] for batch in reference),
        "audio_hours": round(frames / 12.5 / 3600, 4),
        "skipped": {"missing_audio": 1, "wrong_order": 1},
        "codebook_sizes": SIZES,
        "shards": 4,
        "complete": True,
    }
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    total = None if streaming else 11
    assert steps == [(3, total), (6, total), (9, total), (11, total)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".pretokenize",
        *(f"shard-{index:05d}.parquet" for index in range(4)),
        "summary.json",
    ]


def test_the_folder_loads_with_datasets_and_keeps_what_rows_said(shared_tiny_model, source, tmp_path):
    run(source, tmp_path / "out", shared_tiny_model)
    data = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert data.num_rows == 9 and data.column_names == ["task", "prompt", "segments", "messages", "speech", "length", "source"]
    first = data[0]
    assert json.loads(first["source"])["speaker"] == "Ann" and json.loads(first["source"])["segments"][0]["audio"] == "0.wav"
    assert first["segments"][1] == {"text": "words", "audio_codes": None}
    assert np.array(first["segments"][0]["audio_codes"]).shape == (8, 2)
    reader = RowReader(AudioReader(PROCESSOR.feature_extractor, SIZES), BUILDER, on_error="raise")
    assert SpeechDataset(load_rows(data), reader).lengths == data["length"][:]
    pieces = data[5]["segments"]
    assert [piece["text"] for piece in pieces[::2]] == ["Hello there,", " my friend!", " How are you?"]


def test_it_goes_on_where_it_was_stopped(shared_tiny_model, source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole", shared_tiny_model)
    calls = []

    def stop(done, total):
        calls.append(done)
        if done > 6:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, shared_tiny_model, progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert sorted(kept) == ["shard-00000.parquet", "shard-00001.parquet"]
    encoded = []
    original = AudioCodeEncoder.encode_rows
    monkeypatch.setattr(AudioCodeEncoder, "encode_rows", lambda self, rows: encoded.append(len(rows)) or original(self, rows))
    summary = run(source, folder, shared_tiny_model)
    assert encoded == [2, 2], "shards 2 and 3, less the broken row"
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert summary == json.loads((tmp_path / "whole" / "summary.json").read_text())
    check_same(samples_of(folder), samples_of(tmp_path / "whole"))
    assert not list(folder.rglob("*.part"))
    # Shards left half-written count for nothing: without its note a shard is made again.
    (folder / ".pretokenize" / "shard-00001.json").unlink()
    encoded.clear()
    assert run(source, folder, shared_tiny_model) == summary and encoded == [3]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_processes_share_the_shards(shared_tiny_model, source, tmp_path, streaming):
    whole = run(source, tmp_path / "whole", shared_tiny_model)
    first = run(source, tmp_path / "out", shared_tiny_model, streaming=streaming, rank=1, world_size=2)
    assert not first["complete"] and first["shards"] == 2 and first["rows_read"] == 5
    second = run(source, tmp_path / "out", shared_tiny_model, streaming=streaming, rank=0, world_size=2)
    assert second == whole
    check_same(samples_of(tmp_path / "out"), samples_of(tmp_path / "whole"))


def test_a_shard_of_broken_rows_is_no_file(shared_tiny_model, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[1], rows[2], rows[6], rows[8]]))
    summary = run(path, tmp_path / "out", shared_tiny_model, shard_size=2)
    assert summary["complete"] and summary["shards"] == 3 and summary["rows_written"] == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == ["shard-00000.parquet", "shard-00002.parquet"]
    assert run(path, tmp_path / "out", shared_tiny_model, shard_size=2) == summary
    assert len(samples_of(tmp_path / "out")) == 3


def test_broken_and_long_rows(shared_tiny_model, source, tmp_path):
    with pytest.raises(BrokenRow, match="rows.jsonl:3: Audio file nowhere.wav"):
        run(source, tmp_path / "strict", shared_tiny_model, on_error="raise")
    summary = run(source, tmp_path / "out", shared_tiny_model, max_tokens=25)
    reference = [batch["input_ids"].shape[1] for batch in samples_of(source, shared_tiny_model.audio_tokenizer)]
    assert summary["skipped"]["too_long"] == sum(length > 25 for length in reference) > 0
    assert summary["rows_written"] == sum(length <= 25 for length in reference) > 0


def test_other_settings_weights_or_data_are_noticed(shared_tiny_model, source, tmp_path):
    folder = tmp_path / "out"
    summary = run(source, folder, shared_tiny_model)
    with pytest.raises(ValueError, match=r"other settings: shard_size \(then 3, now 4\)"):
        run(source, folder, shared_tiny_model, shard_size=4)
    with pytest.raises(ValueError, match="tokenizer_weights"):
        run(source, folder, tiny_model(1))
    lines = source.read_text().splitlines()
    lines[3] = lines[3].replace("translate", "interpret")
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"data changed since {folder}/shard-00001.parquet"):
        run(changed, folder, shared_tiny_model)
    assert run(source, folder, shared_tiny_model) == summary
    other = tmp_path / "other"
    other.mkdir()
    datasets.Dataset.from_list([{"a": 1}]).to_parquet(str(other / "a.parquet"))
    with pytest.raises(ValueError, match="did not write"):
        run(source, other, shared_tiny_model)


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"batch_size": 0}, {"rank": 1}])
def test_settings_are_checked(shared_tiny_model, source, tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        run(source, tmp_path / "out", shared_tiny_model, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("encoder.conv1.weight", True),
        ("bridge.down_proj.weight", True),
        ("quantizer.codebooks.3.embed", True),
        ("quantizer.codebooks.3.embed_avg", False),
        ("mel_decoder.layer_norm.weight", False),
    ],
)
def test_the_fingerprint_is_of_what_decides_codes(tiny, name, decides):
    tokenizer = tiny.audio_tokenizer
    before, weights = weights_fingerprint(tokenizer), tokenizer.state_dict()
    assert weights_fingerprint(tiny_model().audio_tokenizer) == before
    weights[name].view(-1)[0] += 1e-3
    assert (weights_fingerprint(tokenizer) != before) is decides
