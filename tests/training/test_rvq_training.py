"""Training of the quantiser against numpy, and against itself in two processes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modeling_baichuan_audio.modeling_rvq import EuclideanCodebook, ResidualVectorQuantizer


WIDTH = 6
PLAIN = {"restart_threshold": 0.0, "gumbel_temperature": 0.0, "dropout": 0.0}


def quantizer_of(sizes=(11, 7, 5), seed=0, **settings) -> ResidualVectorQuantizer:
    """Random entries, and running sums that agree with them."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = ResidualVectorQuantizer(list(sizes), WIDTH, **(PLAIN | settings))
    for codebook in quantizer.codebooks:
        codebook.embed.normal_(generator=generator)
        codebook.cluster_size.uniform_(0.5, 2.0, generator=generator)
        codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    return quantizer.train()


def batch_of(lengths=(9, 4, 1), seed=1, padding=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = torch.randn(len(lengths), max(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        vectors[row, length:] = padding
    return vectors, torch.tensor(lengths)


def buffers(quantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_three_steps_against_running_sums_in_numpy():
    """The textbook quotient of the running sums, with the L2 constraint on the sum that is kept."""
    decay, shrinkage = 0.8, 0.05
    quantizer = quantizer_of(decay=decay, shrinkage=shrinkage)
    size = [book.cluster_size.numpy().astype(np.float64) for book in quantizer.codebooks]
    total = [book.embed_avg.numpy().astype(np.float64) for book in quantizer.codebooks]
    for step in range(3):
        vectors, frames = batch_of(seed=step)
        output = quantizer(vectors, frames)
        residual = np.concatenate([clip[:length] for clip, length in zip(vectors.double().numpy(), frames.tolist())])
        for level, book in enumerate(quantizer.codebooks):
            entries = total[level] / size[level][:, None]
            distances = ((residual[:, None] - entries) ** 2).sum(-1)
            codes = distances.argmin(-1)
            assert output.codes[:, level][output.codes[:, level] >= 0].tolist() == codes.tolist()
            one_hot = np.eye(len(entries))[codes]
            counts = one_hot.sum(0)
            size[level] = decay * size[level] + (1 - decay) * counts
            total[level] = (1 - shrinkage) * (decay * total[level] + (1 - decay) * one_hot.T @ residual)
            share = counts / counts.sum()
            entropy = -sum(p * np.log(p) for p in share if p > 0)
            assert output.perplexity[level].item() == pytest.approx(np.exp(entropy), rel=1e-5)
            assert output.usage[level].item() == pytest.approx((counts > 0).mean())
            np.testing.assert_allclose(book.cluster_size, size[level], rtol=1e-5)
            np.testing.assert_allclose(book.embed_avg, total[level], atol=1e-5)
            np.testing.assert_allclose(book.embed, total[level] / size[level][:, None], atol=1e-5)
            residual = residual - entries[codes]


def test_a_steady_entry_settles_and_an_unused_one_fades():
    decay, shrinkage = 0.9, 0.01
    codebook = EuclideanCodebook(2, WIDTH)
    codebook.embed.fill_(3.0)
    codebook.cluster_size.fill_(1.0)
    mean = torch.full((WIDTH,), 2.0)
    for _ in range(400):
        codebook.update(torch.tensor([5.0, 0.0]), torch.stack([5 * mean, 0 * mean]), decay, shrinkage)
    factor = (1 - shrinkage) * (1 - decay) / (1 - decay * (1 - shrinkage))
    torch.testing.assert_close(codebook.embed[0], factor * mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(codebook.embed[1], torch.full((WIDTH,), 3.0 * (1 - shrinkage) ** 400), rtol=1e-4, atol=0)


def test_sums_of_another_convention_do_not_move_the_entries():
    quantizer = quantizer_of(decay=0.99, shrinkage=0.0)
    before = [book.embed.clone() for book in quantizer.codebooks]
    for book in quantizer.codebooks:
        book.embed_avg.mul_(100.0)
    output = quantizer(*batch_of())
    for level, book in enumerate(quantizer.codebooks):
        unused = torch.ones(book.size, dtype=torch.bool)
        unused[output.codes[:, level][output.codes[:, level] >= 0]] = False
        assert unused.any()
        torch.testing.assert_close(book.embed[unused], before[level][unused])
        assert not torch.equal(book.embed[~unused], before[level][~unused])


def test_gradient_is_the_identity_and_the_value_is_the_entries_sum():
    quantizer = quantizer_of()
    vectors, frames = batch_of()
    vectors.requires_grad_()
    before = quantizer_of()
    output = quantizer(vectors, frames)
    expected = before.decode(output.codes.clamp(min=0))
    upstream = torch.randn(vectors.shape, generator=seeded(2))
    inside = torch.arange(vectors.shape[1]) < frames[:, None]
    assert torch.equal(output.vectors[inside], expected[inside])  # of the entries before this call's update
    output.vectors.backward(upstream)
    assert torch.equal(vectors.grad, upstream)


def test_commitment_and_its_gradient_against_numpy():
    quantizer = quantizer_of()
    entries = [book.embed.double().numpy().copy() for book in quantizer.codebooks]
    vectors, frames = batch_of()
    vectors.requires_grad_()
    output = quantizer(vectors, frames)
    output.commitment.sum().backward()
    for row, length in enumerate(frames.tolist()):
        residual = vectors[row, :length].detach().double().numpy()
        gradient = np.zeros_like(residual)
        for level, table in enumerate(entries):
            residual = residual - table[output.codes[row, level, :length].numpy()]
            assert output.commitment[row, level].item() == pytest.approx((residual**2).mean(), rel=1e-5)
            gradient += 2 * residual / residual.size
        np.testing.assert_allclose(vectors.grad[row, :length], gradient, atol=1e-6)
        assert not vectors.grad[row, length:].any()


def test_padding_touches_nothing():
    settings = {"restart_threshold": 1.0, "gumbel_temperature": 0.3, "dropout": 0.5, "decay": 0.5}
    results = []
    for padding in (0.0, 1e4):
        quantizer = quantizer_of(**settings)
        output = quantizer(*batch_of(padding=padding), 0.5, seeded(3))
        results.append((output, buffers(quantizer)))
    (clean, clean_buffers), (dirty, dirty_buffers) = results
    for name in ("codes", "commitment", "replaced", "perplexity", "usage"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)), name
    assert all(torch.equal(clean_buffers[name], dirty_buffers[name]) for name in clean_buffers)
    assert (clean.codes[1, :, 4:] == -1).all()
    assert (clean.codes[1, 0, :4] >= 0).all()


def test_gumbel_sampling_frequencies():
    temperature, draws = 0.4, 40000
    codebook = quantizer_of().codebooks[0]
    vector = torch.randn(WIDTH, generator=seeded(4))
    distances = ((vector.double() - codebook.embed.double()) ** 2).sum(-1)
    expected = torch.softmax(-(distances / distances.min()) / temperature, 0)
    assert 0.2 < expected.max() < 0.95
    sampled = codebook.sample(vector.expand(draws, -1), temperature, seeded(5))
    frequency = torch.bincount(sampled, minlength=codebook.size) / draws
    deviation = (frequency - expected).abs()
    assert (deviation <= 4.5 * (expected * (1 - expected) / draws).sqrt() + 1 / draws).all()


def test_sampling_does_not_depend_on_the_scale_of_the_vectors():
    codebook = quantizer_of().codebooks[0]
    vectors = torch.randn(200, WIDTH, generator=seeded(4))
    drawn = codebook.sample(vectors, 0.4, seeded(5))
    codebook.embed.mul_(0.125)
    assert torch.equal(codebook.sample(vectors * 0.125, 0.4, seeded(5)), drawn)


def test_an_entry_hit_exactly_is_always_chosen():
    codebook = quantizer_of().codebooks[0]
    codebook.embed.copy_(codebook.embed.round())
    codebook.embed[:, 0] = torch.arange(codebook.size)  # distinct
    assert codebook.sample(codebook.embed, 1.0, seeded(0)).tolist() == list(range(codebook.size))


def test_temperature_decides_between_sampling_and_the_nearest():
    vectors, frames = batch_of((60, 60))
    assert torch.equal(quantizer_of()(vectors, frames).codes, quantizer_of().encode(vectors))
    warm = quantizer_of(gumbel_temperature=0.5)(vectors, frames, generator=seeded(0)).codes
    again = quantizer_of(gumbel_temperature=0.5)(vectors, frames, generator=seeded(0)).codes
    other = quantizer_of(gumbel_temperature=0.5)(vectors, frames, generator=seeded(1)).codes
    assert torch.equal(warm, again)
    assert not torch.equal(warm, other)
    differing = (warm[:, 0] != quantizer_of().encode(vectors)[:, 0]).float().mean()
    assert 0.1 < differing < 0.9


def test_global_generator_serves_where_none_is_given():
    vectors, frames = batch_of((40,))

    def codes(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return quantizer_of(gumbel_temperature=0.5)(vectors, frames).codes

    assert torch.equal(codes(0), codes(0))
    assert not torch.equal(codes(0), codes(1))


def test_dropout_draws_every_number_of_codebooks_alike():
    clips = 3000
    quantizer = quantizer_of(dropout=1.0)
    output = quantizer(*batch_of((2,) * clips), generator=seeded(0))
    used = (output.codes >= 0)[:, :, 0].sum(1)
    assert torch.equal((output.codes >= 0)[:, :, 1].sum(1), used)
    for number in (1, 2, 3):
        assert (used == number).float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    levels = torch.arange(3)
    assert torch.equal(output.codes[:, :, 0] >= 0, levels < used[:, None])  # always the first ones
    assert torch.equal(output.commitment > 0, levels < used[:, None])

    half = quantizer_of(dropout=0.5)(*batch_of((2,) * clips), generator=seeded(0)).codes[:, :, 0]
    assert ((half >= 0).sum(1) < 3).float().mean().item() == pytest.approx(1 / 3, abs=0.04)
    assert (quantizer_of(dropout=0.0)(*batch_of((2,) * clips)).codes >= 0).all()


def test_replacement_is_independent_of_dropout():
    output = quantizer_of(dropout=0.5)(*batch_of((1,) * 3000), 0.5, seeded(0))
    fewer = (output.codes[:, :, 0] < 0).any(1)
    assert output.replaced[fewer].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert output.replaced[~fewer].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_dropped_codebooks_neither_decode_nor_learn():
    quantizer, before = quantizer_of(dropout=1.0), quantizer_of()
    vectors, frames = batch_of((3,) * 40)
    output = quantizer(vectors, frames, generator=seeded(0))
    taking_part = output.codes >= 0
    expected = torch.zeros_like(vectors)
    for level, book in enumerate(before.codebooks):
        expected += book.lookup(output.codes[:, level].clamp(min=0)) * taking_part[:, level, :, None]
    torch.testing.assert_close(output.vectors, expected)
    for level, book in enumerate(quantizer.codebooks):
        counts = torch.bincount(output.codes[:, level][taking_part[:, level]], minlength=book.size)
        torch.testing.assert_close(book.cluster_size, 0.99 * before.codebooks[level].cluster_size + 0.01 * counts)


def test_dead_entries_restart_from_frames_of_the_batch():
    threshold = 0.2
    quantizer = quantizer_of(sizes=(11,), decay=0.5, restart_threshold=threshold)
    codebook = quantizer.codebooks[0]
    codebook.cluster_size[[2, 5, 6]] = 0.01
    codebook.embed[[2, 5, 6]] = 50.0  # far from everything: never chosen
    vectors, frames = batch_of((9, 4, 1), padding=60.0)
    expected = quantizer_of(sizes=(11,), decay=0.5)
    expected.codebooks[0].load_state_dict(codebook.state_dict())
    output = quantizer(vectors, frames, generator=seeded(0))
    expected(vectors, frames)
    plain = expected.codebooks[0]
    dead = plain.cluster_size < threshold
    assert dead[[2, 5, 6]].all()
    assert not dead.all()
    candidates = torch.cat([clip[:length] for clip, length in zip(vectors, frames.tolist())])
    restarted = codebook.embed[dead]
    matches = (restarted[:, None] == candidates).all(-1)
    assert (matches.sum(1) == 1).all()
    assert (matches.sum(0) <= 1).all(), "one vector served two entries"
    assert (codebook.cluster_size[dead] == 1.0).all()
    assert torch.equal(codebook.embed_avg[dead], restarted)
    for name in ("embed", "embed_avg", "cluster_size"):
        assert torch.equal(getattr(codebook, name)[~dead], getattr(plain, name)[~dead])
    assert not torch.isin(output.codes, dead.nonzero()[:, 0]).any()


def test_restart_waits_where_vectors_run_out_and_follows_the_generator():
    def run(seed):
        quantizer = quantizer_of(sizes=(11,), restart_threshold=3.0)
        quantizer(*batch_of((4,)), generator=seeded(seed))
        return quantizer.codebooks[0]

    first = run(0)
    assert (first.cluster_size == 3.0).sum() == 4  # max(1, threshold): not dead again at once
    assert (first.cluster_size < 3.0).sum() == 7
    taken = (first.embed[first.cluster_size == 3.0][:, None] == batch_of((4,))[0][0]).all(-1)
    assert (taken.sum(0) == 1).all()
    assert (taken.sum(1) == 1).all()
    assert torch.equal(first.embed, run(0).embed)
    assert not torch.equal(first.embed, run(1).embed)


def test_later_codebooks_restart_from_residuals_of_other_frames():
    quantizer = quantizer_of(sizes=(5, 5), restart_threshold=100.0)
    before = quantizer_of(sizes=(5, 5))
    vectors, frames = batch_of((40,))
    output = quantizer(vectors, frames, generator=seeded(0))
    residual = vectors[0] - before.codebooks[0].lookup(output.codes[0, 0])
    first, second = ((book.embed[:, None] == inputs).all(-1) for book, inputs in zip(quantizer.codebooks, (vectors[0], residual)))
    assert (first.sum(1) == 1).all()
    assert (second.sum(1) == 1).all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_replacement_takes_whole_clips(share):
    quantizer, before = quantizer_of(), quantizer_of()
    vectors, frames = batch_of((5,) * 2000)
    output = quantizer(vectors, frames, share, seeded(0))
    quantised = before.decode(output.codes)
    expected = torch.where(output.replaced[:, None, None], quantised, vectors)
    assert torch.equal(output.vectors, expected)
    assert output.replaced.float().mean().item() == pytest.approx(share, abs=0.0 if share in (0.0, 1.0) else 0.04)


def test_evaluation_mode_draws_and_updates_nothing():
    quantizer = quantizer_of(restart_threshold=100.0, gumbel_temperature=5.0, dropout=1.0).eval()
    before, generator = buffers(quantizer), seeded(0)
    state = generator.get_state()
    vectors, frames = batch_of((9, 9))
    output = quantizer(vectors, frames, 0.0, generator)
    assert torch.equal(generator.get_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(output.codes, quantizer.encode(vectors))
    assert torch.equal(output.vectors, quantizer.decode(output.codes))
    assert output.replaced.all()


def test_encode_and_decode_leave_a_training_quantiser_alone():
    quantizer = quantizer_of(restart_threshold=100.0, gumbel_temperature=5.0)
    before, vectors = buffers(quantizer), batch_of((9,))[0]
    codes = quantizer.encode(vectors)
    quantizer.decode(codes)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal(codes, quantizer.eval().encode(vectors))


def test_autocast_does_not_change_the_codes():
    vectors, frames = batch_of((200,))
    plain = quantizer_of(sizes=(400, 300))(vectors, frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer_of(sizes=(400, 300))(vectors, frames)
    assert torch.equal(plain.codes, cast.codes)
    assert torch.equal(plain.vectors, cast.vectors)


@pytest.mark.parametrize(
    ("frames", "share", "message"),
    [((3, 0), 1.0, "frames"), ((3, 9), 1.0, "frames"), ((3, 2), 1.5, "replacement_share")],
)
def test_bad_arguments_are_refused(frames, share, message):
    with pytest.raises(ValueError, match=message):
        quantizer_of()(torch.zeros(2, 4, WIDTH), torch.tensor(frames), share)


# Two processes on two and two clips against one on all four: sampling, dropout, replacement, sums and restarts included.

PARALLEL = {"restart_threshold": 0.4, "gumbel_temperature": 0.2, "dropout": 0.6, "decay": 0.7, "shrinkage": 0.01}
PARALLEL_LENGTHS = (9, 4, 7, 2)
PARALLEL_STEPS = 4


def run_steps(rows: slice, draw_seed: int, **changes) -> dict[str, torch.Tensor]:
    """Losses are sums over clips, weighted by frames as the model weights them."""
    quantizer, generator = quantizer_of(**(PARALLEL | changes)), seeded(draw_seed)
    results: dict[str, list[torch.Tensor]] = {name: [] for name in ("loss", "perplexity", "usage", "replaced", "used")}
    for step in range(PARALLEL_STEPS):
        vectors, frames = batch_of(PARALLEL_LENGTHS, seed=step)
        output = quantizer(vectors[rows], frames[rows], 0.5, generator)
        results["loss"].append((output.commitment * frames[rows, None]).sum(0) / frames.sum())
        results["perplexity"].append(output.perplexity)
        results["usage"].append(output.usage)
        results["replaced"].append(output.replaced)
        results["used"].append((output.codes[:, :, 0] >= 0).sum(1))
    return {name: torch.stack(values) for name, values in results.items()} | buffers(quantizer)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        # The second process's generator is in another state: the first one's counts.
        torch.save(run_steps(slice(2 * rank, 2 * rank + 2), draw_seed=7 + rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_on_half_batches_equal_one_on_the_whole(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = run_steps(slice(0, 4), draw_seed=7)
    torch.testing.assert_close(first["loss"] + second["loss"], whole["loss"], atol=1e-5, rtol=0)
    for name in ("replaced", "used"):
        assert torch.equal(torch.cat([first[name], second[name]], dim=1), whole[name]), name
    assert len(whole["used"].unique()) > 1
    assert len(whole["replaced"].unique()) > 1
    untouched = run_steps(slice(0, 4), draw_seed=7, restart_threshold=0.0)
    for name in (key for key in whole if key not in ("loss", "replaced", "used")):
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], whole[name], atol=1e-5, rtol=0)
    assert not torch.allclose(untouched["codebooks.0.embed"], whole["codebooks.0.embed"], atol=1e-2), "no entry restarted"
