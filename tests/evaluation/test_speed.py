import pytest
import torch

from modeling_baichuan_audio.evaluation.speed import first_sound, machine, measure_speed, measured_on, speed_figures


def text(length):
    return {"type": "text", "token_ids": torch.zeros(length)}


def audio(frames):
    return {"type": "audio", "audio_codes": torch.zeros(8, frames)}


TIMINGS = {"prefill_seconds": 0.5, "decode_seconds": 4.0, "waveform_seconds": 1.0, "steps": 40}


def test_first_sound():
    # One piece: 9 tokens and a switch, 29 frames and an end, which are all the steps there are.
    assert first_sound([text(9), audio(29)], TIMINGS) == 5.5
    assert first_sound([text(9), audio(29)], TIMINGS | {"steps": 39}) == 5.5
    # Two pieces: half of the steps and a third of the frames belong to the first.
    assert first_sound([text(9), audio(9), text(1), audio(18)], TIMINGS) == pytest.approx(0.5 + 2.0 + 1 / 3)
    assert first_sound([text(9)], TIMINGS) is None


def test_medians():
    items = [
        {"kind": "reply", "seconds": 2.0, "audio_seconds": 4.0, "first_sound": 2.0},
        {"kind": "reply", "seconds": 3.0, "audio_seconds": 2.0, "first_sound": 3.0},
        {"kind": "reply", "seconds": 1.0, "audio_seconds": 4.0, "first_sound": 1.0},
        {"kind": "reply", "seconds": 1.0, "audio_seconds": 0.0, "first_sound": None},
        {"kind": "resynthesis", "seconds": 1.0, "audio_seconds": 10.0},
    ]
    assert speed_figures(items) == {"first_sound": (2.0, 3), "reply": (0.5, 3), "resynthesis": (0.1, 1)}


def test_the_machine_is_timed_once(subject, sets, monkeypatch):
    for name in ("LONGEST_PIECE", "_LONGEST_REPLY"):
        monkeypatch.setattr(f"modeling_baichuan_audio.evaluation.subject.{name}", 12)
    items = measure_speed(subject, sets.questions, sets.voices, 1)
    assert [item["kind"] for item in items] == ["machine", "reply", "resynthesis", "transcription"]
    assert all(item["seconds"] > 0 for item in items[1:])
    # Both are the second of their set: the first call is not counted.
    assert items[1]["first_sound"] is None or 0 < items[1]["first_sound"] <= items[1]["seconds"] + 1e-9
    assert items[2]["audio_seconds"] == sets.voices[1].duration
    assert measured_on(items) == machine() and machine()["cores"] >= 1
    assert measure_speed(subject, sets.questions, sets.voices, 1) == items
