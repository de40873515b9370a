"""The row schema: what is accepted, what is refused and why, and how audio is found and read."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_baichuan_audio.processors import BaichuanAudioFeatureExtractor
from modeling_baichuan_audio.processors.processing_baichuan_audio import TRANSCRIPTION_PROMPT
from modeling_baichuan_audio.training.rows import REASONS, TASKS, AudioReader, BrokenRow, Segment, parse_row


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]
CODES = [[1, 2]] * 8
T, A = {"text": "words"}, {"audio": "clip.wav"}
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.fixture
def reader():
    return AudioReader(BaichuanAudioFeatureExtractor(), SIZES)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


GOOD = {
    "asr": {"segments": [A, T]},
    "aqa": {"segments": [A, T], "prompt": "what?"},
    "s2tt": {"segments": [A, T], "prompt": "translate"},
    "intlv": {"segments": [A, T, A]},
    "tts": {"segments": [T, A]},
    "itts": {"segments": [T, A, T, A]},
    "audio": {"segments": [A]},
    "chat": {"messages": [USER, ANSWER]},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_row(task):
    row = parse_row({"task": task, "id": 7, **GOOD[task]})
    assert row.task == task
    kinds = [[segment.is_text for segment in turn.segments] for turn in row.turns]
    wanted = {"asr": [[0, 1]], "aqa": [[0, 1]], "s2tt": [[0, 1]], "intlv": [[0, 1, 0]], "tts": [[1, 0]]}
    wanted |= {"itts": [[1, 0, 1, 0]], "audio": [[0]], "chat": [[1], [1]]}
    assert kinds == wanted[task]
    assert row.prompt == {"asr": TRANSCRIPTION_PROMPT, "aqa": "what?", "s2tt": "translate"}.get(task)


def test_the_rows_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [parse_row(json.loads(block)) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert {row.task for row in rows} == set(TASKS)
    assert all(f"`{reason}`" in page for reason in REASONS)


def test_nulls_of_parquet_are_absent():
    nothing = {"audio": None, "audio_codes": None, "text": None, "timestamps": None}
    segments = [nothing | {"audio_codes": CODES}, nothing | {"text": "a", "audio": {"bytes": None, "path": None}}]
    row = parse_row({"task": "asr", "prompt": None, "segments": segments, "messages": None, "speech": None})
    assert row.prompt == TRANSCRIPTION_PROMPT and row.segments[1].text == "a"
    assert row.segments[0].codes.tolist() == CODES


def test_dialogues():
    audio = {"type": "audio", "audio_codes": CODES}
    text = {"type": "text", "text": "a"}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [text, {"type": "text", "text": "b"}, audio, audio]},
        {"role": "assistant", "content": [text, audio, text, audio, text]},
    ]
    row = parse_row({"task": "chat", "messages": messages})
    assert row.speech is True, "a spoken answer makes it a spoken dialogue"
    assert [turn.role for turn in row.turns] == ["system", "user", "assistant"]
    assert row.turns[1].segments[0].text == "ab", "neighbouring texts are one, as the chat template joins them"
    assert len(list(row.audio_segments())) == 4
    assert parse_row({"task": "chat", "messages": [USER, ANSWER]}).speech is False
    assert parse_row({"task": "chat", "messages": [USER, ANSWER], "speech": True}).speech is True


def spoken(*content, **row):
    return {"task": "chat", "messages": [USER, {"role": "assistant", "content": list(content)}], **row}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("asr", "bad_row"),
        ({}, "unknown_task"),
        ({"task": "singing", "segments": [T]}, "unknown_task"),
        ({"task": "asr"}, "bad_row"),
        ({"task": "asr", "segments": []}, "bad_row"),
        ({"task": "asr", "segments": "text"}, "bad_row"),
        ({"task": "asr", "segments": [A, "text"]}, "bad_row"),
        ({"task": "asr", "segments": [A, {"text": "a", "audio": "b"}]}, "bad_row"),
        ({"task": "asr", "segments": [A, {"words": "a"}]}, "bad_row"),
        ({"task": "asr", "segments": [A, {"text": 5}]}, "bad_row"),
        ({"task": "asr", "segments": [A, {"text": " \n"}]}, "empty_text"),
        ({"task": "asr", "segments": [A, T], "prompt": " "}, "empty_text"),
        ({"task": "aqa", "segments": [A, T]}, "bad_row"),
        ({"task": "tts", "segments": [T, A], "prompt": "say"}, "bad_row"),
        ({"task": "asr", "segments": [T, A]}, "wrong_order"),
        ({"task": "asr", "segments": [A, T, A]}, "wrong_order"),
        ({"task": "tts", "segments": [A, T]}, "wrong_order"),
        ({"task": "audio", "segments": [A, A]}, "wrong_order"),
        ({"task": "intlv", "segments": [T, A]}, "wrong_order"),
        ({"task": "intlv", "segments": [A]}, "wrong_order"),
        ({"task": "intlv", "segments": [A, T, T]}, "wrong_order"),
        ({"task": "itts", "segments": [T, A, T]}, "wrong_order"),
        ({"task": "itts", "segments": [A, T]}, "wrong_order"),
        ({"task": "itts", "segments": [T, {**A, "timestamps": [{"text": "words"}]}]}, "bad_timestamps"),
        ({"task": "asr", "segments": [{"audio_codes": [[1, 2], [3]]}, T]}, None),
        ({"task": "asr", "segments": [{"audio_codes": 5}, T]}, "bad_codes"),
        ({"task": "chat"}, "bad_row"),
        ({"task": "chat", "messages": [USER]}, "wrong_order"),
        ({"task": "chat", "messages": [ANSWER, USER]}, "wrong_order"),
        ({"task": "chat", "messages": [USER, USER, ANSWER]}, "wrong_order"),
        ({"task": "chat", "messages": [USER, ANSWER], "speech": "yes"}, "bad_row"),
        ({"task": "chat", "messages": [{"role": "tool", "content": "a"}, ANSWER]}, "bad_row"),
        ({"task": "chat", "messages": [{"role": "user", "content": []}, ANSWER]}, "bad_row"),
        ({"task": "chat", "messages": [{"role": "user", "content": ""}, ANSWER]}, "empty_text"),
        ({"task": "chat", "messages": [{"role": "user", "content": [{"type": "audio", "text": "a"}]}, ANSWER]}, "bad_row"),
        (spoken({"type": "audio", **A}), "wrong_order"),
        (spoken(T, A, A), "wrong_order"),
        (spoken(T, A, speech=False), "wrong_order"),
    ],
)
def test_broken_rows_and_their_reasons(reader, raw, reason):
    def check():
        for segment in parse_row(raw).audio_segments():
            reader.read(segment)

    with pytest.raises(BrokenRow) as caught:
        check()
    assert caught.value.reason == (reason or "bad_codes") and caught.value.reason in REASONS
    assert str(caught.value)


# Audio.


def test_audio_in_any_packaging(reader, tmp_path):
    samples = noise(4000)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(encoded(samples))
    packagings = [
        "clips/a.wav",
        tmp_path / "clips" / "a.wav",
        str(tmp_path / "clips" / "a.wav"),
        f"file://{tmp_path}/clips/a.wav",
        {"bytes": None, "path": "clips/a.wav"},
        {"bytes": encoded(samples), "path": "elsewhere.wav"},
        {"array": samples, "sampling_rate": 16000},
        encoded(samples),
        base64.b64encode(encoded(samples)).decode(),
        samples,
    ]
    for source in packagings:
        for read in (reader.read, reader.estimate):
            segment = read(Segment(source=source), tmp_path)
            assert segment.num_frames == 3 and segment.codes is None
        np.testing.assert_array_equal(reader.read(Segment(source=source), tmp_path).waveform, samples)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.wav", "missing_audio"),
        ("clips", "missing_audio"),
        ("", "missing_audio"),
        ("file:///nowhere/a.wav", "missing_audio"),
        ({"path": "nowhere.wav", "bytes": None}, "missing_audio"),
        ("noise.wav", "unreadable_audio"),
        ({"bytes": b"RIFFxxxx", "path": None}, "unreadable_audio"),
        (b"", "unreadable_audio"),
        ({"array": [], "sampling_rate": 16000}, "unreadable_audio"),
        ({"array": [0.0, float("nan")], "sampling_rate": 16000}, "unreadable_audio"),
        (np.zeros(950, dtype=np.float32), "short_audio"),
        ("short.wav", "short_audio"),
    ],
)
def test_broken_audio(reader, tmp_path, source, reason):
    (tmp_path / "noise.wav").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "short.wav").write_bytes(encoded(noise(500)))
    for read in (reader.read, reader.estimate):
        with pytest.raises(BrokenRow) as caught:
            read(Segment(source=source), tmp_path)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((7, 3), dtype=int),
        np.zeros((8, 0), dtype=int),
        np.zeros(8, dtype=int),
        np.zeros((8, 3)),
        np.full((8, 3), -1),
        np.array([[0, 0]] * 7 + [[0, 16]]),  # the end-of-audio class is no code
    ],
)
def test_broken_codes(reader, codes):
    with pytest.raises(BrokenRow) as caught:
        reader.read(Segment(codes=codes))
    assert caught.value.reason == "bad_codes"


def test_codes_are_taken_as_they_are(reader):
    codes = np.array([[63, 0]] + [[15, 3]] * 7, dtype=np.int32)
    segment = reader.read(Segment(codes=codes))
    assert segment.num_frames == 2 and segment.codes.dtype == np.int64
    np.testing.assert_array_equal(segment.codes, codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 100), st.integers(0, 2), st.integers(-700, 700))
def test_frames_are_counted_as_the_feature_extractor_chunks(hundreds, chunks, offset):
    extractor = BaichuanAudioFeatureExtractor()
    samples = max(1, chunks * 480000 + 160 * hundreds + offset)
    try:
        expected = sum(extractor.num_frames(len(piece)) for piece in extractor.chunks(np.zeros(samples, dtype=np.float32)))
    except ValueError:
        expected = 0
    assert AudioReader(extractor, SIZES).count_frames(samples) == expected


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_headers_tell_the_length(reader, tmp_path, rate):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(rate * 2), rate))
    estimate, read = reader.estimate(Segment(source=str(path))), reader.read(Segment(source=str(path)))
    assert abs(estimate.num_frames - read.num_frames) <= 1 and estimate.waveform is None
    assert read.num_frames == 25
