"""Rows from every kind of source, broken ones counted; orders that are seeded; shares that are disjoint."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from torch.utils.data import DataLoader
from transformers.utils import logging

from modeling_baichuan_audio.conversion import tiny_processor
from modeling_baichuan_audio.training.datasets import (
    LengthGroupedSampler,
    RowReader,
    SkipReport,
    SpeechDataset,
    SpeechStream,
    bucketed,
)
from modeling_baichuan_audio.training.layouts import LayoutBuilder, TokenIds
from modeling_baichuan_audio.training.row_sources import RowSource, load_rows
from modeling_baichuan_audio.training.rows import AudioReader, BrokenRow, Row


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]
PROCESSOR = tiny_processor()
BUILDER = LayoutBuilder(PROCESSOR.tokenizer, TokenIds.from_tokenizer(PROCESSOR.tokenizer), SIZES)


def make_reader(**options) -> RowReader:
    return RowReader(AudioReader(PROCESSOR.feature_extractor, SIZES), BUILDER, **options)


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def wav(samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(samples), 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def row(number: int, samples: int = 3000) -> dict:
    return {"task": "asr", "prompt": "p", "segments": [{"audio": f"{samples}.wav"}, {"text": f"text {number}"}]}


def numbers(rows) -> list[int]:
    return [int(one.segments[1].text.split()[1]) for one in rows]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """Sounds, and rows 0..9 in every kind of file; rows 3 and 7 are broken."""
    folder = tmp_path / "data"
    folder.mkdir()
    for samples in (3000, 6000, 9000):
        (folder / f"{samples}.wav").write_bytes(wav(samples))
    rows = [row(number, 3000 * (1 + number % 3)) for number in range(10)]
    rows[3]["segments"][0] = {"audio": "nowhere.wav"}
    rows[7]["task"] = "singing"
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(one) for one in rows[:6]) + "\n\n")
    (folder / "more.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows[6:]))
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "splits"))
    return folder


USABLE = [0, 1, 2, 4, 5, 6, 8, 9]
SOURCES = ["files", "parquet", "saved", "splits"]


def source_of(folder, kind: str, streaming: bool) -> RowSource:
    names = {
        "files": [str(folder / "rows.jsonl"), folder / "more.jsonl"],
        "parquet": str(folder / "*.parquet"),
        "saved": str(folder / "saved"),
        "splits": str(folder / "splits"),
    }
    source = load_rows(names[kind], streaming=streaming)
    for part in source.parts:
        if hasattr(part, "root"):
            part.root = folder  # the saved ones lie a folder deeper than their sounds
    return source


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows(folder, kind):
    reader = make_reader()
    data = SpeechDataset(source_of(folder, kind, False), reader)
    assert reader.report.skipped == {"missing_audio": 1, "unknown_task": 1}
    assert len(data) == 8 and numbers(data[i] for i in range(8)) == USABLE
    assert data.lengths == [data[i].length for i in range(8)] == [1 + f + 2 + 6 + 1 for f in (2, 4, 7, 4, 7, 2, 7, 2)]
    assert reader.report.read == 16
    np.testing.assert_array_equal(data[1].segments[0].waveform, sound(6000))
    streamed = make_reader()
    assert numbers(SpeechStream(source_of(folder, kind, True), streamed)) == USABLE
    assert streamed.report.skipped == reader.report.skipped and streamed.report.read == 8


def test_a_folder_gives_its_parquet_files_or_its_jsonl_files(folder, tmp_path):
    assert len(load_rows(str(folder / "rows.parquet"))) == len(load_rows(folder / "*.jsonl")) == 10
    (tmp_path / "text" / "deep").mkdir(parents=True)
    (tmp_path / "text" / ".hidden").mkdir()
    for place in ("deep", ".hidden"):
        (tmp_path / "text" / place / "a.jsonl").write_text(json.dumps(row(1)) + "\n")
    assert [raw.where for raw in load_rows(tmp_path / "text")] == [f"{tmp_path}/text/deep/a.jsonl:1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_audio_features_of_datasets(folder, streaming):
    """Top-level or inside lists; bytes or paths; whether or not the library could decode them itself."""
    features = datasets.Features(
        {
            "task": datasets.Value("string"),
            "segments": datasets.List({"audio": datasets.Audio(sampling_rate=16000), "text": datasets.Value("string")}),
        }
    )
    sounds = [{"bytes": wav(3000), "path": None}, {"bytes": None, "path": "6000.wav"}, {"bytes": b"no", "path": None}]
    rows = [{"task": "asr", "segments": [{"audio": one}, {"text": f"text {i}"}]} for i, one in enumerate(sounds)]
    parquet.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / "audio.parquet")
    source = load_rows(folder / "audio.parquet", streaming=streaming)
    assert "Audio(" in str(source.parts[0].data.features)
    reader = make_reader()
    read = list(SpeechStream(source, reader))
    assert numbers(read) == [0, 1] and [one.segments[0].num_frames for one in read] == [2, 4]
    assert reader.report.skipped == {"unreadable_audio": 1}
    given = datasets.load_dataset("parquet", data_files=str(folder / "audio.parquet"), split="train", streaming=streaming)
    assert load_rows(given).streamed is streaming
    with pytest.raises(BrokenRow):  # its paths start from the working directory
        list(SpeechStream(load_rows(given), make_reader(on_error="raise")))


def test_rows_from_python():
    raws = [{"task": "asr", "segments": [{"audio": sound(3000)}, {"text": f"text {i}"}]} for i in range(3)]
    assert numbers(SpeechStream(load_rows(raws), make_reader())) == [0, 1, 2]
    arrays = datasets.Dataset.from_list(
        [{"task": "asr", "segments": [{"audio_codes": [[1, 2]] * 8, "text": None}, {"text": "text 5"}]}]
    )
    for data in (arrays, arrays.with_format("numpy"), arrays.with_format("torch"), arrays.to_iterable_dataset()):
        assert numbers(SpeechStream(load_rows(data), make_reader(on_error="raise"))) == [5]


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere/*.jsonl", [], {}, 5, "folder", ["a.jsonl", "a.txt"]])
def test_what_is_no_data_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="Training data"):
        load_rows(source)
    with pytest.raises(ValueError, match="neither a file here nor a data set of the Hub"):
        load_rows("nobody/nothing")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="must be .jsonl or .parquet files"):
        load_rows("a.*")


# Broken rows.


def test_broken_rows_are_reported(tmp_path, caplog):
    lines = [json.dumps(row(0)), "{broken", "\udcff", *[json.dumps({"task": "x"})] * 5, json.dumps(row(1, 9000))]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    for samples in (3000, 9000):
        (tmp_path / f"{samples}.wav").write_bytes(wav(samples))
    logging.enable_propagation()
    reader = make_reader(max_tokens=12)
    assert numbers(SpeechStream(load_rows(path), reader)) == [0]
    logging.disable_propagation()
    assert reader.report.skipped == {"bad_row": 2, "unknown_task": 5, "too_long": 1} and reader.report.read == 1
    messages = [record.getMessage() for record in caplog.records if "data" not in record.name.split(".")[0]]
    assert sum("unknown_task" in message or "`task` must be" in message for message in messages) == 3, "three examples of each"
    assert any(f"{path}:2: not JSON" in message for message in messages)
    assert any(message.startswith("8 rows skipped (2 not of the documented schema, 5 unknown task") for message in messages)
    for line, reason in ((2, "bad_row"), (9, "too_long")):
        only = tmp_path / f"{line}.jsonl"
        only.write_text(lines[line - 1])
        with pytest.raises(BrokenRow, match=f"{line}.jsonl:1") as caught:
            list(SpeechStream(load_rows(only), make_reader(max_tokens=12, on_error="raise")))
        assert caught.value.reason == reason


def test_a_file_damaged_inside_is_counted_once_and_replaced(folder):
    """Its header reads well; decoding fails. Batches keep their size."""
    whole = wav(9000)
    flac = io.BytesIO()
    soundfile.write(flac, sound(9000), 16000, format="FLAC")
    damaged = bytearray(flac.getvalue())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    (folder / "9000.wav").write_bytes(bytes(damaged))
    reader = make_reader()
    try:
        soundfile.read(io.BytesIO(bytes(damaged)))
    except soundfile.LibsndfileError:
        pass
    else:
        pytest.skip("this libsndfile decodes damaged FLAC")
    data = SpeechDataset(source_of(folder, "files", False), reader)
    assert len(data) == 8 and reader.report.skipped == {"missing_audio": 1, "unknown_task": 1}
    for _ in range(2):
        assert numbers(data[i] for i in range(8)) == [0, 1, 4, 4, 6, 6, 9, 9]
    assert reader.report.skipped == {"missing_audio": 1, "unknown_task": 1, "unreadable_audio": 3}
    assert whole != bytes(damaged)


def test_no_usable_row_is_an_error(folder):
    with pytest.raises(ValueError, match="None of the 10 rows can be used: 10 rows skipped"):
        SpeechDataset(source_of(folder, "files", False), make_reader(max_tokens=3))
    with pytest.raises(ValueError, match="random access"):
        SpeechDataset(source_of(folder, "files", True), make_reader())


@pytest.mark.parametrize("options", [{"on_error": "ignore"}, {"max_tokens": 0}])
def test_reader_settings_are_checked(options):
    with pytest.raises(ValueError, match="must be"):
        make_reader(**options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"buffer_batches": -1}, {"rank": 2, "world_size": 2}])
def test_stream_settings_are_checked(options):
    with pytest.raises(ValueError, match="Needs `batch_size`"):
        SpeechStream(load_rows([row(0)]), make_reader(), **options)


# Workers and ranks.


@pytest.mark.parametrize("kind", ["files", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_share_the_rows_and_the_report(folder, kind, streaming):
    reader = make_reader()
    stream = SpeechStream(source_of(folder, kind, streaming), reader)
    loader = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=list)
    assert sorted(numbers(one for batch in loader for one in batch)) == USABLE
    assert reader.report.skipped == {"missing_audio": 1, "unknown_task": 1} and reader.report.read == 8


@pytest.mark.parametrize("kind", ["files", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_the_rows(folder, kind, streaming):
    shares = [
        numbers(SpeechStream(source_of(folder, kind, streaming), make_reader(), rank=rank, world_size=3)) for rank in range(3)
    ]
    assert sorted(sum(shares, [])) == USABLE and all(shares)


def test_random_access_with_workers_counts_in_one_report(folder):
    reader = make_reader()
    data = SpeechDataset(source_of(folder, "files", False), reader)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=list)
    assert numbers(one for batch in loader for one in batch) == USABLE
    assert reader.report.read == 8


# Orders.


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 7), st.integers(0, 5), st.integers(1, 4))
def test_the_sampler_gives_every_row_once_in_a_seeded_order(lengths, batch, epoch, pool):
    sampler, twin = LengthGroupedSampler(lengths, batch, 3, pool), LengthGroupedSampler(lengths, batch, 3, pool)
    sampler.set_epoch(epoch)
    twin.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and len(sampler) == len(order)
    assert list(twin) == order == list(sampler)


def test_the_sampler_groups_by_length_and_changes_with_the_epoch():
    lengths = np.random.default_rng(0).integers(1, 1000, 403)
    sampler = LengthGroupedSampler(lengths.tolist(), 8, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    other = list(LengthGroupedSampler(lengths.tolist(), 8, seed=2))
    assert orders[0] != orders[1] and orders[0] != other
    for order in orders:
        batches = [lengths[order[i : i + 8]] for i in range(0, 403, 8)]
        padding = sum(int(batch.max()) * len(batch) - int(batch.sum()) for batch in batches)
        assert padding / lengths.sum() < 0.03, "unsorted batches of 8 have about 0.75"
        firsts = [int(batch.max()) for batch in batches]
        assert firsts != sorted(firsts, reverse=True), "the batches come in random order"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_streams_are_grouped_within_their_buffer(lengths, batch, batches):
    rows = [Row("audio", [], length=length) for length in lengths]
    size = batch * batches

    def order():
        given = bucketed(rows, batch, size, np.random.default_rng(5))
        return [next(i for i, one in enumerate(rows) if one is row) for row in given]

    places = order()
    assert sorted(places) == list(range(len(rows))) and places == order()
    for start in range(0, len(rows), size):
        window = places[start : start + size]
        assert sorted(window) == list(range(start, min(start + size, len(rows)))), "nothing leaves its buffer"
        groups = [sorted(lengths[i] for i in window[first : first + batch]) for first in range(0, len(window), batch)]
        groups.sort()
        assert all(before[-1] <= after[0] for before, after in zip(groups, groups[1:]))


def test_a_grouped_stream_is_seeded_by_its_epoch(folder):
    stream = SpeechStream(source_of(folder, "files", True), make_reader(), batch_size=1, buffer_batches=10, seed=4)
    orders = []
    for epoch in (0, 0, 1, 2):
        stream.set_epoch(epoch)
        orders.append(numbers(stream))
    assert orders[0] == orders[1] and orders[1:] != [orders[0]] * 3 and all(sorted(order) == USABLE for order in orders)
    assert orders[0] != USABLE
    with pytest.raises(ValueError, match="needs a reader with a `builder`"):
        SpeechStream(load_rows([row(0)]), RowReader(AudioReader(PROCESSOR.feature_extractor, SIZES)), buffer_batches=1)


def test_reports_add_up():
    report = SkipReport(examples=0)
    report.add_read()
    report.add_skipped("bad_row", "why", "row 0")
    report.add_skipped("too_long", "why", "row 1")
    report.add_skipped("too_long", "why", "row 2")
    assert str(report) == "3 rows skipped (1 not of the documented schema, 2 too long), 1 used"
    with pytest.raises(ValueError):
        report.add_skipped("other", "why", "row 3")
