import copy
import math

import pytest
import torch
from torch import nn

from modeling_baichuan_audio.conversion import tiny_model
from modeling_baichuan_audio.mel_spectrogram import vocoder_log_mel
from modeling_baichuan_audio.training.discriminators import (
    VocoderDiscriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from modeling_baichuan_audio.training.vocoder_training import VocoderTrainingModule


HOP = 480


def quiet_vocoder():
    vocoder = tiny_model().vocoder
    with torch.no_grad():
        vocoder.conv_post.bias.sub_(3.0)
        vocoder.f0_predictor.classifier.bias.fill_(150.0)
    return vocoder


@pytest.fixture
def module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return VocoderTrainingModule(quiet_vocoder(), adversarial=True, period_width=2, spectrogram_width=4)


def batch_of(*frames: int, padding: float = 0.0):
    waves = [0.3 * torch.sin(2 * math.pi * (150 + 30 * n) * torch.arange(n * HOP) / 24000) for n in frames]
    mels = [vocoder_log_mel(wave[None])[0] for wave in waves]
    pad = nn.utils.rnn.pad_sequence
    return pad(mels, True), pad(waves, True, padding), torch.tensor(frames)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_released_sizes():
    """HiFi-GAN's five period discriminators have 41.1 million weights; here with one gain per channel for weight norm."""
    with torch.device("meta"):
        discriminators = VocoderDiscriminators()
    shapes = [tuple(p.shape) for n, p in discriminators.period[0].named_parameters() if n.endswith("original1")]
    assert shapes == [(32, 1, 5, 1), (128, 32, 5, 1), (512, 128, 5, 1), (1024, 512, 5, 1), (1024, 1024, 5, 1), (1, 1024, 3, 1)]
    size = sum(p.numel() for n, p in discriminators.period.named_parameters() if not n.endswith("original0"))
    assert round(size / 1e6, 1) == 41.1
    assert [d.period for d in discriminators.period] == [2, 3, 5, 7, 11]
    assert [d.resolution for d in discriminators.spectrogram] == [(1024, 120, 600), (2048, 240, 1200), (512, 50, 240)]
    shapes = [tuple(p.shape) for n, p in discriminators.spectrogram[0].named_parameters() if n.endswith("original1")]
    assert shapes == [(32, 1, 3, 9), *[(32, 32, 3, 9)] * 3, (32, 32, 3, 3), (1, 32, 3, 3)]


@torch.no_grad()
def test_period_discriminator_sees_one_phase_per_column(module):
    """A change at one sample moves scores of that sample's column alone."""
    for discriminator in module.discriminators.period:
        wave = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
        changed = wave.clone()
        changed[0, 1501] += 1.0
        difference = (discriminator(wave)[-1] - discriminator(changed)[-1]).abs().amax(2)[0, 0]
        assert difference.nonzero()[:, 0].tolist() == [1501 % discriminator.period]
        first = discriminator.net.convs[0]
        columns = nn.functional.pad(wave, (0, -3000 % discriminator.period), mode="reflect").view(-1, discriminator.period).T
        expected = nn.functional.conv1d(columns[:, None], first.weight[..., 0], first.bias, stride=3, padding=2)
        expected = torch.where(expected > 0, expected, 0.1 * expected)
        torch.testing.assert_close(discriminator(wave)[0][0], expected.permute(1, 2, 0), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_losses_by_hand():
    generator = torch.Generator().manual_seed(0)
    real = [[torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 1, 4, 5, generator=generator)] for _ in range(3)]
    fake = [[torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 1, 4, 5, generator=generator)] for _ in range(3)]
    for row in range(2):
        d = sum(float(((r[-1][row] - 1) ** 2).mean() + (f[-1][row] ** 2).mean()) for r, f in zip(real, fake))
        g = sum(float(((f[-1][row] - 1) ** 2).mean()) for f in fake)
        m = sum(float((r[0][row] - f[0][row]).abs().mean()) for r, f in zip(real, fake))
        assert float(discriminator_loss(real, fake)[row]) == pytest.approx(d, rel=1e-5)
        assert float(adversarial_loss(fake)[row]) == pytest.approx(g, rel=1e-5)
        assert float(feature_matching_loss(real, fake)[row]) == pytest.approx(m, rel=1e-5)
    perfect = [[maps[0], torch.ones_like(maps[1])] for maps in real]
    fooled = [[maps[0], torch.zeros_like(maps[1])] for maps in real]
    assert float(discriminator_loss(perfect, fooled).sum()) == 0 and float(adversarial_loss(perfect).sum()) == 0


@torch.no_grad()
def test_module_sums_its_parts(module):
    mels, labels, lengths = batch_of(4, 3)
    config = module.config
    config.adversarial_loss_weight, config.feature_matching_loss_weight = 0.5, 3.0
    output = module(mels, labels, lengths, seed=[1, 2])
    spectral = module.vocoder(mels, lengths, seed=[1, 2], labels=labels)
    assert torch.equal(output.waveform, spectral.waveform) and torch.equal(output.mel_loss, spectral.mel_loss)
    pieces = torch.zeros(3)
    for row, frames in enumerate(lengths.tolist()):
        real = module.discriminators(labels[row : row + 1, : frames * HOP])
        fake = module.discriminators(output.waveform[row : row + 1, : frames * HOP])
        own = [discriminator_loss(real, fake), adversarial_loss(fake), feature_matching_loss(real, fake)]
        pieces += torch.cat(own) * frames / 7
    reported = torch.stack([output.discriminator_loss, output.adversarial_loss, output.feature_matching_loss])
    torch.testing.assert_close(reported, pieces, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, spectral.loss + 0.5 * pieces[1] + 3.0 * pieces[2], atol=1e-4, rtol=1e-5)
    without = VocoderTrainingModule(module.vocoder)(mels, labels, lengths, seed=[1, 2])
    assert without.discriminator_loss is None and torch.equal(without.loss, spectral.loss)


@torch.no_grad()
def test_clip_alone_equals_clip_in_a_padded_batch(module):
    mels, labels, lengths = batch_of(5, 3, 4, padding=float("nan"))
    names = ("loss", "discriminator_loss", "adversarial_loss", "feature_matching_loss", "mel_loss", "stft_loss")
    together = module(mels, labels, lengths, seed=[1, 2, 3])
    totals = torch.zeros(len(names))
    for row, frames in enumerate(lengths.tolist()):
        mel, label, _ = batch_of(frames)
        share = module(mel, label, seed=row + 1, num_items_in_batch=12)
        totals += torch.stack([share[name] for name in names])
    torch.testing.assert_close(torch.stack([together[name] for name in names]), totals, atol=1e-5, rtol=1e-5)


def test_each_loss_trains_its_own_half(module):
    mels, labels, lengths = batch_of(4, 3)
    output = module(mels, labels, lengths, seed=1)
    assert all(parameter.requires_grad for parameter in module.parameters())
    output.loss.backward(retain_graph=True)
    of_loss = gradients(module)
    assert set(of_loss) == {name for name, _ in module.named_parameters() if name.startswith("vocoder.")}
    module.zero_grad()
    output.discriminator_loss.backward(retain_graph=True)
    of_discriminator_loss = gradients(module)
    assert set(of_discriminator_loss) == {name for name, _ in module.named_parameters() if name.startswith("discriminators.")}
    module.zero_grad()
    (output.loss + output.discriminator_loss).backward()
    both = of_loss | of_discriminator_loss
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, both[name], atol=1e-5, rtol=1e-4, msg=name)


def test_adversarial_losses_alone_reach_the_vocoder(module):
    mels, labels, lengths = batch_of(4, 3)
    for piece in ("adversarial_loss", "feature_matching_loss"):
        module.zero_grad()
        module(mels, labels, lengths, seed=1)[piece].backward()
        assert set(gradients(module)) == {name for name, _ in module.named_parameters() if name.startswith("vocoder.")}, piece


def optimizers(module):
    return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (module.vocoder, module.discriminators)]


def train(module, steps, first, optimizer_pair) -> list[float]:
    mels, labels, lengths = batch_of(4, 3)
    losses = []
    for step in range(first, first + steps):
        output = module(mels, labels, lengths, seed=step)
        for optimizer, loss in zip(optimizer_pair, (output.loss, output.discriminator_loss)):
            optimizer.zero_grad()
            loss.backward()
        for optimizer in optimizer_pair:
            optimizer.step()
        losses += [float(output.loss.detach()), float(output.discriminator_loss.detach())]
    return losses


def test_two_optimizers_and_exact_resumption(module):
    """With weight norm on: the module's state keeps its parameters, the vocoder's own state stays plain."""
    module.vocoder.apply_weight_norm()
    pair = optimizers(module)
    losses = train(module, 3, 0, pair)
    saved = copy.deepcopy([module.state_dict(), *(optimizer.state_dict() for optimizer in pair)])
    assert set(saved[0]) == {name for name, _ in module.named_parameters()}
    assert "conv_pre.weight" in module.vocoder.state_dict()
    uninterrupted = train(module, 2, 3, pair)
    resumed = VocoderTrainingModule(quiet_vocoder(), adversarial=True, period_width=2, spectrogram_width=4)
    resumed.vocoder.apply_weight_norm()
    resumed.load_state_dict(saved[0])
    pair = optimizers(resumed)
    for optimizer, state in zip(pair, saved[1:]):
        optimizer.load_state_dict(state)
    assert train(resumed, 2, 3, pair) == uninterrupted
    assert losses[5] < losses[1]  # the discriminators learn


@pytest.mark.parametrize(("width", "periods"), [(0, (2, 3)), (2, (0,))])
def test_bad_sizes_are_refused(width, periods):
    with pytest.raises(ValueError, match="must be positive"):
        VocoderDiscriminators(width, 2, periods)
