"""The vocoder as a stream: equal to the whole clip however it is cut, and no work done twice."""

import math

import pytest
import torch
from helpers.golden import golden
from helpers.processes import load_benchmark
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling_baichuan_audio import BaichuanAudioVocoder, BaichuanAudioVocoderConfig, streaming_vocoder
from modeling_baichuan_audio.streaming_vocoder import vocoder_delay


# The source integrates F0: what rounding leaves between two ways of cutting a convolution grows with the clip.
TOLERANCE = 5e-5
PATTERNS = [[1], [7], [100], [3, 0, 60, 1, 1, 20], [1000]]
# Other strides and kernels than the released ones: two stages, an up-sampler wider than three strides, hop half the window.
OTHER = {
    "upsample_rates": [6, 2],
    "upsample_kernel_sizes": [22, 2],
    "resblock_kernel_sizes": [3],
    "resblock_dilations": [1, 4],
    "source_resblock_kernel_sizes": [5, 3],
    "istft_n_fft": 16,
    "istft_hop_length": 8,
    "f0_layers": 2,
}


@pytest.fixture
def vocoder(converted_model):
    return converted_model.vocoder


@pytest.fixture
def other_vocoder():
    torch.manual_seed(0)
    return BaichuanAudioVocoder(
        BaichuanAudioVocoderConfig(base_channels=16, f0_channels=16, initializer_range=0.1, **OTHER)
    ).eval()


def mel(frames: int) -> torch.Tensor:
    """(1, frames, 80): golden mel, repeated and with something new in every frame."""
    clip = golden()["vocoder_mel.0.0"].T
    noise = torch.randn(frames, 80, generator=torch.Generator().manual_seed(1))
    return (clip.repeat(-(-frames // len(clip)), 1)[:frames] + 0.3 * noise)[None]


def run(vocoder, clip: torch.Tensor, pattern: list[int], seed: int = 3) -> list[torch.Tensor]:
    """Pieces of the waveform (1, samples) of a clip (1, frames, 80) that is pushed in pieces of the sizes in `pattern`, in turn."""
    state, pieces, start, turn = vocoder.start_stream([seed]), [], 0, 0
    while start < clip.shape[1]:
        stop = start + pattern[turn % len(pattern)]
        waveform, ready, state = vocoder.stream(clip[:, start:stop], state, final=stop >= clip.shape[1])
        assert ready.tolist() == [waveform.shape[1]]
        pieces.append(waveform)
        start, turn = stop, turn + 1
    return pieces


@pytest.mark.parametrize("frames", [1, 2, 23, 130])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_stream_equals_whole_clip(vocoder, pattern, frames):
    clip = mel(frames)
    whole = vocoder(clip, seed=3).waveform
    torch.testing.assert_close(torch.cat(run(vocoder, clip, pattern), dim=1), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_stream_equals_whole_clip_in_another_geometry(other_vocoder, pattern):
    clip = mel(61)
    whole = other_vocoder(clip, seed=3).waveform
    assert whole.std() > 0.01
    torch.testing.assert_close(torch.cat(run(other_vocoder, clip, pattern), dim=1), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("lengths", [[40, 90, 17, 89], [30, 30, 60, 0], [60, 60, 60, 60]])
@pytest.mark.parametrize("size", [1, 10, 30])
@torch.no_grad()
def test_clips_side_by_side_end_where_they_end(vocoder, size, lengths):
    clips = [mel(100)[:, row : row + length] for row, length in enumerate(lengths)]
    padded = torch.full((4, 90, 80), 5.0)  # what lies past an end must not matter
    for row, clip in enumerate(clips):
        padded[row, : clip.shape[1]] = clip
    state, sound = vocoder.start_stream([7, 8, 9, 10]), [[] for _ in clips]
    for start in range(0, 90, size):
        valid = [min(max(length - start, 0), size) for length in lengths]
        waveform, ready, state = vocoder.stream(padded[:, start : start + size], state, torch.tensor(valid))
        for row, count in enumerate(ready.tolist()):
            sound[row].append(waveform[row, :count])
            assert not waveform[row, count:].any()
    waveform, ready, state = vocoder.stream(padded[:, :0], state, final=True)
    for row, clip in enumerate(clips):
        streamed = torch.cat([*sound[row], waveform[row, : int(ready[row])]])
        assert len(streamed) == clip.shape[1] * vocoder.config.hop_length
        if len(streamed):
            alone = vocoder(clip, seed=7 + row).waveform[0]
            torch.testing.assert_close(streamed, alone, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_clips_do_not_touch_one_another(vocoder):
    clip, sounds = mel(60), []
    for other in (mel(60) + 1, torch.full((1, 60, 80), -3.0)):
        state = vocoder.start_stream([1, 2])
        pieces = [
            vocoder.stream(torch.cat([clip, other])[:, start : start + 20], state, final=start == 40)[0][0]
            for start in (0, 20, 40)
        ]
        sounds.append(torch.cat(pieces))
    torch.testing.assert_close(*sounds, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_future_does_not_change_the_past(vocoder):
    clip = mel(120)
    other = clip.clone()
    other[:, 80:] = mel(200)[:, 160:]
    ours, theirs = (torch.cat(run(vocoder, c, [20])[:4], dim=1) for c in (clip, other))
    assert ours.shape[1] == 80 * vocoder.config.hop_length - vocoder_delay(vocoder.config)
    assert torch.equal(ours, theirs)


def ready_after(vocoder, frames: int) -> int:
    state = vocoder.start_stream([0])
    return vocoder.stream(mel(frames), state)[0].shape[1]


@torch.no_grad()
def test_delay_is_the_one_stated(vocoder, other_vocoder):
    for model in (vocoder, other_vocoder):
        hop, delay = model.config.hop_length, vocoder_delay(model.config)
        for frames in range(model.stream_delay, model.stream_delay + 4):
            assert ready_after(model, frames) == frames * hop - delay
        assert (model.stream_delay - 1) * hop < delay <= model.stream_delay * hop


@torch.no_grad()
def test_delay_is_the_receptive_field(vocoder, other_vocoder):
    """What is unknown from a frame on reaches the first sample that a stream does not hand out yet, and none before it."""
    for model in (vocoder, other_vocoder):
        clip = mel(60)
        clip[:, 40:] = torch.nan
        known = model(clip, seed=3).waveform[0].isfinite()
        first = 40 * model.config.hop_length - vocoder_delay(model.config)
        assert known[:first].all() and not known[first]


def test_delay_of_the_released_vocoder():
    config = BaichuanAudioVocoderConfig()
    print(
        f"delay of the released vocoder: {vocoder_delay(config)} samples, {vocoder_delay(config) / config.hop_length:.2f} frames"
    )
    assert math.ceil(vocoder_delay(config) / config.hop_length) == 20


@pytest.mark.parametrize(("size", "frames"), [(1, 60), (10, 200), (100, 200)])
@torch.no_grad()
def test_no_work_is_done_twice(vocoder, size, frames, monkeypatch):
    """Convolutions do in a stream what they do for the whole clip, and each block of noise is drawn once."""
    clip, drawn, rate = mel(frames), [], vocoder.config.sampling_rate

    def noise(seed, stream, start, *rest):
        drawn.append(start)
        return draw(seed, stream, start, *rest)

    draw = streaming_vocoder.position_noise
    monkeypatch.setattr(streaming_vocoder, "position_noise", noise)
    with FlopCounterMode(display=False) as offline:
        vocoder(clip, seed=3)
    with FlopCounterMode(display=False) as streamed:
        run(vocoder, clip, [size])
    assert streamed.get_total_flops() <= offline.get_total_flops()
    assert drawn == list(range(0, frames * vocoder.config.hop_length, rate))


def stored(state) -> int:
    """Numbers in all tensors that an object holds."""
    if isinstance(state, torch.Tensor):
        return state.untyped_storage().nbytes() // state.element_size()
    if isinstance(state, (list, tuple)):
        return sum(stored(item) for item in state)
    return sum(stored(item) for item in vars(state).values()) if hasattr(state, "__dict__") else 0


@torch.no_grad()
def test_the_state_does_not_grow(vocoder):
    state, sizes = vocoder.start_stream([0]), []
    for _ in range(4):
        vocoder.stream(mel(50), state)
        sizes.append(stored(state))
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]


@torch.no_grad()
def test_no_click_where_pieces_meet(vocoder):
    pieces = run(vocoder, mel(200), [20])
    waveform = torch.cat(pieces, dim=1)[0]
    steps = waveform.diff().abs()
    joins = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0)[:-1] - 1
    joins = joins[joins >= 0]
    inside = torch.ones_like(steps, dtype=torch.bool)
    inside[joins] = False
    assert len(joins) == 9 and steps[joins].max() <= steps[inside].max()
    # Nor does the sound change there from one way of cutting to another.
    other = torch.cat(run(vocoder, mel(200), [33]), dim=1)[0]
    torch.testing.assert_close(other, waveform, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_long_streams_keep_the_phase(vocoder):
    """The sines of a minute in pieces are those of the whole minute, to the last."""
    f0 = 80 + 200 * torch.rand(1, 3000, generator=torch.Generator().manual_seed(0))
    phases = vocoder.source.draw_phases([0])
    before, pieces = None, []
    for piece in f0.split(37, dim=1):
        pieces.append(vocoder.source.harmonics(piece, phases, before))
        before = vocoder.source.turns(piece, before)[:, -1]
    assert torch.equal(torch.cat(pieces, dim=1), vocoder.source.harmonics(f0, phases))


@torch.no_grad()
def test_loaded_vocoders_have_plain_weights(vocoder):
    assert not vocoder.has_weight_norm and not any("parametrizations" in name for name, _ in vocoder.named_parameters())


@pytest.mark.parametrize(
    ("mel", "lengths", "message"),
    [
        (torch.zeros(5, 80), None, r"`mel` must be \(2, frames, 80\) for a stream of 2 clips, got \(5, 80\)"),
        (torch.zeros(1, 5, 80), None, r"got \(1, 5, 80\)"),
        (torch.zeros(2, 5, 79), None, r"got \(2, 5, 79\)"),
        (torch.zeros(2, 5, 80), [5], r"2 numbers from 0 to 5.*got \[5\]"),
        (torch.zeros(2, 5, 80), [6, 5], r"got \[6, 5\]"),
        (torch.zeros(2, 5, 80), [-1, 5], r"got \[-1, 5\]"),
    ],
)
def test_bad_pieces_are_refused(vocoder, mel, lengths, message):
    state = vocoder.start_stream([0, 1])
    with pytest.raises(ValueError, match=message):
        vocoder.stream(mel, state, lengths)
    assert state.rows.received == [0, 0]


def test_nothing_follows_an_end(vocoder):
    state, piece = vocoder.start_stream([0, 1]), torch.zeros(2, 5, 80)
    vocoder.stream(piece, state, [3, 5])
    with pytest.raises(ValueError, match="`lengths` must be 0 for clips that have ended, got 5 frames for clip 0"):
        vocoder.stream(piece, state, [5, 5])
    vocoder.stream(piece, state, [0, 2])
    with pytest.raises(ValueError, match="5 frames, but every clip of the stream has ended"):
        vocoder.stream(piece, state)
    waveform, ready, _ = vocoder.stream(piece[:, :0], state, final=True)
    assert waveform.shape == (2, 0) and ready.tolist() == [0, 0]
    with pytest.raises(ValueError, match="brings 5 frames after the piece with `final=True`"):
        vocoder.stream(piece, state)
    with pytest.raises(ValueError, match="brings 0 frames after"):
        vocoder.stream(piece[:, :0], state)


def test_an_empty_stream_ends_in_silence(vocoder):
    waveform, ready, _ = vocoder.stream(torch.zeros(2, 0, 80), vocoder.start_stream([0, 1]), final=True)
    assert waveform.shape == (2, 0) and ready.tolist() == [0, 0]


@pytest.mark.parametrize("seeds", [[], 3, [1.5], ["a"]])
def test_bad_seeds_are_refused(vocoder, seeds):
    with pytest.raises(ValueError, match="`seed"):
        vocoder.start_stream(seeds)


@torch.no_grad()
def test_weight_norm_does_not_matter(vocoder):
    clip = mel(30)
    plain = torch.cat(run(vocoder, clip, [10]), dim=1)
    vocoder.apply_weight_norm()
    try:
        normed = torch.cat(run(vocoder, clip, [10]), dim=1)
    finally:
        vocoder.remove_weight_norm()
    torch.testing.assert_close(normed, plain, atol=1e-6, rtol=0)
    assert isinstance(vocoder.conv_pre.weight, nn.Parameter)


def test_benchmark():
    benchmark = load_benchmark("vocoder")
    result = benchmark.measure(benchmark.make_vocoder("tiny"), seconds=2.0, pieces=(50,), repeats=1)
    assert result["ways"].keys() == {"whole", "stream 50"} and result["largest_difference"] < TOLERANCE
    assert all(abs(share - 1) < 0.01 for share in result["counted_to_arithmetic"].values())
