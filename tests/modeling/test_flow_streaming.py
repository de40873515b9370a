import gc
import weakref

import pytest
import torch
from helpers.flow import small_config, small_flow
from helpers.golden import golden

from modeling_baichuan_audio.modeling_flow_estimator import CausalConv1d, EstimatorTransformerBlock
from modeling_baichuan_audio.streaming_flow_matching import KeyValueCache


pytestmark = pytest.mark.usefixtures("no_grad")
PATTERNS = [[1], [7], [10], [11], [100], [3, 25, 1, 0, 14]]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def flow():
    return small_flow()


def hidden(batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, frames, small_config().input_size, generator=torch.Generator().manual_seed(seed))


def pieces(frames: int, pattern: list[int]):
    """Starts and ends of pushes that follow `pattern`, again and again."""
    start, turn = 0, 0
    while start < frames:
        end = min(start + pattern[turn % len(pattern)], frames)
        yield start, end
        start, turn = end, turn + 1


def run(flow, states, state, pattern, lengths=None, ready=None) -> torch.Tensor:
    """The whole stream's mel. `ready` (list) takes the ready lengths of every push."""
    frames, mel = states.shape[1], []
    for start, end in pieces(frames, pattern):
        valid = None if lengths is None else (lengths - start).clamp(0, end - start)
        piece, count, state = flow.stream(states[:, start:end], state, lengths=valid, final=end == frames)
        assert piece.dtype == torch.float32 and piece.shape[1] == count.max()
        mel.append(piece)
        if ready is not None:
            ready.append(count.tolist())
    return torch.cat(mel, dim=1)


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("frames", [4, 20, 37])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_streamed_equals_offline(flow, pattern, frames, guidance):
    states = hidden(1, frames)
    offline = flow(states, seed=5, guidance=guidance).mel
    streamed = run(flow, states, flow.start_stream([5], guidance=guidance), pattern)
    torch.testing.assert_close(streamed, offline, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[37, 12, 20], [1, 37, 36], [37, 0, 10]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_clips_of_unequal_lengths(flow, pattern, lengths):
    states, lengths = hidden(3, 37), torch.tensor(lengths)
    ready = []
    streamed = run(flow, states, flow.start_stream([5, 6, 7]), pattern, lengths, ready)
    assert torch.equal(torch.tensor(ready).sum(0), lengths)
    assert streamed.shape[1] == 37
    for row, length in enumerate(lengths.tolist()):
        assert not streamed[row, length:].any()
        if length:
            alone = flow(states[row : row + 1, :length], seed=5 + row).mel[0]
            torch.testing.assert_close(streamed[row, :length], alone, atol=1e-5, rtol=0)


def test_what_follows_a_clip_that_has_ended_does_not_matter(flow):
    states, lengths = hidden(2, 37), torch.tensor([37, 14])
    first = run(flow, states, flow.start_stream([5, 6]), [9], lengths)
    states[1, 14:] = 1e3
    torch.testing.assert_close(run(flow, states, flow.start_stream([5, 6]), [9], lengths), first, atol=1e-6, rtol=0)


def test_eager_attention_streams_too():
    flow, states = small_flow("eager"), hidden(2, 37)
    lengths = torch.tensor([25, 37])
    offline = flow(states, lengths, seed=[5, 6]).mel
    streamed = run(flow, states, flow.start_stream([5, 6]), [8], lengths)
    torch.testing.assert_close(streamed, offline, atol=1e-5, rtol=0)


def test_half_precision(flow):
    flow, states = small_flow().bfloat16(), hidden(1, 37)
    offline = flow(states, seed=5).mel
    torch.testing.assert_close(run(flow, states, flow.start_stream([5]), [8]), offline, atol=0.15, rtol=0)


def test_the_checkpoint_with_chunks_of_two_seconds(original_model):
    flow = original_model.flow_matching
    states = golden()["decoder_hidden.2.0"][None]
    assert states.shape[1] > flow.config.attention_chunk_size == 100
    offline = flow(states, seed=5).mel
    streamed = run(flow, states, flow.start_stream([5]), [16])
    torch.testing.assert_close(streamed, offline, atol=1e-4, rtol=0)


def test_mel_comes_as_soon_as_its_chunk_is_complete_and_stays(flow):
    one, other = hidden(1, 37), hidden(1, 37)
    other[:, 20:] += 1.0
    offline = [flow(states, seed=5).mel for states in (one, other)]
    torch.testing.assert_close(offline[0][:, :20], offline[1][:, :20], atol=1e-6, rtol=0)
    assert not torch.allclose(offline[0][:, 20:], offline[1][:, 20:], atol=1e-2)
    state = flow.start_stream([5])
    for start in range(20):
        mel, ready, state = flow.stream(one[:, start : start + 1], state)
        assert ready.tolist() == [10 if start in (9, 19) else 0]
        if start == 19:
            torch.testing.assert_close(mel, offline[0][:, 10:20], atol=1e-5, rtol=0)
    # The same past goes on with another future.
    mel, ready, state = flow.stream(other[:, 20:], state, final=True)
    torch.testing.assert_close(mel, offline[1][:, 20:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", [[7], [100], [3, 25, 1, 0, 14]])
@pytest.mark.parametrize("sizes", [[3, 5, 10], [4], [50]])
def test_chunk_sizes(flow, sizes, pattern):
    states, lengths = hidden(2, 37), torch.tensor([37, 22])
    offline = flow(states, lengths, seed=[5, 6], chunk_sizes=sizes).mel
    assert not torch.allclose(offline, flow(states, lengths, seed=[5, 6]).mel, atol=1e-2)
    streamed = run(flow, states, flow.start_stream([5, 6], chunk_sizes=sizes), pattern, lengths)
    torch.testing.assert_close(streamed, offline, atol=1e-5, rtol=0)


def test_small_first_chunks_come_early(flow):
    state, states, ready = flow.start_stream([5], chunk_sizes=[3, 5, 10]), hidden(1, 37), []
    run(flow, states, state, [1], ready=ready)
    assert [index + 1 for index, (count,) in enumerate(ready) if count] == [3, 8, 18, 28, 37]


def test_every_setting_of_the_solver(flow):
    states = hidden(1, 23)
    settings = {"num_steps": 2, "guidance": 1.5, "time_schedule": "sway:0.5"}
    streamed = run(flow, states, flow.start_stream([5], **settings), [6])
    torch.testing.assert_close(streamed, flow(states, seed=5, **settings).mel, atol=1e-5, rtol=0)


def test_clips_can_end_one_by_one_without_a_final_push(flow):
    states, state = hidden(2, 13), flow.start_stream([5, 6])
    _, ready, state = flow.stream(states[:, :12], state, lengths=torch.tensor([12, 4]))
    assert ready.tolist() == [10, 4] and state.ended == [False, True]
    mel, ready, state = flow.stream(states[:, 12:], state, lengths=torch.tensor([0, 0]))
    assert ready.tolist() == [2, 0] and mel.shape[1] == 2 and all(state.ended)
    mel, ready, state = flow.stream(states[:, :0], state, final=True)
    assert ready.tolist() == [0, 0] and mel.shape[1] == 0


def test_no_frame_is_computed_twice(flow):
    """Every convolution and feed-forward part meets each frame once for each step and guidance half."""
    frames, met = 83, {}
    counted = [module for module in flow.estimator.modules() if isinstance(module, CausalConv1d | EstimatorTransformerBlock)]

    def count(module, arguments):
        met[module] = met.get(module, 0) + arguments[0].shape[0] * arguments[0].shape[1]

    handles = [module.register_forward_pre_hook(count) for module in counted]
    handles.append(flow.prenet.in_fc1.register_forward_pre_hook(count))
    try:
        run(flow, hidden(1, frames), flow.start_stream([5]), [4])
    finally:
        for handle in handles:
            handle.remove()
    assert met.pop(flow.prenet.in_fc1) == frames
    assert len(met) == len(counted) and set(met.values()) == {frames * 3 * 2}


def test_keys_and_values_are_copied_in_linear_time(monkeypatch):
    cache, keys, copied = KeyValueCache(), [], 0
    for piece in range(200):
        before, start = cache.buffer, cache.length
        keys.append(torch.full((1, 2, 3, 4), float(piece)))
        key, value = cache.append(keys[-1], -keys[-1])
        copied += start if cache.buffer is not before else 0
    assert torch.equal(key, torch.cat(keys, dim=2)) and torch.equal(value, -key)
    assert copied < 3 * cache.length


def test_the_state_holds_everything(flow):
    state = flow.start_stream([5])
    mel, _, state = flow.stream(hidden(1, 20), state)
    before = set(vars(flow)) | set(vars(flow.estimator))
    buffers = [weakref.ref(cache.buffer) for step in state.steps for stage in step.stages for cache in stage.attention]
    assert len(buffers) == 3 * 4 * 2 and all(reference() is not None for reference in buffers)
    del mel, state
    gc.collect()
    assert all(reference() is None for reference in buffers)
    assert set(vars(flow)) | set(vars(flow.estimator)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "`seeds` must be"),
        ({"seeds": 3}, "`seeds` must be"),
        ({"seeds": ["x"]}, "must be an int"),
        ({"num_steps": 0}, "`num_steps` must be .* got 0"),
        ({"guidance": -1.0}, "`guidance` not negative, got 3 and -1.0"),
        ({"time_schedule": "sine"}, "`time_schedule` must be .* got 'sine'"),
        ({"chunk_sizes": [0]}, r"`chunk_sizes` must be .* got \[0\]"),
        ({"chunk_sizes": []}, "`chunk_sizes` must be"),
    ],
)
def test_bad_settings_are_refused(flow, options, message):
    with pytest.raises(ValueError, match=message):
        flow.start_stream(**{"seeds": [1]} | options)


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 5, 11), None, r"must be \(2, frames, 12\) .* got \(2, 5, 11\)"),
        ((1, 5, 12), None, "for a stream of 2 clips"),
        ((2, 5), None, "got .2, 5"),
        ((2, 5, 12), [5], r"`lengths` must be 2 numbers between 0 and 5.* got \[5\]"),
        ((2, 5, 12), [5, 6], "between 0 and 5"),
        ((2, 5, 12), [5, -1], "between 0 and 5"),
        ((2, 5, 12), [5, 1], "have ended, got 1 frames for clip 1"),
    ],
)
def test_bad_pieces_are_refused_and_change_nothing(flow, shape, lengths, message):
    states, state, bounds = hidden(2, 22), flow.start_stream([5, 6]), torch.tensor([22, 6])
    expected = run(flow, states, flow.start_stream([5, 6]), [8], bounds)
    first, _, state = flow.stream(states[:, :8], state, lengths=torch.tensor([8, 6]))
    with pytest.raises(ValueError, match=message):
        flow.stream(torch.zeros(shape), state, lengths=None if lengths is None else torch.tensor(lengths))
    rest, _, state = flow.stream(states[:, 8:], state, lengths=torch.tensor([14, 0]), final=True)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-5, rtol=0)


def test_frames_after_the_end_are_refused(flow):
    _, _, state = flow.stream(hidden(1, 5), flow.start_stream([5]), final=True)
    with pytest.raises(ValueError, match="bring 5 frames, but every clip of the stream has ended"):
        flow.stream(hidden(1, 5), state)
