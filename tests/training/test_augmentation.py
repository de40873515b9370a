"""Other rooms and speeds: how a clip changes, what stays, and what the tokenizer is asked for."""

import numpy as np
import pytest
import soundfile
import torch

from modeling_baichuan_audio.conversion import tiny_model
from modeling_baichuan_audio.training.augmentation import at_another_speed, through_a_room
from modeling_baichuan_audio.training.mel_targets import tokenizer_mel_targets
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.tasks import make_task


RATE = 24000


@pytest.fixture
def clip(recordings) -> np.ndarray:
    return soundfile.read(recordings / "3.wav", dtype="float32")[0]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bands(samples: np.ndarray) -> np.ndarray:
    """Level in dB of eight bands of the spectrum, the highest left out."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    return 10 * np.log10([part.mean() for part in np.array_split(power[: len(power) // 2], 8)])


def test_a_room_changes_the_sound_and_neither_its_time_nor_its_loudness(clip):
    changes = []
    for seed in range(40):
        heard = through_a_room(clip, RATE, seeded(seed))
        assert heard.dtype == np.float32 and heard.shape == clip.shape and np.abs(heard).max() <= 0.99
        assert np.sqrt(np.square(heard).mean() / np.square(clip).mean()) == pytest.approx(1, abs=0.1)
        lag = np.argmax(np.correlate(np.abs(heard), np.abs(clip), "full")) - len(clip) + 1
        assert abs(lag) < 0.02 * RATE
        changes.append(bands(heard) - bands(clip))
    assert np.array_equal(heard, through_a_room(clip, RATE, seeded(seed)))
    # The lowest band is nearly all there is of the loudness, which stays; every other one changes, in dB.
    assert np.std(changes, axis=0)[1:].min() > 3


def test_silence_stays_silence():
    assert not through_a_room(np.zeros(8000, np.float32), 16000, seeded(0)).any()


def test_another_speed_moves_length_and_pitch_together():
    clip = np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE).astype(np.float32)
    factors = []
    for seed in range(30):
        changed = at_another_speed(clip, RATE, 1.3, seeded(seed))
        factor = len(clip) / len(changed)
        peak = np.abs(np.fft.rfft(changed * np.hanning(len(changed)))).argmax() * RATE / len(changed)
        assert peak == pytest.approx(200 * factor, abs=2)
        factors.append(factor)
    assert 1 / 1.31 < min(factors) < 0.85 and 1.15 < max(factors) < 1.31


def test_the_tokenizer_hears_the_room_and_is_to_say_the_clean_clip(clip, processor, tmp_path):
    changes = ["model=untrained", "data.train=x", f"output={tmp_path}"]
    clip = processor.feature_extractor.at_rate(clip, 16000)[:9000]
    rows = [Row("asr", [Turn(None, [Segment(waveform=clip), Segment(text="number")])])]
    tasks = {
        name: make_task(tiny_model(), processor, read_recipe("tiny/tokenizer", [*changes, *options]))
        for name, options in {"plain": [], "rooms": ["loss.rooms=1"], "speed": ["loss.speed=1.3"]}.items()
    }
    batches = {}
    for name, task in tasks.items():
        torch.manual_seed(3)
        batches[name] = task.collate(rows)
    for name in ("coarse_labels", "mel_labels", "input_features_mask"):
        assert torch.equal(batches["plain"][name], batches["rooms"][name])
    assert not torch.allclose(batches["plain"]["input_features"], batches["rooms"]["input_features"], atol=0.05)
    longer = batches["speed"]["input_features_mask"].sum() / batches["plain"]["input_features_mask"].sum()
    assert 1 / 1.32 < longer < 1.32 and longer != 1
    assert batches["speed"]["coarse_labels"].shape[1] != batches["plain"]["coarse_labels"].shape[1]
    torch.manual_seed(3)
    changed = at_another_speed(clip, 16000, 1.3)
    expected = tokenizer_mel_targets([changed], tasks["speed"].model.config.audio_tokenizer_config)
    torch.testing.assert_close(batches["speed"]["mel_labels"], expected["mel_labels"])
