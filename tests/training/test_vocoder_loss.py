import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioVocoder, BaichuanAudioVocoderConfig
from modeling_baichuan_audio.conversion import tiny_config
from modeling_baichuan_audio.mel_spectrogram import vocoder_log_mel
from modeling_baichuan_audio.modeling_vocoder import _exp_limited, _limited
from modeling_baichuan_audio.training.vocoder_training import part_at_another_speed, vocoder_segments
from modeling_baichuan_audio.vocoder_loss import MEL_SCALES, multi_scale_mel_loss


HOP = 480


@pytest.fixture
def vocoder(tiny):
    """Random weights, quiet enough that nothing is clipped, with a voice at 150 Hz."""
    with torch.no_grad():
        tiny.vocoder.conv_post.bias.sub_(3.0)
        tiny.vocoder.f0_predictor.classifier.bias.fill_(150.0)
    return tiny.vocoder


def voices(*frames: int) -> list[torch.Tensor]:
    """Harmonic tones with some noise, 24 kHz."""
    generator = torch.Generator().manual_seed(3)
    waves = []
    for index, count in enumerate(frames):
        time = torch.arange(count * HOP) / 24000
        wave = sum(torch.sin(2 * math.pi * (120 + 40 * index) * order * time) / order for order in range(1, 12))
        waves.append(0.15 * wave + 0.01 * torch.randn(len(time), generator=generator))
    return waves


def batch_of(waves: list[torch.Tensor], mel_padding: float = 0.0, wave_padding: float = 0.0):
    mels = [vocoder_log_mel(wave[None])[0] for wave in waves]
    lengths = torch.tensor([len(mel) for mel in mels])
    pad = nn.utils.rnn.pad_sequence
    return pad(mels, True, mel_padding), pad(waves, True, wave_padding), lengths


def numpy_magnitude(wave: np.ndarray, n_fft: int, hop: int, window: int, floor: float, reach: int) -> np.ndarray:
    """(frames, bins) of reflect-padded frames, the window in the middle of each."""
    hann = np.zeros(n_fft)
    left = (n_fft - window) // 2
    hann[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(wave, reach, mode="reflect")
    starts = range(0, len(padded) - n_fft + 1, hop)
    spectrum = np.array([np.fft.rfft(padded[start : start + n_fft] * hann) for start in starts])
    return np.sqrt(np.abs(spectrum) ** 2 + floor)


def slaney_filters(count: int = 80, n_fft: int = 1920, highest: float = 8000.0) -> np.ndarray:
    """(count, n_fft / 2 + 1): triangles on Slaney's scale (linear to 1 kHz, then 27 steps per factor 6.4), of unit area."""

    def to_hertz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    corners = to_hertz(np.linspace(0, 15 + np.log(highest / 1000) / (np.log(6.4) / 27), count + 2))
    bins = np.linspace(0, 12000, n_fft // 2 + 1)
    rows = []
    for low, mid, high in zip(corners, corners[1:], corners[2:]):
        triangle = np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)))
        rows.append(triangle * 2 / (high - low))
    return np.array(rows)


def numpy_losses(generated: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    ours, theirs = generated.detach().double().numpy(), target.double().numpy()
    mels = [np.log(np.maximum(numpy_magnitude(w, 1920, 480, 1920, 1e-9, 720) @ slaney_filters().T, 1e-5)) for w in (ours, theirs)]
    stft = 0.0
    for n_fft, hop, window in [(512, 50, 240), (1024, 120, 600), (2048, 240, 1200)]:
        a, b = (numpy_magnitude(w, n_fft, hop, window, 1e-7, n_fft // 2) for w in (ours, theirs))
        stft += np.sqrt(np.sum((b - a) ** 2)) / np.sqrt(np.sum(b**2)) + np.mean(np.abs(np.log(b) - np.log(a)))
    return float(np.mean(np.abs(mels[0] - mels[1]))), float(stft / 3)


@torch.no_grad()
def test_losses_by_hand(vocoder):
    vocoder.config.mel_loss_weight, vocoder.config.stft_loss_weight = 3.0, 0.5
    waves = voices(6, 4)
    mels, labels, lengths = batch_of(waves)
    output = vocoder(mels, lengths, seed=[1, 2], labels=labels)
    pieces = [numpy_losses(output.waveform[row, : len(wave)], wave) for row, wave in enumerate(waves)]
    mel, stft = ((6 * first + 4 * second) / 10 for first, second in zip(*pieces))
    assert float(output.mel_loss) == pytest.approx(mel, rel=1e-4)
    assert float(output.stft_loss) == pytest.approx(stft, rel=1e-4)
    assert float(output.loss) == pytest.approx(3 * mel + 0.5 * stft, rel=1e-4)
    assert output.f0_loss is None and output.to_tuple()[0] is output["loss"]
    assert torch.equal(output.waveform, vocoder(mels, lengths, seed=[1, 2]).waveform)


@torch.no_grad()
def test_f0_loss_by_hand(vocoder):
    vocoder.config.f0_loss_weight = 0.01
    mels, labels, lengths = batch_of(voices(6, 4))
    f0 = torch.full((2, 6), 90.0)
    f0[0, 2] = 0.0
    plain = vocoder(mels, lengths, seed=1, labels=labels)
    output = vocoder(mels, lengths, seed=1, labels=labels, f0_labels=f0)
    distances = [abs(float(output.f0[r, t]) - float(f0[r, t])) for r, n in enumerate((6, 4)) for t in range(n)]
    assert float(output.f0_loss) == pytest.approx(sum(distances) / 10, rel=1e-5)
    assert float(output.loss) == pytest.approx(float(plain.loss) + 0.01 * sum(distances) / 10, rel=1e-5)


def test_clip_alone_equals_clip_in_a_padded_batch(vocoder):
    waves = voices(7, 3, 5, 3)
    mels, labels, lengths = batch_of(waves, mel_padding=9.0, wave_padding=float("nan"))
    f0 = torch.full((4, 7), 100.0)
    together = vocoder(mels, lengths, seed=[1, 2, 3, 4], labels=labels, f0_labels=f0)
    together.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in vocoder.named_parameters()}
    vocoder.zero_grad()
    totals = torch.zeros(3)
    for row, wave in enumerate(waves):
        mel, label, _ = batch_of([wave])
        options = {"seed": row + 1, "labels": label, "f0_labels": f0[row : row + 1, : mel.shape[1]]}
        alone = vocoder(mel, **options)
        share = vocoder(mel, **options, num_items_in_batch=18)
        torch.testing.assert_close(share.loss * 18, alone.loss * mel.shape[1], atol=0, rtol=1e-5)
        share.loss.backward()  # accumulated over four steps: the gradient of the batch
        totals += torch.stack([share.mel_loss, share.stft_loss, share.f0_loss]).detach()
    pieces = torch.stack([together.mel_loss, together.stft_loss, together.f0_loss]).detach()
    torch.testing.assert_close(pieces, totals, atol=1e-5, rtol=1e-5)
    for name, parameter in vocoder.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=5e-3 * scale, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def dead_parameters(vocoder) -> set[str]:
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in vocoder.parameters())
    return {name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.any()}


def test_gradient_reaches_every_parameter(vocoder):
    mels, labels, lengths = batch_of(voices(6, 4))
    for piece in ("loss", "mel_loss", "stft_loss"):
        vocoder.zero_grad()
        vocoder(mels, lengths, seed=1, labels=labels)[piece].backward()
        assert dead_parameters(vocoder) == set(), piece


def test_unvoiced_frames_need_f0_labels(vocoder):
    """Below the voicing threshold no sine depends on F0: then only a pitch target trains the predictor."""
    mels, labels, lengths = batch_of(voices(6, 4))
    with torch.no_grad():
        vocoder.f0_predictor.classifier.weight.mul_(1e-3)
        vocoder.f0_predictor.classifier.bias.fill_(1.0)
    predictor = {name for name, _ in vocoder.named_parameters() if name.startswith("f0_predictor.")}
    vocoder(mels, lengths, seed=1, labels=labels).loss.backward()
    assert dead_parameters(vocoder) == predictor
    vocoder.zero_grad()
    vocoder(mels, lengths, seed=1, labels=labels, f0_labels=torch.full((2, 6), 120.0)).loss.backward()
    assert dead_parameters(vocoder) == set()


def test_saturation_does_not_stop_learning(vocoder):
    """Every bin above the largest magnitude, every sample at the limit: the clipped values still get a gradient."""
    with torch.no_grad():
        vocoder.conv_post.bias[: vocoder.config.istft_n_fft // 2 + 1] = 30.0
    mels, labels, lengths = batch_of(voices(6, 4))
    output = vocoder(mels, lengths, seed=1, labels=labels)
    assert float((output.waveform.abs() > 0.98).float().mean()) > 0.5
    output.loss.backward()
    assert dead_parameters(vocoder) == set()
    magnitude_bias = vocoder.conv_post.bias.grad[: vocoder.config.istft_n_fft // 2 + 1]
    assert bool((magnitude_bias != 0).all()) and float(magnitude_bias.sum()) > 0  # downwards


def test_limits_are_exact():
    values = torch.tensor([-200.0, -1.5, -0.2, 0.0, 0.7, 3.0, 5.0, 120.0])
    tracked = values.clone().requires_grad_()
    assert torch.equal(_exp_limited(tracked, 100.0), values.exp().clamp(max=100.0))
    assert torch.equal(_limited(tracked, 0.99), values.clamp(-0.99, 0.99))
    (gradient,) = torch.autograd.grad(_exp_limited(tracked, 100.0).sum(), tracked)
    torch.testing.assert_close(gradient, values.exp().clamp(max=100.0))
    (gradient,) = torch.autograd.grad(_limited(tracked, 0.99).sum(), tracked)
    assert torch.equal(gradient, torch.ones_like(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.zeros(1, 5 * HOP - 1)}, "`labels` must be waveforms"),
        ({"labels": torch.zeros(2, 5 * HOP)}, "`labels` must be waveforms"),
        ({"labels": torch.zeros(1, 5 * HOP), "lengths": torch.tensor([2])}, "at least 3 mel frames, got one of 2"),
        ({"f0_labels": torch.zeros(1, 5)}, "come with `labels`"),
        ({"labels": torch.zeros(1, 5 * HOP), "f0_labels": torch.zeros(1, 4)}, "`f0_labels` must be"),
    ],
)
def test_bad_labels_are_refused(vocoder, options, message):
    with pytest.raises(ValueError, match=message):
        vocoder(torch.zeros(1, 5, 80), **options)


@pytest.mark.parametrize("name", ["mel", "stft", "f0", "adversarial", "feature_matching"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}_loss_weight` must not be negative"):
        BaichuanAudioVocoderConfig(**{f"{name}_loss_weight": -1.0})


def test_segments():
    wave, other = voices(12)[0], voices(6)[0]
    mel = vocoder_log_mel(wave[None])[0]
    starts = set()
    for seed in range(40):
        pieces, samples, (start, _) = vocoder_segments([wave, other], [9, 9], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(pieces[0], mel[start : start + 9], atol=1e-4, rtol=0)
        assert torch.equal(samples[0], wave[start * HOP : (start + 9) * HOP])
        torch.testing.assert_close(pieces[1, :6], vocoder_log_mel(other[None])[0], atol=1e-4, rtol=0)
        assert torch.equal(samples[1, : 6 * HOP], other) and not pieces[1, 6:].any() and not samples[1, 6 * HOP :].any()
        starts.add(start)
    assert starts == {0, 1, 2, 3}
    piece, samples, starts = vocoder_segments([wave[:-100]], [50])
    assert piece.shape == (1, 11, 80) and samples.shape == (1, 11 * HOP) and starts == [0]
    for bad in [([wave[None]], [5]), ([wave], [0]), ([wave.short()], [5]), ([wave[:500]], [1])]:
        with pytest.raises(ValueError, match="float waveforms"):
            vocoder_segments(*bad)


def test_a_given_mel_stands_for_the_clips_own():
    wave, own = voices(12)[0], torch.randn(10, 80)
    for seed in range(10):
        options = {"mels": [own, None], "generator": torch.Generator().manual_seed(seed)}
        pieces, samples, (start, second) = vocoder_segments([wave, wave], [9, 9], **options)
        assert start < 2 and torch.equal(pieces[0], own[start : start + 9])
        assert torch.equal(samples[0], wave[start * HOP : (start + 9) * HOP])
        torch.testing.assert_close(pieces[1], vocoder_log_mel(wave[None])[0, second : second + 9], atol=1e-4, rtol=0)


# Weight norm


def weight_normed_names(vocoder) -> set[str]:
    suffix = ".parametrizations.weight.original0"
    return {name.removesuffix(suffix) for name, _ in vocoder.named_parameters() if name.endswith(suffix)}


def test_weight_norm_is_exact_both_ways(vocoder):
    mels, labels, lengths = batch_of(voices(6, 4))
    plain = copy.deepcopy(vocoder.state_dict())
    with torch.no_grad():
        before = vocoder(mels, lengths, seed=1).waveform
        vocoder.apply_weight_norm()
        assert torch.equal(vocoder(mels, lengths, seed=1).waveform, before)
    names = weight_normed_names(vocoder)
    convolutions = {
        name.removesuffix(".weight") for name, tensor in plain.items() if name.endswith("weight") and tensor.dim() == 3
    }
    assert names == {name for name in convolutions if "source_down" not in name} and len(convolutions - names) == 3
    vocoder.remove_weight_norm()
    after = vocoder.state_dict()
    assert set(after) == set(plain)
    assert all(torch.equal(after[name], tensor) for name, tensor in plain.items())


def train_a_step(module: nn.Module, rate: float = 1e-2) -> None:
    mels, labels, lengths = batch_of(voices(6, 4))
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    module(mels, lengths=lengths, labels=labels, seed=1).loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    module.zero_grad()


def test_weight_norm_trains_and_folds(vocoder):
    vocoder.apply_weight_norm()
    mels, labels, lengths = batch_of(voices(6, 4))
    vocoder(mels, lengths, seed=1, labels=labels).loss.backward()
    assert dead_parameters(vocoder) == set()
    train_a_step(vocoder)
    pair = vocoder.conv_pre.parametrizations.weight
    gain, direction = pair.original0.detach(), pair.original1.detach()
    expected = gain * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    with torch.no_grad():
        trained = vocoder(mels, lengths, seed=1).waveform
        vocoder.remove_weight_norm()
        assert torch.equal(vocoder(mels, lengths, seed=1).waveform, trained)
    torch.testing.assert_close(vocoder.conv_pre.weight, expected, atol=1e-6, rtol=1e-5)
    assert isinstance(vocoder.conv_pre.weight, nn.Parameter) and vocoder.conv_pre.weight.requires_grad


def test_saving_while_weight_norm_is_applied_writes_plain_weights(tiny, tmp_path):
    """Alone or in the whole model, and loading puts plain weights back behind weight norm."""
    tiny.vocoder.apply_weight_norm()
    train_a_step(tiny.vocoder)
    mels, _, lengths = batch_of(voices(6, 4))
    with torch.no_grad():
        expected = tiny.vocoder(mels, lengths, seed=1).waveform
    tiny.vocoder.save_pretrained(tmp_path / "alone")
    tiny.save_pretrained(tmp_path / "whole")
    alone = BaichuanAudioVocoder.from_pretrained(tmp_path / "alone")
    whole = BaichuanAudioForCausalLM.from_pretrained(tmp_path / "whole").vocoder
    for loaded in (alone, whole):
        assert not loaded.has_weight_norm
        with torch.no_grad():
            torch.testing.assert_close(loaded(mels, lengths, seed=1).waveform, expected, atol=1e-6, rtol=0)
    state = tiny.vocoder.state_dict()
    assert set(state) == set(alone.state_dict())
    alone.apply_weight_norm()
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.add_(0.1)
    alone.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(alone(mels, lengths, seed=1).waveform, expected, atol=1e-6, rtol=0)


def test_weight_norm_twice_or_never_is_refused(vocoder):
    with pytest.raises(ValueError, match="no weight norm to remove"):
        vocoder.remove_weight_norm()
    vocoder.apply_weight_norm()
    with pytest.raises(ValueError, match="already have weight norm"):
        vocoder.apply_weight_norm()


def test_a_row_of_zeros_survives_weight_norm(vocoder):
    with torch.no_grad():
        vocoder.conv_pre.weight[0] = 0.0
    before = vocoder.conv_pre.weight.clone()
    vocoder.apply_weight_norm()
    assert torch.equal(vocoder.conv_pre.weight, before)
    mels, labels, lengths = batch_of(voices(6, 4))
    vocoder(mels, lengths, seed=1, labels=labels).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in vocoder.parameters())


@pytest.mark.slow
def test_overfitting_a_tone():
    torch.manual_seed(0)
    config = tiny_config().vocoder_config
    vocoder = BaichuanAudioVocoder(config)
    with torch.no_grad():
        vocoder.f0_predictor.classifier.bias.fill_(150.0)
    vocoder.apply_weight_norm()
    mel, labels, _ = batch_of(voices(12))
    optimizer = torch.optim.AdamW(vocoder.parameters(), lr=2e-3, betas=(0.8, 0.99))
    losses = []
    for step in range(120):
        loss = vocoder(mel, seed=step, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vocoder.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], (losses[0], losses[-5:])


def test_multi_scale_mel_loss_by_hand():
    first, second = (wave[: 10 * HOP] for wave in voices(10, 11))
    expected = 0.0
    for n_fft, bins in MEL_SCALES:
        filters = slaney_filters(bins, n_fft, 12000)
        mels = [
            numpy_magnitude(w.double().numpy(), n_fft, n_fft // 4, n_fft, 1e-7, n_fft // 2) @ filters.T for w in (first, second)
        ]
        expected += np.mean(np.abs(np.log(np.maximum(mels[0], 1e-5)) - np.log(np.maximum(mels[1], 1e-5))))
    # Clips do not influence one another.
    losses = multi_scale_mel_loss(torch.stack([first, second]), torch.stack([second, second]), 24000)
    assert losses[0].item() == pytest.approx(expected, rel=1e-4) and losses[1].item() == 0.0


def test_losses_without_weight_are_not_computed(vocoder):
    mels, waves, lengths = batch_of(voices(20))
    vocoder.config.mel_loss_weight, vocoder.config.stft_loss_weight, vocoder.config.multi_scale_mel_loss_weight = 0.0, 0.0, 2.0
    output = vocoder(mels, lengths, labels=waves, seed=0)
    assert output.mel_loss is None and output.stft_loss is None
    torch.testing.assert_close(output.loss, 2.0 * multi_scale_mel_loss(output.waveform, waves, 24000)[0])


def test_a_fresh_vocoder_begins_without_a_pattern_in_its_frames(tiny):
    """Up-sampled constants stay constant away from the edges, whatever the rate."""
    for stage in tiny.vocoder.stages:
        with torch.no_grad():
            states = stage.upsample(torch.ones(1, stage.upsample.in_channels, 30))[0, :, 5 * stage.rate : 25 * stage.rate]
        torch.testing.assert_close(states, states[:, :1].expand_as(states), atol=1e-4, rtol=0)


def test_a_part_at_another_speed_has_another_pitch():
    config = BaichuanAudioVocoderConfig()
    wave = 0.3 * torch.sin(2 * math.pi * 200 * torch.arange(100 * HOP) / 24000)
    factors = []
    for seed in range(20):
        part = part_at_another_speed(wave, 40, 1.5, config, torch.Generator().manual_seed(seed))
        assert len(part) >= 40 * HOP
        spectrum = torch.fft.rfft(part[: 40 * HOP] * torch.hann_window(40 * HOP)).abs()
        factors.append(spectrum.argmax().item() * 24000 / (40 * HOP) / 200)
    assert min(factors) > 1 / 1.51 and max(factors) < 1.51
    assert min(factors) < 0.85 and max(factors) > 1.15
    # A clip that is hardly long enough is not made too short.
    assert len(part_at_another_speed(wave[: 40 * HOP], 40, 1.5, config, torch.Generator().manual_seed(1))) >= 40 * HOP
