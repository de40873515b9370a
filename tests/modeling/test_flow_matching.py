import math

import pytest
import torch
from helpers.flow import small_config, small_flow
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
    grid = flow.solver_settings(num_steps=10).time_grid()
    assert grid[0] == 0 and grid[-1] == pytest.approx(1) and len(grid) == 11
    assert grid[1] == pytest.approx(1 - math.cos(math.pi / 20))


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [
        ("cosine", 1 - math.sqrt(0.5)),
        ("linear", 0.5),
        ("sway", 1 - math.sqrt(0.5)),  # a coefficient of -1 is the cosine
        ("sway:0", 0.5),
        ("sway:-0.4", 0.5 - 0.4 * (math.sqrt(0.5) - 0.5)),
        ("sway:1", math.sqrt(0.5)),
    ],
)
@torch.no_grad()
def test_time_schedules(flow, schedule, middle):
    grid = flow.solver_settings(num_steps=2, time_schedule=schedule).time_grid()
    assert grid == pytest.approx([0, middle, 1])
    states, noise = hidden("1.0")[None], flow.noise([0], torch.tensor([len(hidden("1.0"))]), len(hidden("1.0")))
    condition = flow.prenet(states)
    x = noise
    for start, end in zip(grid, grid[1:]):
        x = x + (end - start) * flow.estimator(x, torch.tensor([start]), condition)
    mel = flow(states, noise=noise, num_steps=2, guidance=0.0, time_schedule=schedule).mel
    torch.testing.assert_close(mel, x, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunk_sizes", [None, [25, 50, 100], [7]])
@pytest.mark.parametrize("lengths", [[230, 230], [230, 120], [9, 230]])
def test_attention_by_chunks_equals_dense_attention(flow, lengths, chunk_sizes):
    lengths = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(0)
    condition, noise = torch.randn(2, 2, 230, 80, generator=generator).unbind()
    fast, dense = (
        flow.solve(condition, lengths, noise, num_steps=2, chunk_sizes=chunk_sizes, dense_attention=dense)
        for dense in (False, True)
    )
    torch.testing.assert_close(fast, dense, atol=2e-5, rtol=0)
    assert fast.any(-1).sum() == lengths.sum()


@torch.no_grad()
def test_spans_by_brute_force(flow):
    lengths, sizes = torch.tensor([23, 12]), [4, 6, 5]
    mask = flow.estimator.chunk_mask(lengths, 23, torch.float32, sizes)
    spans = flow.estimator.chunk_spans(lengths, 23, torch.float32, sizes)
    assert [(span.start, span.stop, span.seen) for span in spans] == [
        (0, 4, 4),
        (4, 10, 10),
        (10, 15, 15),
        (15, 20, 20),
        (20, 23, 23),
    ]
    assert [span.mask is None for span in spans] == [True, True, False, False, False]
    for span in spans:
        seen = torch.zeros(2, 23, dtype=torch.bool)
        seen[:, : span.seen] = True if span.mask is None else span.mask[:, 0, 0] == 0
        assert torch.equal(seen[:, None].expand(2, span.stop - span.start, 23), mask[:, 0, span.start : span.stop] == 0)


def test_gradients_of_attention_by_chunks_equal_those_of_dense_attention():
    """Eager attention is the dense one, in training too."""
    gradients = {}
    generator = torch.Generator().manual_seed(0)
    config = small_config()
    states, labels = torch.randn(2, 27, config.input_size, generator=generator), torch.randn(2, 27, 8, generator=generator)
    for implementation in ("eager", "sdpa"):
        model = small_flow(implementation).train()
        model(states, torch.tensor([27, 13]), labels=labels, seed=3).loss.backward()
        gradients[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients["sdpa"], gradients["eager"], atol=1e-5, rtol=1e-4)
    assert all(gradient.any() for gradient in gradients["sdpa"].values())


@pytest.mark.slow
@torch.no_grad()
def test_estimator_compiles_in_one_graph():
    model = small_flow()
    states = torch.randn(2, 27, model.config.input_size, generator=torch.Generator().manual_seed(0))
    expected = model(states, torch.tensor([27, 13]), seed=1).mel
    model.estimator.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(states, torch.tensor([27, 13]), seed=1).mel, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_time_is_embedded_once(flow, monkeypatch):
    calls = []
    embed = flow.estimator.time_mlp.forward
    monkeypatch.setattr(flow.estimator.time_mlp, "forward", lambda time: calls.append(len(time)) or embed(time))
    flow(hidden("0.0")[None], num_steps=4)
    assert calls == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"noise": torch.zeros(1, 3, 80)}, "`noise` must be"),
        ({"seed": [1, 2]}, "`seed` must be"),
        ({"seed": "x"}, "`seed` must be"),
        ({"time_schedule": "sine"}, "`time_schedule` must be .* got 'sine'"),
        ({"time_schedule": "sway:-2"}, "`time_schedule` must be .* got 'sway:-2'"),
        ({"time_schedule": "sway:x"}, "`time_schedule` must be .* got 'sway:x'"),
        ({"chunk_sizes": []}, "`chunk_sizes` must be"),
        ({"chunk_sizes": [25, 0]}, "`chunk_sizes` must be"),
    ],
)
def test_bad_options_are_refused(flow, options, message):
    with pytest.raises(ValueError, match=message):
        flow(hidden("0.0")[None], **options)


def test_bad_states_are_refused(flow):
    with pytest.raises(ValueError, match="`hidden_states` must be"):
        flow(torch.zeros(1, 5, 63))
