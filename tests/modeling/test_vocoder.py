import copy
import math

import pytest
import torch
from helpers.golden import golden
from torch import nn

from modeling_baichuan_audio.mel_spectrogram import vocoder_log_mel
from modeling_baichuan_audio.modeling_common import position_noise


@pytest.fixture
def vocoder(converted_model):
    return converted_model.vocoder


def mels() -> list[torch.Tensor]:
    return [golden()["vocoder_mel.0.0"].T, golden()["vocoder_mel.1.0"].T]


@pytest.mark.parametrize("given_source", [True, False])
@torch.no_grad()
def test_clip_alone_equals_clip_in_a_batch(vocoder, given_source):
    clips, hop = mels(), vocoder.config.hop_length
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=5.0)
    sources = [golden()["vocoder_source.0.0"][0], golden()["vocoder_source.1.0"][0]]
    source = nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=0.9) if given_source else None
    together = vocoder(padded, lengths, seed=[3, 4], source=source)
    for row, clip in enumerate(clips):
        alone = vocoder(clip[None], seed=3 + row, source=sources[row][None] if given_source else None)
        samples = len(clip) * hop
        assert int(together.waveform_lengths[row]) == samples == alone.waveform.shape[1]
        torch.testing.assert_close(together.waveform[row, :samples], alone.waveform[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.f0[row, : len(clip)], alone.f0[0], atol=1e-5, rtol=0)
        assert not together.waveform[row, samples:].any()


@torch.no_grad()
def test_fourier_transforms_are_torchs(vocoder):
    torch.manual_seed(0)
    signal, window = torch.randn(2, 960), torch.hann_window(16)
    lengths = torch.tensor([960, 960])
    ours = vocoder.stft(signal, lengths)
    theirs = torch.stft(signal, 16, 4, window=window, center=True, return_complex=True)
    torch.testing.assert_close(ours, torch.cat([theirs.real, theirs.imag], dim=1), atol=1e-5, rtol=0)
    magnitude, phase = torch.rand(2, 9, 241), torch.randn(2, 9, 241).clamp(-1, 1)
    back = vocoder.istft(magnitude, phase, torch.tensor([241, 241]))
    reference = torch.istft(torch.polar(magnitude, phase), 16, 4, window=window, center=True)
    torch.testing.assert_close(back, reference, atol=1e-5, rtol=0)


def test_harmonics_are_the_integral_of_f0(vocoder):
    torch.manual_seed(0)
    source, rate, hop = vocoder.source, vocoder.config.sampling_rate, vocoder.config.hop_length
    f0 = 80 + 200 * torch.rand(1, 3000)  # a minute
    phases = torch.rand(1, 9) * 2 * math.pi
    ours = source.harmonics(f0, phases)
    orders = torch.arange(1, 10, dtype=torch.float64)
    cycles = f0.double().repeat_interleave(hop, dim=1)[..., None] * orders / rate
    reference = torch.sin(2 * math.pi * (cycles.cumsum(1) % 1) + phases.double()[:, None])
    assert float((ours.double() - reference).abs().max()) < 0.02
    assert float((ours.double() - reference)[:, :48000].abs().max()) < 2e-3


def test_harmonics_have_the_gradient_of_the_integral(vocoder):
    """A frame's F0 turns every later sample, by as much as the frame is long."""
    source, hop = vocoder.source, vocoder.config.hop_length
    f0, phases = (80 + 200 * torch.rand(1, 6)).requires_grad_(), torch.rand(1, 9)
    sines = source.harmonics(f0, phases)
    sample = 4 * hop + 99
    sines[0, sample, 2].backward()
    with torch.no_grad():
        torch.testing.assert_close(sines, source.harmonics(f0, phases), atol=1e-4, rtol=0)
        quarter = source.harmonics(f0, phases + math.pi / 2)[0, sample, 2]
    slope = 3 * 2 * math.pi / vocoder.config.sampling_rate * quarter
    expected = slope * torch.tensor([hop, hop, hop, hop, 100.0, 0.0])
    torch.testing.assert_close(f0.grad[0], expected, atol=1e-5, rtol=1e-3)


def test_voicing(vocoder):
    source, config = vocoder.source, vocoder.config
    f0 = torch.tensor([[0.0, 9.0, 100.0]])
    phases, noise = source.draw([0], torch.tensor([3 * config.hop_length]), 3 * config.hop_length)
    weight, bias = source.linear.weight[0], source.linear.bias
    signal = torch.atanh(source(f0, phases, noise).detach()[0]) - bias.detach()
    loud = (0.1 / 3) * noise[0] @ weight.detach()
    torch.testing.assert_close(signal[: 2 * config.hop_length], loud[: 2 * config.hop_length], atol=1e-5, rtol=0)
    voiced = (0.1 * source.harmonics(f0, phases)[0] + 0.003 * noise[0]) @ weight.detach()
    torch.testing.assert_close(signal[2 * config.hop_length :], voiced[2 * config.hop_length :], atol=1e-5, rtol=0)
    assert phases[0, 0] == 0 and phases[0, 1:].abs().min() > 0 and phases.abs().max() <= math.pi


def test_training_without_a_seed_draws_from_the_devices_generator(vocoder, monkeypatch):
    """The seeded noise of a segment costs a second of noise per clip, on the CPU: most of a training step on a GPU."""
    monkeypatch.setattr("modeling_baichuan_audio.modeling_vocoder.position_noise", lambda *_: pytest.fail("seeded noise"))
    mel = torch.randn(2, 5, 80)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return vocoder.train()(mel).waveform

    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))
    torch.manual_seed(0)
    phases, noise = vocoder.source.draw(None, torch.tensor([2400, 1200]), 2400)
    assert noise.shape == (2, 2400, phases.shape[1]) and abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
    assert not phases[:, 0].any() and phases[:, 1:].abs().min() > 0 and math.pi / 2 < phases.abs().max() <= math.pi
    with pytest.raises(pytest.fail.Exception, match="seeded noise"):
        vocoder.eval()(mel)


def test_position_noise_is_one_endless_table():
    whole = position_noise(7, "x", 0, 1000, 3, block=64)
    for start, length in [(0, 64), (10, 5), (60, 10), (63, 2), (64, 64), (999, 1), (130, 500)]:
        assert torch.equal(position_noise(7, "x", start, length, 3, block=64), whole[start : start + length])
    assert position_noise(7, "x", 5, 0, 3, block=64).shape == (0, 3)
    assert not torch.equal(position_noise(8, "x", 0, 64, 3, block=64), whole[:64])
    assert not torch.equal(position_noise(7, "y", 0, 64, 3, block=64), whole[:64])


@torch.no_grad()
def test_seeds(vocoder):
    clip = mels()[1][None]
    assert torch.equal(vocoder(clip, seed=1).waveform, vocoder(clip, seed=1).waveform)
    assert not torch.equal(vocoder(clip, seed=1).waveform, vocoder(clip, seed=2).waveform)


@torch.no_grad()
def test_waveform_stays_in_range(converted_model):
    vocoder = copy.deepcopy(converted_model.vocoder)
    vocoder.conv_post.bias += 8.0
    loud = vocoder(mels()[0][None], seed=0).waveform
    assert loud.abs().max() == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("mel", "source", "message"),
    [
        (torch.zeros(80, 5), None, "`mel` must be"),
        (torch.zeros(1, 5, 79), None, "`mel` must be"),
        (torch.zeros(1, 0, 80), None, "`mel` must be"),
        (torch.zeros(1, 5, 80), torch.zeros(1, 5), "`source` must be"),
    ],
)
def test_bad_input_is_refused(vocoder, mel, source, message):
    with pytest.raises(ValueError, match=message):
        vocoder(mel, source=source)


def test_log_mel_of_the_training_target():
    """A tone lands in the mel bin around it, at the level that the formula gives."""
    time = torch.arange(24000) / 24000
    mel = vocoder_log_mel(0.5 * torch.sin(2 * math.pi * 1000 * time)[None])
    assert mel.shape == (1, 50, 80)
    # Slaney's scale is linear to 1 kHz (15 mel) and logarithmic above; 8 kHz is 45.25 mel.
    top = 15 + math.log(8) / (math.log(6.4) / 27)
    assert mel[0, 25].argmax() == round(15 / top * 81) - 1
    assert mel.min() >= math.log(1e-5)
    with pytest.raises(ValueError, match="at least 721 samples"):
        vocoder_log_mel(torch.zeros(1, 700))


def test_log_mel_of_a_part_with_what_surrounds_it():
    wave = torch.randn(1, 24000)
    part = vocoder_log_mel(wave[:, 10 * 480 - 720 : 18 * 480 + 720], reflect=False)
    torch.testing.assert_close(part, vocoder_log_mel(wave)[:, 10:18], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="at least 1920 samples"):
        vocoder_log_mel(torch.zeros(1, 1900), reflect=False)


def test_vanishing_magnitudes_have_finite_gradients(shared_tiny_model):
    vocoder = shared_tiny_model.vocoder
    magnitude = torch.tensor([1.0, 1e-30, 1e-42, 0.0])[None, None].repeat(1, 9, 1).requires_grad_()
    phase = torch.full((1, 9, 4), 0.3).requires_grad_()
    vocoder.istft(magnitude, phase, torch.tensor([4])).square().sum().backward()
    assert magnitude.grad.isfinite().all() and phase.grad.isfinite().all()
    assert magnitude.grad.abs().max() > 0 and phase.grad.abs().max() > 0
