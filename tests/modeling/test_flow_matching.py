import math

import pytest
import torch
from helpers.golden import clip_keys, golden
from torch import nn


@pytest.fixture
def flow(original_model):
    return original_model.flow_matching


def hidden(clip: str) -> torch.Tensor:
    return golden()[f"decoder_hidden.{clip}"]


@torch.no_grad()
def test_clip_alone_equals_clip_in_a_batch(flow):
    clips = [hidden(clip) for clip in clip_keys()]
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=3.0)
    seeds = [11, 12, 13, 14]
    together = flow(padded, lengths, seed=seeds)
    for row, clip in enumerate(clips):
        alone = flow(clip[None], seed=seeds[row])
        torch.testing.assert_close(together.mel[row, : len(clip)], alone.mel[0], atol=1e-5, rtol=0)
        assert not together.mel[row, len(clip) :].any()


@torch.no_grad()
def test_noise_depends_on_seed_and_position_alone(flow):
    lengths = torch.tensor([250, 130])
    noise = flow.noise([5, 6], lengths, 250)
    longer = flow.noise([6], torch.tensor([199]), 199)
    assert torch.equal(noise[1, :130], longer[0, :130])
    assert not torch.equal(noise[0, :130], noise[1, :130])
    assert abs(float(noise[0].mean())) < 0.05 and abs(float(noise[0].std()) - 1) < 0.05


@torch.no_grad()
def test_seed_comes_from_the_global_generator_by_default(flow):
    states = hidden("0.0")[None]
    torch.manual_seed(3)
    first = flow(states).mel
    second = flow(states).mel
    torch.manual_seed(3)
    assert torch.equal(flow(states).mel, first)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_chunk_mask_by_brute_force(flow):
    lengths = torch.tensor([230, 120])
    mask = flow.estimator.chunk_mask(lengths, 230, torch.float32)
    for row, query, key in [
        (0, 0, 99),
        (0, 0, 100),
        (0, 100, 0),
        (0, 150, 199),
        (0, 150, 200),
        (0, 229, 229),
        (1, 105, 119),
        (1, 105, 120),
    ]:
        allowed = key < (query // 100 + 1) * 100 and key < int(lengths[row])
        assert bool(mask[row, 0, query, key] == 0) == allowed, (row, query, key)
    assert flow.estimator.chunk_mask(torch.tensor([100]), 100, torch.float32) is None
    assert flow.estimator.chunk_mask(torch.tensor([99]), 100, torch.float32) is not None


@torch.no_grad()
def test_the_past_does_not_change_with_a_later_chunk(flow):
    clip = hidden("2.0")
    longer, shorter = flow(clip[None], seed=1).mel[0], flow(clip[None, :100], seed=1).mel[0]
    torch.testing.assert_close(longer[:100], shorter, atol=1e-5, rtol=0)
    # Inside a chunk attention looks ahead: one frame fewer changes the frames before it.
    assert not torch.allclose(flow(clip[None, :99], seed=1).mel[0], shorter[:99], atol=1e-3)


@torch.no_grad()
def test_guidance_and_steps(flow):
    states = hidden("1.0")[None]
    lengths = torch.tensor([states.shape[1]])
    condition = flow.prenet(states)
    noise = flow.noise([0], lengths, states.shape[1])

    def velocity(x, t, mu):
        return flow.estimator(x, torch.tensor([t]), mu)

    x, n, w = noise, 4, 0.7
    times = [1 - math.cos(i / n * math.pi / 2) for i in range(n + 1)]
    for t, following in zip(times, times[1:]):
        v = (1 + w) * velocity(x, t, condition) - w * velocity(x, t, torch.zeros_like(condition))
        x = x + (following - t) * v
    torch.testing.assert_close(flow(states, noise=noise, num_steps=4).mel, x, atol=1e-4, rtol=0)
    unguided = flow(states, noise=noise, num_steps=1, guidance=0.0).mel
    torch.testing.assert_close(unguided, noise + velocity(noise, 0.0, condition), atol=1e-4, rtol=0)


def test_time_grid(flow):
    grid = flow.time_grid(10)
    assert grid[0] == 0 and grid[-1] == pytest.approx(1) and len(grid) == 11
    assert grid[1] == pytest.approx(1 - math.cos(math.pi / 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"noise": torch.zeros(1, 3, 80)}, "`noise` must be"),
        ({"seed": [1, 2]}, "`seed` must be"),
        ({"seed": "x"}, "`seed` must be"),
    ],
)
def test_bad_options_are_refused(flow, options, message):
    with pytest.raises(ValueError, match=message):
        flow(hidden("0.0")[None], **options)


def test_bad_states_are_refused(flow):
    with pytest.raises(ValueError, match="`hidden_states` must be"):
        flow(torch.zeros(1, 5, 63))
