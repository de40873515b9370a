"""Pitch tracks against known pitch, and a vocoder that learns from them."""

import builtins
import math

import pytest
import torch
from torch import nn

from modeling_baichuan_audio import BaichuanAudioVocoder
from modeling_baichuan_audio.conversion import tiny_config
from modeling_baichuan_audio.training import pitch
from modeling_baichuan_audio.training.pitch import PitchTracks, pitch_track
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.tasks import VocoderTask
from modeling_baichuan_audio.training.vocoder_training import vocoder_segments


RATE, HOP = 24000, 480


def glissando(seconds: float, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eleven harmonics of a pitch that rises by equal ratios: (samples,) waveform and its true F0 at every sample."""
    time = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    f0 = low * (high / low) ** (time / seconds)
    phase = 2 * math.pi * torch.cumsum(f0, 0) / RATE
    return sum(0.2 * torch.sin(order * phase) / order for order in range(1, 12)).float(), f0.float()


@pytest.mark.parametrize("hop", [480, 300, 256])
def test_a_glissando_is_followed_frame_by_frame(hop):
    wave, f0 = glissando(2.0, 90, 360)
    frames = len(wave) // hop
    track = pitch_track(wave, RATE, hop, frames)
    truth = f0[hop // 2 :: hop][:frames]
    assert track.shape == (frames,) and track.dtype == torch.float32
    voiced = track > 0
    edge = math.ceil(0.025 * RATE / hop)
    assert bool(voiced[edge:-edge].all())
    errors = ((track - truth) / truth)[voiced]
    assert float(errors.abs().max()) < 0.02
    # Half a frame off would be a mean of 0.3 % and more.
    assert abs(float(errors.mean())) < 5e-4
    assert torch.equal(pitch_track(wave[: 20 * hop + 7], RATE, hop, 20), pitch_track(wave[: 20 * hop], RATE, hop, 20))


def test_noise_and_silence_are_unvoiced():
    noise = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    voice, _ = glissando(1.0, 150, 200)
    assert not pitch_track(noise, RATE, HOP, 50).any()
    assert not pitch_track(torch.zeros(RATE), RATE, HOP, 50).any()
    track = pitch_track(torch.cat([noise, voice, torch.zeros(RATE)]), RATE, HOP, 150)
    voiced = track > 0
    assert bool(voiced[52:98].all()) and not voiced[:48].any() and not voiced[102:].any()


def test_the_shortest_clip_has_a_pitch():
    wave, f0 = glissando(0.1, 190, 210)
    assert float(pitch_track(wave[: 3 * HOP], RATE, HOP, 3)[1]) == pytest.approx(float(f0[3 * HOP // 2]), rel=0.02)


@pytest.mark.parametrize(
    ("waveform", "frames", "message"),
    [
        (torch.zeros(1, RATE), 5, "float waveform"),
        (torch.zeros(RATE, dtype=torch.int16), 5, "float waveform"),
        (torch.zeros(10 * HOP - 1), 10, "and 10 frames"),
        (torch.zeros(RATE), 0, "and 0 frames"),
        (torch.full((RATE,), float("nan")), 5, "must be finite"),
    ],
)
def test_bad_waveforms_are_refused(waveform, frames, message):
    with pytest.raises(ValueError, match=message):
        pitch_track(waveform, RATE, HOP, frames)


def test_without_praat_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "parselmouth":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"baichuan-audio\[train\]"):
        PitchTracks(RATE, HOP)


def test_a_clip_is_analysed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(pitch, "pitch_track", lambda *args: calls.append(args) or pitch_track(*args))
    tracks = PitchTracks(RATE, HOP, most=1)
    first, second = glissando(0.3, 100, 120)[0], glissando(0.3, 200, 220)[0]
    for _ in range(2):
        assert torch.equal(tracks(first), pitch_track(first, RATE, HOP, 15))
        assert torch.equal(tracks(second), pitch_track(second, RATE, HOP, 15))
    assert len(calls) == 3  # the second has no room, and is computed every time


@pytest.fixture
def vocoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BaichuanAudioVocoder(tiny_config().vocoder_config).train()


def batch(frames: int = 12):
    """Two segments with their true pitch, the second with an unvoiced end."""
    mels, waves, tracks = [], [], []
    for wave in (glissando(1.0, 120, 180)[0], glissando(1.0, 200, 260)[0]):
        if tracks:
            wave = torch.where(torch.arange(RATE) < RATE // 2, wave, 0.05 * torch.randn(RATE, generator=torch.Generator()))
        (mel,), (samples,), (start,) = vocoder_segments([wave], [frames], generator=torch.Generator().manual_seed(1))
        track = pitch_track(wave, RATE, HOP, RATE // HOP)[start : start + frames]
        mels, waves, tracks = [*mels, mel], [*waves, samples], [*tracks, track]
    return torch.stack(mels), torch.stack(waves), torch.stack(tracks)


def test_labels_drive_the_source_in_training_only(vocoder):
    mel, labels, f0 = batch()
    with torch.no_grad():
        plain, taught = vocoder(mel, seed=1, labels=labels), vocoder(mel, seed=1, labels=labels, f0_labels=f0)
        phases, noise = vocoder.source.draw([1, 1], torch.full((2,), len(labels[0])), len(labels[0]))
        by_hand = vocoder(mel, source=vocoder.source(f0, phases, noise), seed=1)
        assert not torch.equal(plain.waveform, taught.waveform)
        assert torch.equal(vocoder(mel, seed=[1, 1], labels=labels, f0_labels=f0).waveform, by_hand.waveform)
        assert torch.equal(plain.f0, taught.f0)  # what is predicted is still reported, and still what is judged
        assert float(taught.f0_loss) == pytest.approx(float((plain.f0 - f0).abs().mean()), rel=1e-5)
        vocoder.eval()
        judged = vocoder(mel, seed=1, labels=labels, f0_labels=f0)
        assert torch.equal(judged.waveform, vocoder(mel, seed=1).waveform) and judged.f0_loss is not None


def test_predictor_and_generator_learn_apart(vocoder):
    """A fresh predictor, all below the voicing threshold: each loss reaches all of its own part, and nothing of the other."""
    mel, labels, f0 = batch()
    output = vocoder(mel, seed=1, labels=labels, f0_labels=f0)
    assert float(output.f0.detach().max()) < vocoder.config.voiced_threshold
    names = {name for name, _ in vocoder.named_parameters()}
    predictor = {name for name in names if name.startswith("f0_predictor.")}
    for loss, expected in ((output.f0_loss, predictor), (output.mel_loss, names - predictor)):
        vocoder.zero_grad()
        loss.backward(retain_graph=True)
        assert {name for name, p in vocoder.named_parameters() if p.grad is not None and p.grad.any()} == expected


def test_labels_past_the_end_do_not_count(vocoder):
    mel, labels, f0 = batch()
    lengths = torch.tensor([12, 7])
    losses = []
    for value in (0.0, float("nan")):
        f0[1, 7:] = value
        vocoder.zero_grad()
        output = vocoder(mel, lengths, seed=1, labels=labels, f0_labels=f0)
        output.loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in vocoder.parameters())
        losses.append(float(output.loss.detach()))
    assert losses[0] == losses[1]


def test_training_with_pitch_finds_the_pitch(vocoder):
    """From a fresh start; the generator alone, with the predicted F0 far below the threshold, never would."""
    mel, labels, f0 = batch()
    assert 0 < int((f0 > 0).sum()) < f0.numel()
    optimizer = torch.optim.AdamW(vocoder.parameters(), lr=3e-3, betas=(0.8, 0.99))
    distances = []
    for step in range(100):
        output = vocoder(mel, seed=step, labels=labels, f0_labels=f0)
        assert step > 0 or float(output.f0.detach().max()) < vocoder.config.voiced_threshold
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(vocoder.parameters(), 10.0)
        optimizer.step()
        distances.append(float(output.f0_loss.detach()))
    assert sum(distances[-5:]) / 5 < 0.4 * distances[0], distances
    assert float(output.f0.detach()[f0 > 0].min()) > vocoder.config.voiced_threshold


# The stage


def vocoder_task(tiny, processor, **loss):
    changes = [f"loss={loss}", "data.train=nowhere.jsonl"]
    return VocoderTask(tiny, processor, read_recipe("tiny/vocoder", changes))


def rows(*waves: torch.Tensor) -> list[Row]:
    return [Row("audio", [Turn(None, [Segment(waveform=wave.numpy())])]) for wave in waves]


def test_pitch_is_cut_with_its_segment(tiny, processor):
    task = vocoder_task(tiny, processor, segment_frames=8, pitch=True)
    (long, truth), (short, _) = glissando(1.0, 100, 300), glissando(0.1, 150, 160)
    collated = task.collate(rows(long, short))
    assert [len(track) for track in collated["pitch"]] == [50, 5]
    starts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        inputs = task.model_inputs(collated, None)
        assert inputs["f0_labels"].shape == inputs["mel"].shape[:2] == (2, 8)
        matches = [s for s in range(43) if torch.equal(long[s * HOP : (s + 8) * HOP], inputs["labels"][0])]
        assert len(matches) == 1
        expected = truth[matches[0] * HOP + HOP // 2 :: HOP][:8]
        torch.testing.assert_close(inputs["f0_labels"][0], expected, rtol=0.02, atol=0)
        assert inputs["f0_labels"][1, :5].tolist() == collated["pitch"][1].tolist() and not inputs["f0_labels"][1, 5:].any()
        starts |= set(matches)
    assert len(starts) > 3
    assert task.module.train()(**inputs).f0_loss > 50  # Hz


def test_pitch_is_off_unless_asked_for(tiny, processor):
    task = vocoder_task(tiny, processor, segment_frames=8)
    collated = task.collate(rows(glissando(0.5, 100, 300)[0]))
    assert "pitch" not in collated and "f0_labels" not in task.model_inputs(collated, None)
    with pytest.raises(ValueError, match="`loss.pitch` must be true or false, got 3"):
        vocoder_task(tiny, processor, pitch=3)
