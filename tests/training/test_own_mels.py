"""The model's own mels: what its two ways make of a clip's codes, each made once."""

import numpy as np
import pytest
import torch

from modeling_baichuan_audio.conversion import tiny_model
from modeling_baichuan_audio.training.audio_codes import AudioCodeEncoder, RememberedCodes
from modeling_baichuan_audio.training.own_mels import OwnMels, as_vocoder_mel
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.tasks import make_task


RATE = 24000


@pytest.fixture
def model():
    return tiny_model().eval()


@pytest.fixture
def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(RATE * seconds))).astype(np.float32) for seconds in (1.3, 0.9)]


@pytest.fixture
def own_mels(model, processor):
    encoder, extractor = AudioCodeEncoder(model.audio_tokenizer, processor.feature_extractor), processor.feature_extractor
    codes = RememberedCodes(lambda waves: encoder([extractor._resample(wave, RATE, 16000) for wave in waves]))
    return OwnMels(model, codes)


@torch.no_grad()
def test_both_ways(model, own_mels, clips):
    made = own_mels(clips * 2, ["mel_decoder", "flow_matching", "flow_matching", "mel_decoder"])
    for index, (mel, clip) in enumerate(zip(made, clips * 2)):
        codes = own_mels.codes([clip])
        assert mel.shape == (4 * codes.shape[2] - 1, 80) and len(mel) <= len(clip) // 480
        decoded = model.audio_tokenizer.decode(codes)
        if index in (0, 3):
            config = model.config
            expected = as_vocoder_mel(
                decoded.refined_mel[0], len(mel), config.audio_tokenizer_config, config.flow_matching_config
            )
            torch.testing.assert_close(mel, expected, atol=0.02, rtol=0)  # kept in float16
        else:
            mu = model.flow_matching(decoded.hidden_states, decoded.hidden_lengths, seed=0).condition[0]
            assert torch.isfinite(mel).all() and mel.shape == mu.shape


def test_each_is_made_once_and_does_not_depend_on_the_others(own_mels, clips, monkeypatch):
    together = own_mels(clips, ["flow_matching"] * 2)
    made = []
    monkeypatch.setattr(own_mels, "_make", lambda waves, way, seeds: made.append(len(waves)))
    again = own_mels(clips[::-1], ["flow_matching"] * 2)
    assert not made and torch.equal(again[0], together[1]) and torch.equal(again[1], together[0])
    alone = OwnMels(own_mels.model, own_mels.codes)(clips[1:], ["flow_matching"])
    torch.testing.assert_close(alone[0], together[1], atol=0.02, rtol=0)


@pytest.mark.parametrize(("share", "expected"), [(1.0, 0), (0.5, 1)])
def test_the_vocoder_learns_from_a_share_of_them(share, expected, processor, clips, tmp_path, monkeypatch):
    changes = [f"loss.own_mels={share}", "loss.segment_frames=20", "loss.pitch=false", "data.train=x", f"output={tmp_path}"]
    task = make_task(tiny_model(), processor, read_recipe("tiny/vocoder", ["model=untrained", *changes]))
    monkeypatch.setattr(torch, "rand", lambda count: torch.tensor([0.1, 0.9])[:count])
    rows = [Row("audio", [Turn(None, [Segment(waveform=clip)])]) for clip in clips]
    inputs = task.model_inputs(task.collate(rows), None)
    task.own_share = 1e-9
    torch.manual_seed(0)
    real = task.model_inputs(task.collate(rows), None)
    assert inputs["mel"].shape == real["mel"].shape == (2, 20, 80) and inputs["labels"].shape == (2, 20 * 480)
    own = task.own_mels(clips, [OwnMels.WAYS[1], OwnMels.WAYS[share > 0.5 and 0]])

    def is_part(piece, mel):
        return any(torch.equal(piece, mel[start : start + 20]) for start in range(len(mel) - 19))

    assert is_part(inputs["mel"][0], own[0])
    assert is_part(inputs["mel"][1], own[1]) is (share == 1.0)
    assert not is_part(real["mel"][0], own[0])
    # The sound beside them is the recording's.
    assert any(torch.equal(inputs["labels"][0], torch.from_numpy(clips[0][480 * s : 480 * (s + 20)])) for s in range(60))
