"""The mel decoder as a stream: "exact" gives what `decode` gives, "low_latency" does where a piece is the whole clip."""

import copy

import pytest
import torch
from helpers.golden import clip_keys, golden
from helpers.processes import load_benchmark
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_baichuan_audio import BaichuanAudioTokenizerModel
from modeling_baichuan_audio.streaming_mel_decoder import NormStatistics, typical_statistics


POLICIES = ["exact", "low_latency"]
SIZES = [1, 3, 12, 100]


@pytest.fixture
def tokenizer(original_model):
    return original_model.audio_tokenizer


def codes(tokenizer, frames: int, seed: int = 0) -> torch.Tensor:
    """(1, num_codebooks, frames)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = tokenizer.config.codebook_sizes
    return torch.stack([torch.randint(size, (1, frames), generator=generator) for size in sizes], dim=1)


def run(tokenizer, clip, size, state=None, **kwargs) -> list[torch.Tensor]:
    """Pieces (1, ready, hidden_size) of the states of a clip that is pushed `size` frames at a time."""
    state, pieces = state or tokenizer.start_stream(), []
    for start in range(0, clip.shape[2], size):
        final = start + size >= clip.shape[2]
        states, ready, state = tokenizer.stream_decode(clip[..., start : start + size], state, final=final, **kwargs)
        assert ready.tolist() == [states.shape[1]]
        pieces.append(states)
    return pieces


def batch_of(clips: list[torch.Tensor]) -> torch.Tensor:
    """Clips (1, num_codebooks, frames) -> one batch, padded with -1."""
    return nn.utils.rnn.pad_sequence([clip[0].T for clip in clips], batch_first=True, padding_value=-1).transpose(1, 2)


@pytest.mark.parametrize("clip", clip_keys())
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_whole_clip_at_once_equals_decode(tokenizer, policy, clip):
    whole = golden()[f"codes.{clip}"].T[None]
    states, ready, _ = tokenizer.stream_decode(whole, tokenizer.start_stream(1, policy), final=True)
    expected = tokenizer.decode(whole)
    assert ready.tolist() == expected.hidden_lengths.tolist()
    torch.testing.assert_close(states, expected.hidden_states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_whole_clips_side_by_side_equal_decode(tokenizer, policy):
    clips = [codes(tokenizer, frames, seed) for seed, frames in enumerate([9, 20, 1])]
    states, ready, _ = tokenizer.stream_decode(batch_of(clips), tokenizer.start_stream(3, policy), final=True)
    expected = tokenizer.decode(batch_of(clips))
    assert torch.equal(ready, expected.hidden_lengths)
    torch.testing.assert_close(states, expected.hidden_states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_codebooks", [None, 2])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_exact_waits_and_equals_decode(tokenizer, size, num_codebooks):
    clip = codes(tokenizer, 30)
    *before, last = run(tokenizer, clip, size, tokenizer.start_stream(1, "exact"), num_codebooks=num_codebooks)
    assert not any(piece.shape[1] for piece in before)
    torch.testing.assert_close(last, tokenizer.decode(clip, num_codebooks).hidden_states, atol=1e-5, rtol=0)


def exact_statistics(tokenizer, clip, monkeypatch) -> NormStatistics:
    """Of the whole clip; from now on streams norm by them, too."""
    decoder = tokenizer.mel_decoder
    states = decoder.dconv1.conv(decoder.in_proj(tokenizer.quantizer.decode(clip)).transpose(1, 2))
    exact = NormStatistics.of(states, torch.tensor([states.shape[2]]))
    monkeypatch.setattr(NormStatistics, "merged", lambda self, other: exact)
    return exact


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_low_latency_has_no_delay_and_is_decode_but_for_the_norm(tokenizer, size, monkeypatch):
    clip = codes(tokenizer, 30)
    expected = tokenizer.decode(clip).hidden_states
    pieces = run(tokenizer, clip, size, tokenizer.start_stream(prior=exact_statistics(tokenizer, clip, monkeypatch)))
    assert pieces[0].shape[1] == 4 * min(size, 30) - 1
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [2, 4, 6])
@torch.no_grad()
def test_kernels_of_every_kind(tokenizer, kernel, monkeypatch):
    """The transposed convolution with a kernel below, at and above its stride: pieces carry over what lies between them."""
    config = copy.deepcopy(tokenizer.config)
    config.decoder_kernel_size = kernel
    torch.manual_seed(0)
    model = BaichuanAudioTokenizerModel(config).eval()
    clip = codes(model, 11)
    expected = model.decode(clip)
    whole, ready, _ = model.stream_decode(clip, model.start_stream(), final=True)
    assert ready.tolist() == expected.hidden_lengths.tolist() == [44 + kernel - 4]
    torch.testing.assert_close(whole, expected.hidden_states, atol=1e-5, rtol=0)
    pieces = run(model, clip, 3, model.start_stream(prior=exact_statistics(model, clip, monkeypatch)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected.hidden_states, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 4, 30])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_clips_side_by_side_equal_clips_alone(tokenizer, policy, size):
    lengths = [30, 17, 21, 0]
    clips = [codes(tokenizer, length, seed) for seed, length in enumerate(lengths)]
    padded = batch_of(clips)
    prior = typical_statistics(tokenizer, 8)
    state, together = tokenizer.start_stream(4, policy, prior), [[] for _ in clips]
    for start in range(0, 30, size):
        states, ready, state = tokenizer.stream_decode(padded[..., start : start + size], state)
        for row, count in enumerate(ready.tolist()):
            together[row].append(states[row, :count])
            assert not states[row, count:].any()
    states, ready, state = tokenizer.stream_decode(padded[..., :0], state, final=True)
    for row, (clip, length) in enumerate(zip(clips, lengths)):
        ours = torch.cat([*together[row], states[row, : int(ready[row])]])
        assert len(ours) == max(0, 4 * length - 1)
        if not length:
            continue
        state_alone, alone = tokenizer.start_stream(1, policy, prior), []
        for start in range(0, 30, size):  # ends are told in the same way
            piece = nn.functional.pad(clip, (0, 30 - length), value=-1)[..., start : start + size]
            alone.append(tokenizer.stream_decode(piece, state_alone))
        alone.append(tokenizer.stream_decode(clip[..., :0], state_alone, final=True))
        alone = torch.cat([states[0, : int(ready[0])] for states, ready, _ in alone])
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_future_does_not_change_the_past(tokenizer):
    clip, other = codes(tokenizer, 30), codes(tokenizer, 40, seed=9)
    other[..., :20] = clip[..., :20]
    ours, theirs = (torch.cat(run(tokenizer, c, 5)[:4], dim=1) for c in (clip, other))
    assert ours.shape[1] == 79 and torch.equal(ours, theirs)


@torch.no_grad()
def test_low_latency_comes_near(tokenizer):
    clip = golden()["codes.0.0"].T[None]
    expected = tokenizer.decode(clip).hidden_states
    for size in (1, 6, 12):
        states = torch.cat(run(tokenizer, clip, size), dim=1)
        assert states.shape == expected.shape
        assert float((states - expected).norm() / expected.norm()) < 0.15


@torch.no_grad()
def test_no_work_is_done_twice(tokenizer):
    """Attention apart, which a cache makes causal instead of square, a stream does what `decode` does up to its hidden states."""
    clip, prior = codes(tokenizer, 40), typical_statistics(tokenizer, 8)
    counts = []
    for size in (40, 5, 1):
        with FlopCounterMode(display=False) as counter:
            run(tokenizer, clip, size, tokenizer.start_stream(prior=prior))
        flops = counter.get_flop_counts()["Global"]
        counts.append(sum(count for operator, count in flops.items() if "attention" not in str(operator)))
    assert counts[0] == counts[1] == counts[2]


def test_statistics_merge_exactly():
    torch.manual_seed(0)
    states, lengths = 5 + torch.randn(2, 7, 40), torch.tensor([40, 23])
    pieces = [NormStatistics.of(states[..., start : start + 8], (lengths - start).clamp(0, 8)) for start in range(0, 40, 8)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merged(piece)
    for row, length in enumerate(lengths.tolist()):
        valid = states[row, :, :length]
        assert int(merged.count[row]) == length
        torch.testing.assert_close(merged.mean[row], valid.mean())
        torch.testing.assert_close(merged.variance[row], valid.var(unbiased=False))


@torch.no_grad()
def test_typical_statistics_follow_usage(tokenizer):
    """Entries that training never used do not count; where it used none, all do."""
    model = copy.deepcopy(tokenizer)
    for codebook in model.quantizer.codebooks:
        codebook.cluster_size.zero_()
    everything = typical_statistics(model, 8)
    for codebook in model.quantizer.codebooks:
        codebook.cluster_size[3] = 1.0
    one = typical_statistics(model, 8)
    states = model.mel_decoder.dconv1.conv(
        model.mel_decoder.in_proj(model.quantizer.decode(torch.full((1, 8, 1024), 3))).transpose(1, 2)
    )
    torch.testing.assert_close(one.variance[0], states.var(unbiased=False))
    assert not torch.allclose(one.variance, everything.variance, rtol=1e-3)


@torch.no_grad()
def test_a_clip_starts_from_the_statistics_given(tokenizer):
    clip = codes(tokenizer, 20)
    first = tokenizer.start_stream()
    run(tokenizer, clip, 5, first)
    assert float(first.statistics.count) == 79
    plain = torch.cat(run(tokenizer, clip, 5), dim=1)
    warm = torch.cat(run(tokenizer, clip, 5, tokenizer.start_stream(prior=first.statistics)), dim=1)
    expected = tokenizer.decode(clip).hidden_states
    assert (warm - expected).norm() < (plain - expected).norm()


@pytest.mark.parametrize(
    ("change", "lengths", "message"),
    [
        (lambda clip: clip[:1], None, r"of the stream's 2 clips, got shape \(1, 8, 5\)"),
        (lambda clip: clip[:, :7], None, r"integers of shape \(batch, 8, frames\)"),
        (lambda clip: clip.float(), None, "integers of shape"),
        (lambda clip: clip + 10000, None, "but the codebooks have"),
        (lambda clip: clip, [5], r"2 numbers from 0 to 5.*got \[5\]"),
        (lambda clip: clip, [6, 5], r"got \[6, 5\]"),
        (lambda clip: nn.functional.pad(clip[..., :3], (0, 2), value=-1), [4, 3], r"padding \(-1\) within `lengths` \[4, 3\]"),
        (lambda clip: nn.functional.pad(clip[..., :3], (2, 0), value=-1), None, "only at the end of a clip"),
        (lambda clip: clip.repeat(1, 1, 100), None, r"a clip of 500 frames, the mel decoder takes 100 at most"),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_bad_pieces_are_refused(tokenizer, policy, change, lengths, message):
    state = tokenizer.start_stream(2, policy)
    with pytest.raises(ValueError, match=message):
        tokenizer.stream_decode(change(codes(tokenizer, 5).repeat(2, 1, 1)), state, lengths)
    assert state.rows.received == [0, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_follows_an_end(tokenizer, policy):
    state, piece = tokenizer.start_stream(2, policy), codes(tokenizer, 5).repeat(2, 1, 1)
    tokenizer.stream_decode(piece, state, [3, 5])
    with pytest.raises(ValueError, match="`lengths` must be 0 for clips that have ended, got 5 frames for clip 0"):
        tokenizer.stream_decode(piece, state, [5, 5])
    tokenizer.stream_decode(piece, state, [0, 2])
    states, ready, _ = tokenizer.stream_decode(piece[..., :0], state, final=True)
    assert states.shape[1] == 0 and ready.tolist() == [0, 0]
    with pytest.raises(ValueError, match="brings 5 frames after the piece with `final=True`"):
        tokenizer.stream_decode(piece, state)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_stream_has_no_states(tokenizer, policy):
    states, ready, _ = tokenizer.stream_decode(codes(tokenizer, 0), tokenizer.start_stream(1, policy), final=True)
    assert states.shape == (1, 0, tokenizer.config.hidden_size) and ready.tolist() == [0]


def test_bad_settings_are_refused(tokenizer):
    with pytest.raises(ValueError, match='must be "low_latency" or "exact", got \'fast\''):
        tokenizer.start_stream(1, "fast")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tokenizer.start_stream(0)
    with pytest.raises(ValueError, match="must be 1 to 8, got 9"):
        tokenizer.stream_decode(codes(tokenizer, 5), tokenizer.start_stream(), num_codebooks=9)


def test_benchmark(shared_tiny_model):
    benchmark = load_benchmark("mel_decoder_latency")
    tokenizer = shared_tiny_model.audio_tokenizer
    clips = [codes(tokenizer, 20, seed) for seed in range(2)]
    result = benchmark.measure(tokenizer, shared_tiny_model.flow_matching, clips, pieces=(5, 20), steps=1)
    rows = {(row["prior"], row["piece"]): row for row in result["rows"]}
    assert len(rows) == 6 and rows["typical", 5]["states"] > 1e-3
    for prior in benchmark.PRIORS:  # one piece is exact
        assert rows[prior, 20]["states"] < 1e-5 and rows[prior, 20]["mel"] < 1e-5
    assert set(result["references"]) == {"other noise", "7 codebooks"}
