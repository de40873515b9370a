"""Replies as they are made: events, waveforms that equal those made at once, joins without a click, cancelling."""

import gc
import threading
import time
import weakref

import pytest
import torch

from modeling_baichuan_audio import AudioStreamer
from modeling_baichuan_audio.generation_baichuan_audio import join_waveforms
from modeling_baichuan_audio.streaming_baichuan_audio import SpeechPieceStream, WaveformJoiner


LATENCIES = ("exact", "low_latency")
OPTIONS = {"max_text_tokens": 4, "max_audio_frames": 9, "max_new_tokens": 60, "seed": [3, 4], "do_sample": True}


@pytest.fixture(scope="module")
def spoken(shared_tiny_model):
    """Two rows, one padded, one that starts in audio; rows end at different times."""
    start = shared_tiny_model.config.audiogen_start_token_id
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, start]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    scripts = [[[60], [61, 62]], [[]]]
    return {**prompts, **OPTIONS, "forced_text_ids": [scripts[0], []]}


def events_of(stream, rows=2):
    texts, sound = [[] for _ in range(rows)], [[] for _ in range(rows)]
    for event in stream:
        assert (event.waveform is None) == bool(event.token_ids)
        if event.waveform is None:
            texts[event.row] += event.token_ids
        else:
            assert event.waveform.dtype == torch.float32 and event.waveform.dim() == 1 and len(event.waveform)
            sound[event.row].append(event.waveform)
    return texts, sound


def test_events_of_a_batch_are_the_reply(shared_tiny_model, spoken):
    """Exact: text, codes and waveforms of every row are those of `generate`, whatever the order in which they came."""
    at_once = shared_tiny_model.generate(**spoken, generation_mode="audio")
    with shared_tiny_model.stream(**spoken) as stream:
        texts, sound = events_of(stream)
    assert torch.equal(stream.output.sequences, at_once.sequences)
    for row, expected in enumerate(at_once.audio):
        said = [part["token_ids"].tolist() for part in at_once.segments[row] if part["type"] == "text"]
        assert texts[row] == sum(said, [])
        torch.testing.assert_close(torch.cat(sound[row]), expected, atol=1e-4, rtol=0)
        assert torch.equal(torch.cat(sound[row]), stream.output.audio[row])
    assert len(at_once.audio[0]) != len(at_once.audio[1])


@pytest.mark.parametrize("latency", LATENCIES)
def test_rows_of_a_batch_sound_as_alone(shared_tiny_model, spoken, latency):
    together = shared_tiny_model.stream(**spoken, latency=latency)
    _, sound = events_of(together)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in spoken.items() if name not in OPTIONS} | OPTIONS
        alone["seed"] = OPTIONS["seed"][row]
        if row == 0:
            alone |= {"input_ids": alone["input_ids"][:, 1:], "attention_mask": alone["attention_mask"][:, 1:]}
        _, (expected,) = events_of(shared_tiny_model.stream(**alone, latency=latency), rows=1)
        # In low latency the frames of a push depend on how far the LLM had come, and the running statistics on the push.
        tolerance = 1e-4 if latency == "exact" else 2.0
        torch.testing.assert_close(torch.cat(sound[row]), torch.cat(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("size", [1, 4, 50])
def test_a_piece_of_any_pushes(shared_tiny_model, latency, size):
    """Exact equals offline; low latency gives as many samples, and what it gave does not change with what follows."""
    model = shared_tiny_model
    sizes = torch.tensor(model.config.audio_tokenizer_config.codebook_sizes)[:, None]
    codes = (torch.rand(8, 50, generator=torch.Generator().manual_seed(0)) * sizes).long()

    def pushed(codes, final=True):
        stream, sound = SpeechPieceStream(model, 7, latency), []
        pieces = codes.split(size, dim=1)
        for index, piece in enumerate(pieces):
            sound += list(stream.push(piece, final=final and index == len(pieces) - 1))
        return torch.cat([torch.empty(0), *sound])

    waveform = pushed(codes)
    assert len(waveform) == (4 * 50 - 1) * 480
    if latency == "exact":
        torch.testing.assert_close(waveform, model.decode_audio(codes[None], seed=7)[0], atol=1e-4, rtol=0)
        assert len(pushed(codes, final=False)) == 0
    elif size < 50:
        begun = pushed(codes[:, :40], final=False)
        assert len(begun) > 20 * 480
        torch.testing.assert_close(begun, waveform[: len(begun)], atol=1e-5, rtol=0)


def test_sound_comes_before_the_reply_ends(shared_tiny_model, spoken):
    """The first piece is heard while the LLM is still at the second."""
    heard = []
    with shared_tiny_model.stream(**(spoken | {"max_audio_frames": 40, "max_new_tokens": 200})) as stream:
        for event in stream:
            if event.waveform is not None:
                heard.append(stream.output is None)
    assert heard[0]
    timings = stream.output.timings[0]
    assert timings["first_sound_seconds"] > 0
    assert timings["audio_seconds"] == len(stream.output.audio[0]) / 24000
    assert timings["flow_seconds"] > 0 and timings["vocoder_seconds"] > 0 and timings["real_time_factor"] > 0


def test_text_comes_in_whole_characters(shared_tiny_model, processor):
    """A character of several tokens comes with the last of them."""
    tokenizer = processor.tokenizer
    ids = tokenizer("日本 ok")["input_ids"]
    request = {"input_ids": torch.tensor([[5, 6]]), "forced_text_ids": [[ids]], "max_audio_frames": 2, "seed": 0}
    events = [event for event in shared_tiny_model.stream(**request, tokenizer=tokenizer) if event.waveform is None]
    assert [event.token_ids[0] for event in events] == ids
    assert "".join(event.text for event in events) == "日本 ok" and not any("\ufffd" in event.text for event in events)


def test_streamer_in_a_thread_of_ones_own(shared_tiny_model, spoken):
    streamer = AudioStreamer(timeout=60)
    thread = threading.Thread(
        target=shared_tiny_model.generate, kwargs={**spoken, "generation_mode": "audio", "streamer": streamer}
    )
    thread.start()
    _, sound = events_of(streamer)
    thread.join()
    assert all(sound) and list(streamer) == []  # ended once and for all


def test_closing_frees_everything_at_once(shared_tiny_model, spoken):
    stream = shared_tiny_model.stream(**(spoken | {"max_audio_frames": 10_000, "max_new_tokens": 10_000}), latency="low_latency")
    next(event for event in stream if event.waveform is not None)
    watched = [weakref.ref(item) for item in gc.get_objects() if type(item).__name__ in ("VocoderStream", "FlowMatchingStream")]
    assert any(item() is not None for item in watched)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 20
    assert not stream.thread.is_alive() and not any(thread.name == "speech" for thread in threading.enumerate())
    gc.collect()
    assert all(item() is None for item in watched)
    assert stream.output.audio is None  # what was cancelled is no reply


def test_a_dropped_stream_ends(shared_tiny_model, spoken):
    stream = shared_tiny_model.stream(**(spoken | {"max_audio_frames": 10_000, "max_new_tokens": 10_000}))
    thread = stream.thread
    next(stream)
    del stream
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("part", ["flow_matching", "language_model"])
def test_errors_reach_the_reader(tiny, spoken, part, monkeypatch):
    module = tiny.flow_matching.prenet if part == "flow_matching" else tiny.model.language_model

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(module, "forward", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(tiny.stream(**spoken))
    assert not any(thread.name == "speech" for thread in threading.enumerate())


def test_what_cannot_be_streamed_is_refused(tiny, spoken):
    with pytest.raises(ValueError, match="`latency` must be one of exact, low_latency, got 'fast'"):
        tiny.stream(**spoken, latency="fast")
    with pytest.raises(ValueError, match="got str"):
        tiny.generate(**spoken, generation_mode="audio", streamer="me")
    with pytest.raises(ValueError, match="with sound"):
        tiny.generate(**spoken, generation_mode="audio", streamer=AudioStreamer(), output_audio=False)
    with pytest.raises(ValueError, match="max_audio_frames"):
        next(tiny.stream(**(spoken | {"max_audio_frames": 0})))
    with pytest.raises(TimeoutError, match="No event for 0.01 seconds"):
        next(AudioStreamer(timeout=0.01))
    tiny.vocoder = None
    with pytest.raises(ValueError, match="no vocoder"):
        tiny.stream(**spoken)


@pytest.mark.parametrize("chunk", [100, 241, 700, 5000])
def test_joins_are_those_of_whole_pieces_and_do_not_click(chunk):
    time_axis = torch.arange(3000) / 24000
    pieces = [0.5 * torch.sin(2 * torch.pi * hertz * time_axis + phase) for hertz, phase in ((200, 0.0), (310, 2.0), (150, 4.0))]
    joiner, joined = WaveformJoiner(24000), []
    for index, piece in enumerate(pieces):
        if index:
            joiner.begin_piece()
        joined += [joiner.push(part) for part in piece.split(chunk)]
    joined = torch.cat([*joined, joiner.finish()])
    torch.testing.assert_close(joined, join_waveforms(pieces, 24000))
    inside = max(piece.diff().abs().max() for piece in pieces)
    # A fade adds at most the difference of the two over its length.
    assert joined.diff().abs().max() <= inside + 1.0 / 240
    assert torch.cat(pieces).diff().abs().max() > 5 * inside  # put end to end they would click
