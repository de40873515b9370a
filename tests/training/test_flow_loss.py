import math

import numpy as np
import pytest
import torch
from torch import nn

from modeling_baichuan_audio import BaichuanAudioFlowMatchingConfig, BaichuanAudioFlowMatchingDecoder
from modeling_baichuan_audio.conversion import tiny_config
from modeling_baichuan_audio.mel_spectrogram import vocoder_log_mel
from modeling_baichuan_audio.training.flow_training import flow_target, flow_targets


@pytest.fixture
def flow(tiny):
    return tiny.flow_matching


def clips(*lengths: int, width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, width, generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], value: float) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value), torch.tensor([len(row) for row in rows])


def watch_estimator(flow, monkeypatch) -> list[dict]:
    """Records what the estimator is given and what it returns."""
    calls, forward = [], flow.estimator.forward

    def recorded(noisy_mel, time, condition, attention_mask=None):
        velocity = forward(noisy_mel, time, condition, attention_mask)
        calls.append({"y": noisy_mel, "t": time, "mu": condition, "v": velocity})
        return velocity

    monkeypatch.setattr(flow.estimator, "forward", recorded)
    return calls


@pytest.mark.parametrize("sigma_min", [1e-6, 0.3])
@torch.no_grad()
def test_losses_by_hand(flow, monkeypatch, sigma_min):
    flow.config.sigma_min, flow.config.prior_loss_weight = sigma_min, 0.25
    states, lengths = padded(clips(7, 4), 2.0)
    mels, _ = padded(clips(7, 4, width=80), 100.0)
    noise, _ = padded(clips(7, 4, width=80), 7.0)
    calls = watch_estimator(flow, monkeypatch)
    output = flow(states, lengths, noise=noise, seed=[1, 2], labels=mels)
    assert len(calls) == 1 and output.mel is None
    call = {name: value.double().numpy() for name, value in calls[0].items()}
    mu = flow.prenet(states).double().numpy()
    squares, differences, values = 0.0, 0.0, 0
    for row, length in enumerate(lengths.tolist()):
        x1, z, t = mels[row, :length].double().numpy(), noise[row, :length].double().numpy(), call["t"][row]
        np.testing.assert_allclose(call["y"][row, :length], (1 - (1 - sigma_min) * t) * z + t * x1, atol=1e-5)
        squares += np.sum((call["v"][row, :length] - (x1 - (1 - sigma_min) * z)) ** 2)
        differences += np.sum(np.abs(mu[row, :length] - x1))
        values += x1.size
    assert values == 11 * 80
    assert float(output.flow_loss) == pytest.approx(squares / values, rel=1e-5)
    assert float(output.prior_loss) == pytest.approx(differences / values, rel=1e-5)
    assert float(output.loss) == pytest.approx((squares + 0.25 * differences) / values, rel=1e-5)
    assert output.to_tuple()[0] is output["loss"]


def test_end_points_of_the_path(flow):
    """At t = 0 the estimator sees the noise, at t = 1 the mel (sigma_min 0), and the velocity leads from one to the other."""
    noise, mel = clips(5, width=80)[0][None], clips(5, 5, width=80)[1][None]
    seen = {}

    def perfect(noisy_mel, time, condition, attention_mask=None):
        seen["y"] = noisy_mel
        return mel - noise

    flow.config.sigma_min = 0.0
    flow.estimator.forward = perfect
    for time, expected in [(0.0, noise), (1.0, mel), (0.25, 0.75 * noise + 0.25 * mel)]:
        flow.training_draws = lambda seeds, time=time: (torch.tensor([time]), torch.tensor([False]))
        loss = flow(clips(5)[0][None], noise=noise, labels=mel, seed=0).flow_loss
        torch.testing.assert_close(seen["y"], expected, atol=1e-6, rtol=0)
        assert float(loss) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_clip_alone_equals_clip_in_a_padded_batch(flow, training):
    flow.train(training)
    rows, targets = clips(130, 40, 75), clips(130, 40, 75, width=80)
    (states, lengths), (mels, _) = padded(rows, 3.0), padded(targets, float("nan"))
    seeds = [11, 12, 13]
    together = flow(states, lengths, seed=seeds, labels=mels)
    together.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in flow.named_parameters()}
    flow.zero_grad()
    pieces, total = torch.zeros(2), 0
    for row, target, seed in zip(rows, targets, seeds):
        alone = flow(row[None], seed=seed, labels=target[None], num_items_in_batch=lengths.sum())
        own = flow(row[None], seed=seed, labels=target[None])
        torch.testing.assert_close(own.loss * len(row), alone.loss * lengths.sum(), atol=0, rtol=1e-5)
        pieces += torch.stack([alone.flow_loss, alone.prior_loss]).detach()
        total += alone.loss.detach()
        alone.loss.backward()  # accumulated over three steps: the gradient of the batch
    torch.testing.assert_close(torch.stack([together.flow_loss, together.prior_loss]), pieces, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.loss, total, atol=1e-5, rtol=0)
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_draws_follow_the_seed_and_not_the_batch(flow):
    states, mels = clips(6, 6), clips(6, 6, width=80)
    batch, labels = torch.stack(states), torch.stack(mels)
    first = flow(batch, labels=labels, generator=torch.Generator().manual_seed(1))
    again = flow(batch, labels=labels, generator=torch.Generator().manual_seed(1))
    other = flow(batch, labels=labels, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.loss, again.loss) and not torch.equal(first.loss, other.loss)
    torch.manual_seed(4)
    from_global = flow(batch, labels=labels).loss
    torch.manual_seed(4)
    assert torch.equal(flow(batch, labels=labels).loss, from_global)
    time, _ = flow.training_draws([7, 8, 9])
    swapped, _ = flow.training_draws([9, 7])
    assert torch.equal(time[[2, 0]], swapped) and len(set(time.tolist())) == 3


def test_flow_times_are_uniform_on_the_schedule(flow):
    time, _ = flow.training_draws(list(range(2000)))
    shares = np.sort(np.arccos(1 - time.double().numpy()) * 2 / math.pi)
    assert np.abs(shares - (np.arange(2000) + 0.5) / 2000).max() < 0.03  # Kolmogorov-Smirnov at about 5%
    flow.config.time_schedule = "linear"
    straight, _ = flow.training_draws(list(range(2000)))
    torch.testing.assert_close(
        straight, torch.from_numpy(np.arccos(1 - time.double().numpy()) * 2 / math.pi).float(), atol=1e-3, rtol=0
    )


def test_condition_dropout(flow, monkeypatch):
    """Whole clips lose their mu, one in five, while training; never in evaluation."""
    calls = watch_estimator(flow, monkeypatch)
    states, mels = torch.stack(clips(*[2] * 1000)), torch.zeros(1000, 2, 80)
    with torch.no_grad():
        flow.train()(states, labels=mels, seed=list(range(1000)))
        kept = calls[0]["mu"].abs().sum(-1) > 0
        assert torch.equal(kept[:, 0], kept[:, 1])
        assert 0.16 < float((~kept[:, 0]).float().mean()) < 0.24
        torch.testing.assert_close(calls[0]["mu"][kept[:, 0]], flow.prenet(states)[kept[:, 0]])
        flow.eval()(states, labels=mels, seed=list(range(1000)))
        assert bool((calls[1]["mu"].abs().sum(-1) > 0).all())
        flow.config.condition_dropout = 0.0
        flow.train()(states, labels=mels, seed=list(range(1000)))
        assert bool((calls[2]["mu"].abs().sum(-1) > 0).all())


def test_gradient_reaches_every_parameter(flow):
    flow.train()
    states, mels = torch.stack(clips(9, 9)), torch.stack(clips(9, 9, width=80))
    flow.config.condition_dropout = 0.0
    flow(states, labels=mels, seed=[1, 2]).loss.backward()
    dead = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not dead
    # The prior loss alone trains the pre-net and leaves the estimator; the flow loss reaches the pre-net through mu.
    for piece, estimator_trains in [("prior_loss", False), ("flow_loss", True)]:
        flow.zero_grad()
        flow(states, labels=mels, seed=[1, 2])[piece].backward()
        assert all(p.grad is not None and p.grad.any() for p in flow.prenet.parameters())
        assert all((p.grad is not None and bool(p.grad.any())) == estimator_trains for p in flow.estimator.parameters())


def test_gradient_checkpointing_changes_nothing(flow):
    states, mels = torch.stack(clips(9, 9)), torch.stack(clips(9, 9, width=80))
    flow.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            flow.gradient_checkpointing_enable()
            assert flow.estimator.mid_stages[0].gradient_checkpointing
        flow.zero_grad()
        flow(states, labels=mels, seed=[1, 2]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in flow.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_solver_runs_only_when_asked(flow):
    states, mels = clips(5)[0][None], clips(5, width=80)[0][None]
    inference = flow(states, seed=3)
    assert inference.loss is None and inference.mel is not None
    both = flow(states, seed=3, labels=mels, return_mel=True)
    assert torch.equal(both.mel, inference.mel) and both.loss is not None
    assert flow(states, seed=3, return_mel=False).mel is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.zeros(1, 4, 80)}, "`labels` must be"),
        ({"labels": torch.zeros(1, 5, 79)}, "`labels` must be"),
        ({"labels": torch.zeros(1, 5, 80), "seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_bad_options_are_refused(flow, options, message):
    with pytest.raises(ValueError, match=message):
        flow(clips(5)[0][None], **options)


@pytest.mark.parametrize(("name", "value"), [("sigma_min", -0.1), ("sigma_min", 1.0), ("prior_loss_weight", -1.0)])
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BaichuanAudioFlowMatchingConfig(**{name: value})


def tone(samples: int, frequency: float = 440.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * frequency * torch.arange(samples) / 24000)


def test_target_is_the_log_mel_cut_to_the_decoders_states():
    waveform = tone(48000) * torch.linspace(0, 1, 48000)
    whole = vocoder_log_mel(waveform[None])[0]
    target = flow_target(waveform, 25)
    assert len(whole) == 100 and target.shape == (99, 80)
    assert torch.equal(target, whole[:99])
    assert torch.equal(flow_target(waveform, 10), whole[:39])


def test_short_waveform_is_padded_with_silence():
    waveform = tone(7200)  # 15 mel frames; 4 code frames ask for 15, 5 for 19
    assert torch.equal(flow_target(waveform, 4), vocoder_log_mel(waveform[None])[0])
    longer = flow_target(waveform, 5)
    assert longer.shape == (19, 80)
    torch.testing.assert_close(longer[:13], flow_target(waveform, 4)[:13])
    assert float(longer[-1].max()) == pytest.approx(math.log(1e-5), abs=1e-4)
    with pytest.raises(ValueError, match="too short for 6 code frames"):
        flow_target(waveform, 6)
    assert flow_target(tone(480), 1).shape == (3, 80)


def test_target_fits_what_the_tokenizer_decodes(tiny, processor):
    """A waveform at both rates: the mel decoder's states and the target have the same length, whatever the clip's."""
    tokenizer = tiny.audio_tokenizer
    for samples in (16000, 17123, 8000, 4800):
        features = processor.feature_extractor(np.zeros(samples, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            codes = tokenizer.encode(features["input_features"], features["input_features_mask"]).audio_codes
            decoded = tokenizer.decode(codes)
        target = flow_target(tone(samples * 3 // 2), codes.shape[-1])
        assert target.shape[0] == decoded.hidden_states.shape[1] == 4 * codes.shape[-1] - 1


def test_batch_of_targets():
    labels, lengths = flow_targets([tone(4800), tone(9600, 300.0)], [2, 5])
    assert labels.shape == (2, 19, 80) and lengths.tolist() == [7, 19]
    assert torch.equal(labels[0, :7], flow_target(tone(4800), 2)) and not labels[0, 7:].any()
    assert torch.equal(labels[1], flow_target(tone(9600, 300.0), 5))


@pytest.mark.parametrize(
    ("waveform", "frames", "message"),
    [
        (torch.zeros(1, 4800), 1, "floats of shape"),
        (torch.zeros(4800, dtype=torch.int16), 1, "floats of shape"),
        (torch.zeros(4800), 0, "at least 1"),
        (tone(16000), 12, "24000 Hz"),  # a second at 16 kHz
    ],
)
def test_bad_waveforms_are_refused(waveform, frames, message):
    with pytest.raises(ValueError, match=message):
        flow_target(waveform, frames)
    with pytest.raises(ValueError, match="One number of code frames"):
        flow_targets([tone(4800)], [])


@pytest.mark.slow
def test_overfitting_beats_the_prenet():
    """
    A held sound (the same state at every frame) whose mel is a rising tone. The causal pre-net has no positions, so its mu is the
    same at every frame; the estimator sees the clip's edge and has to draw the rise.
    """
    torch.manual_seed(0)
    flow = BaichuanAudioFlowMatchingDecoder(tiny_config().flow_matching_config).train()
    seconds = torch.arange(9600) / 24000
    target = flow_target(0.3 * torch.sin(2 * math.pi * (200 + 2000 * seconds) * seconds), 5)[None]
    states = torch.randn(32).expand(1, 19, 32)
    batch = 16
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=400)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        loss = flow(states.expand(batch, -1, -1), labels=target.expand(batch, -1, -1), generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        output = flow.eval()(states.expand(4, -1, -1), seed=[1, 2, 3, 4])
    mu_error, solved_error = (float((mel - target).abs().mean()) for mel in (output.condition, output.mel))
    assert float((output.condition - output.condition[:, :1]).abs().max()) < 1e-4
    assert solved_error < 0.6 * mu_error, (solved_error, mu_error)


def test_a_fresh_estimator_soon_gives_back_the_noise():
    """Where nothing is known of the mel, the velocity is the noise turned round: what training has to learn first."""
    torch.manual_seed(0)
    config = BaichuanAudioFlowMatchingConfig(
        num_mel_bins=20, estimator_channels=48, estimator_blocks=1, estimator_mid_stages=1, estimator_attention_heads=2
    )
    estimator = BaichuanAudioFlowMatchingDecoder(config).estimator
    optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-3)
    for _ in range(150):
        noise = torch.randn(8, 40, 20)
        velocity = estimator(noise, torch.zeros(8), torch.zeros(8, 40, 20))
        loss = (velocity + noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25  # 1 where no noise passes
