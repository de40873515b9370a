"""The vocoder's loss as an energy distance (arXiv 2008.01160): two takes of every segment."""

import copy

import pytest
import torch

from modeling_baichuan_audio.conversion import tiny_model
from modeling_baichuan_audio.mel_spectrogram import vocoder_log_mel
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.tasks import make_task
from modeling_baichuan_audio.training.vocoder_training import VocoderTrainingModule
from modeling_baichuan_audio.vocoder_loss import MEL_SCALES, multi_scale_mel_distance, slaney_filters, stft_magnitude


HOP, RATE = 480, 24000


@pytest.fixture
def vocoder(tiny):
    """Quiet enough that nothing is clipped; its source is noise, for it finds no pitch."""
    config = tiny.vocoder.config
    config.mel_loss_weight, config.stft_loss_weight, config.multi_scale_mel_loss_weight = 0.0, 0.0, 2.0
    with torch.no_grad():
        tiny.vocoder.conv_post.bias.sub_(3.0)
        tiny.vocoder.f0_predictor.classifier.weight.zero_()
        tiny.vocoder.f0_predictor.classifier.bias.zero_()
    return tiny.vocoder


def noise(*frames: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    waves = [0.1 * torch.randn(count * HOP, generator=generator) for count in frames]
    mels = [vocoder_log_mel(wave[None])[0] for wave in waves]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(mels, True), pad(waves, True), torch.tensor(frames)


def test_loss_by_hand(vocoder):
    mel, labels, lengths = noise(8, 8)
    output = VocoderTrainingModule(vocoder, energy_distance=True)(mel, labels, seed=[3, 4])
    alone = VocoderTrainingModule(vocoder)(mel, labels, seed=[3, 4])
    torch.testing.assert_close(output.waveform, alone.waveform)
    assert alone.spread is None and output.waveform.shape == labels.shape and output.waveform_lengths.tolist() == [8 * HOP] * 2
    # The other take has the same mels, and phases and noise of its own.
    doubled = vocoder(mel.repeat(2, 1, 1), seed=[3, 4, 3 ^ (1 << 40), 4 ^ (1 << 40)]).waveform
    first, second = doubled.split(2)
    torch.testing.assert_close(first, output.waveform)

    def distance(a, b):
        return multi_scale_mel_distance(a, b, RATE).mean()

    torch.testing.assert_close(output.spread, distance(first, second))
    assert output.spread > 0
    attraction = (distance(first, labels) + distance(second, labels)) / 2
    torch.testing.assert_close(output.energy_distance, attraction - output.spread / 2)
    torch.testing.assert_close(output.loss, 2.0 * output.energy_distance)

    f0_labels = torch.full((2, 8), 100.0)
    with_f0 = VocoderTrainingModule(vocoder.eval(), energy_distance=True)(mel, labels, f0_labels=f0_labels, seed=[3, 4])
    assert with_f0.f0_loss == 100
    torch.testing.assert_close(with_f0.loss, output.loss + 100 * vocoder.config.f0_loss_weight)


def test_distance_by_hand():
    _, waves, _ = noise(6, 6, 6, 6)
    first, second = waves.split(2)
    expected = torch.zeros(2)
    for n_fft, bins in MEL_SCALES:
        mels = [
            (slaney_filters(n_fft, bins, RATE).T @ stft_magnitude(wave, n_fft, n_fft // 4, n_fft)).clamp(min=1e-5).log()
            for wave in (first, second)
        ]
        expected += (mels[0] - mels[1]).square().mean(1).sqrt().mean(1)
    torch.testing.assert_close(multi_scale_mel_distance(first, second, RATE), expected)
    torch.testing.assert_close(multi_scale_mel_distance(second, first, RATE), expected)
    silence = torch.zeros(1, 6 * HOP, requires_grad=True)
    multi_scale_mel_distance(silence, torch.zeros(1, 6 * HOP), RATE).sum().backward()
    assert not silence.grad.any()  # and not "not a number"


def test_both_takes_get_a_gradient(vocoder):
    """Half of what goes off is the gradient of the distance between the takes with respect to either."""
    mel, labels, _ = noise(8)
    module = VocoderTrainingModule(vocoder, energy_distance=True)
    (ours,) = torch.autograd.grad(module(mel, labels, seed=5).spread, vocoder.conv_post.weight)
    first, second = vocoder(mel.repeat(2, 1, 1), seed=[5, 5 ^ (1 << 40)]).waveform.split(1)
    parts = [(first, second.detach()), (first.detach(), second)]
    grads = [
        torch.autograd.grad(multi_scale_mel_distance(*pair, RATE).mean(), vocoder.conv_post.weight, retain_graph=True)[0]
        for pair in parts
    ]
    torch.testing.assert_close(ours, grads[0] + grads[1], rtol=1e-3, atol=1e-5)
    assert all(grad.any() for grad in grads)


def test_a_clip_alone_equals_the_clip_in_a_padded_batch(vocoder):
    mel, labels, lengths = noise(9, 6)
    module = VocoderTrainingModule(vocoder, energy_distance=True)
    whole = module(mel, labels, lengths, seed=[1, 2])
    alone = [module(mel[i : i + 1, :n], labels[i : i + 1, : n * HOP], seed=[i + 1]) for i, n in enumerate((9, 6))]
    torch.testing.assert_close(whole.loss, (9 * alone[0].loss + 6 * alone[1].loss) / 15)
    torch.testing.assert_close(whole.spread, (9 * alone[0].spread + 6 * alone[1].spread) / 15)


def test_without_a_seed_the_takes_differ_too(vocoder):
    mel, labels, _ = noise(6)
    for mode in (True, False):
        assert VocoderTrainingModule(vocoder, energy_distance=True).train(mode)(mel, labels).spread > 0


def test_a_recipe_asks_for_it(processor):
    model = tiny_model()
    for config in (model.vocoder.config, model.config.vocoder_config):
        config.mel_loss_weight, config.stft_loss_weight, config.multi_scale_mel_loss_weight = 0.0, 0.0, 1.0
    for asked in ("true", "false"):
        changes = ["model=untrained", "data.train=x", "output=y", f"loss.energy_distance={asked}"]
        task = make_task(model, processor, read_recipe("tiny/vocoder", changes))
        assert task.module.energy_distance == (asked == "true")


@pytest.mark.slow
def test_noise_is_learnt_as_noise(vocoder):
    """By distance alone takes come to resemble one another; as an energy distance they differ as much as two recordings do."""

    def spread_after(steps, energy_distance):
        torch.manual_seed(0)
        module = VocoderTrainingModule(copy.deepcopy(vocoder), energy_distance=energy_distance)
        optimizer = torch.optim.Adam(module.vocoder.parameters(), lr=2e-3)
        for step in range(steps):
            mel, labels, _ = noise(5, 5, seed=step)
            optimizer.zero_grad()
            module(mel, labels).loss.backward()
            optimizer.step()
        mel, _, _ = noise(5, 5, seed=1000)
        with torch.no_grad():
            takes = [module.vocoder(mel, seed=seed).waveform for seed in (1, 2)]
        return multi_scale_mel_distance(*takes, RATE).mean()

    recordings = multi_scale_mel_distance(noise(5, 5, seed=1001)[1], noise(5, 5, seed=1002)[1], RATE).mean()
    assert spread_after(150, False) < 0.5 * recordings
    assert spread_after(150, True) > 0.85 * recordings


def test_flickering_loudness_does_not_pass_for_noise():
    """Noise whose loudness flickers is further from noise, as an energy distance, than noise is."""
    generator = torch.Generator().manual_seed(7)

    def takes(flicker: float) -> torch.Tensor:
        gains = (flicker * torch.randn(16, 40, generator=generator)).exp().repeat_interleave(HOP // 2, 1)
        return 0.1 * gains * torch.randn(16, 20 * HOP, generator=generator)

    def energy(one, other, real):
        d = [multi_scale_mel_distance(*pair, RATE).mean() for pair in ((one, real), (other, real), (one, other))]
        return (d[0] + d[1]) / 2 - d[2] / 2

    real = takes(0.0)
    assert energy(takes(0.0), takes(0.0), real) < energy(takes(0.4), takes(0.4), real)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)])
def test_other_weights_are_refused(vocoder, weights):
    names = ("mel_loss_weight", "stft_loss_weight", "multi_scale_mel_loss_weight")
    for name, weight in zip(names, weights):
        setattr(vocoder.config, name, weight)
    with pytest.raises(ValueError, match="needs their weight alone, got"):
        VocoderTrainingModule(vocoder, energy_distance=True)
