"""Replies as they are made: pieces of text and of waveform, from `generate` in another thread or from `model.stream`.

The LLM goes on while a thread of its own turns finished frames into sound (mel decoder, flow matching, vocoder). Two policies:

- `"exact"`: a piece of audio (what lies between two pieces of text) is decoded once it is complete, for the mel decoder's first group
  norm spans it. The waveform is the one that `generate` gives without a streamer.
- `"low_latency"`: sound begins with the first frames of a piece, with running statistics in that norm and small first attention chunks.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers.generation.streamers import BaseStreamer

from .generation_reply import ReplyRow, Stopwatch
from .streaming_mel_decoder import NormStatistics


CROSS_FADE_SECONDS = 0.01
LATENCIES = ("exact", "low_latency")
# Mel frames of 20 ms in the first attention chunks of a piece, in `low_latency`; what follows comes in the config's own size.
FIRST_CHUNKS = (24, 48)


def check_latency(latency: str) -> None:
    if latency not in LATENCIES:
        raise ValueError(f"`latency` must be one of {', '.join(LATENCIES)}, got {latency!r}.")


@dataclass
class StreamEvent:
    """
    Something that a row of the batch has said.

    Args:
        row: of the batch.
        token_ids (`list[int]`): of a piece of text; empty in an event of audio.
        text: the same as text, where the streamer has a tokenizer. Bytes that do not make a character yet come with a later event.
        waveform (`(samples,)`, float32, on the CPU): a piece of audio, to be played right after the one before; None in an event of
            text.
    """

    row: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    waveform: torch.Tensor | None = None


class WaveformJoiner:
    """Joins pieces of audio as `join_waveforms` does, while they come in: the last 10 ms of a piece wait for what follows."""

    def __init__(self, sampling_rate: int):
        self.overlap = round(CROSS_FADE_SECONDS * sampling_rate)
        self.tail, self.fading = torch.empty(0), None

    def begin_piece(self) -> None:
        """What comes next belongs to another piece; what waits is faded into it."""
        self.fading, self.tail = self.tail, torch.empty(0)

    def push(self, chunk: torch.Tensor) -> torch.Tensor:
        """(samples,) of a piece -> (n,) samples that nothing can change any more."""
        chunk, faded = torch.cat([self.tail, chunk]), torch.empty(0)
        if self.fading is not None:
            if len(chunk) < 2 * self.overlap:  # a piece has at least three mel frames: its rest will come
                self.tail = chunk
                return faded
            overlap = len(self.fading)
            ramp = torch.linspace(0, 1, overlap)
            faded, chunk = self.fading * (1 - ramp) + chunk[:overlap] * ramp, chunk[overlap:]
            self.fading = None
        ready = max(0, len(chunk) - self.overlap)
        self.tail = chunk[ready:]
        return torch.cat([faded, chunk[:ready]])

    def finish(self) -> torch.Tensor:
        """The last samples."""
        return torch.cat([self.fading, self.tail]) if self.fading is not None else self.tail


class SpeechPieceStream:
    """
    One piece of audio on its way from codes to sound.

    Args:
        model: with `audio_tokenizer`, `flow_matching` and `vocoder`.
        seed: of the flow's and the vocoder's noise.
        latency: "exact" or "low_latency".
        num_steps, guidance (*optional*): of the flow-matching solver.
        watches: stopwatches "flow" and "vocoder" to run.
        prior (*optional*): what a piece in "low_latency" is normed by at first; that of an earlier piece saves working it out.
    """

    def __init__(
        self,
        model,
        seed: int,
        latency: str,
        num_steps: int | None = None,
        guidance: float | None = None,
        watches: dict[str, Stopwatch] | None = None,
        prior: NormStatistics | None = None,
    ):
        self.model = model
        self.watches = watches or {name: Stopwatch(model.device) for name in ("flow", "vocoder")}
        chunks = None
        if latency == "low_latency":
            usual = model.flow_matching.config.attention_chunk_size
            chunks = [*(size for size in FIRST_CHUNKS if size < usual), usual]
        self.decoder = model.audio_tokenizer.start_stream(1, latency, prior)
        self.flow = model.flow_matching.start_stream([seed], num_steps, guidance, chunk_sizes=chunks)
        self.vocoder = model.vocoder.start_stream([seed])

    @property
    def prior(self) -> NormStatistics | None:
        return self.decoder.prior

    def push(self, codes: torch.LongTensor, final: bool) -> Iterator[torch.Tensor]:
        """
        Args:
            codes (`(num_codebooks, frames)`): the next frames, none too. final: whether they are the last of the piece.

        Yields:
            `(samples,)` float32, as they become ready; F frames give `(4 F - 1) * 480` in all.
        """
        hidden, *_ = self.model.audio_tokenizer.stream_decode(codes[None], self.decoder, final=final)
        if not hidden.shape[1] and not final:
            return
        # In turns, so that the first sound need not wait for the whole.
        pieces = hidden.split(self.model.flow_matching.config.attention_chunk_size, dim=1)
        for index, piece in enumerate(pieces):
            last = final and index == len(pieces) - 1
            with self.watches["flow"]:
                mel, *_ = self.model.flow_matching.stream(piece, self.flow, final=last)
            with self.watches["vocoder"]:
                waveform, *_ = self.model.vocoder.stream(mel, self.vocoder, final=last)
            if waveform.shape[1]:
                yield waveform[0].float()


class AudioStreamer(BaseStreamer):
    """
    Takes what `generate(streamer=...)` says in one thread, gives it as [`StreamEvent`]s in another.

    Args:
        tokenizer (*optional*): turns token ids into text.
        latency ("exact" or "low_latency", defaults to "exact"): see the module's docstring.
        num_steps, guidance (*optional*): of the flow-matching solver.
        timeout (`float`, *optional*): seconds that an iteration waits for the next event; without end by default.

    Raises:
        ValueError: an unknown `latency`.

    Example:

    ```python
    >>> import threading, torch
    >>> from modeling_baichuan_audio import AudioStreamer
    >>> from modeling_baichuan_audio.conversion import tiny_model
    >>> model, streamer = tiny_model(), AudioStreamer()
    >>> options = {"generation_mode": "audio", "max_new_tokens": 40, "max_text_tokens": 4, "max_audio_frames": 8, "seed": 0}
    >>> options |= {"input_ids": torch.tensor([[5, 6]]), "streamer": streamer}
    >>> thread = threading.Thread(target=model.generate, kwargs=options)
    >>> thread.start()
    >>> any(event.waveform is not None for event in streamer)
    True
    >>> thread.join()

    ```
    """

    def __init__(self, tokenizer=None, latency: str = "exact", num_steps=None, guidance=None, timeout: float | None = None):
        check_latency(latency)
        self.tokenizer, self.latency, self.timeout = tokenizer, latency, timeout
        self.solver = {"num_steps": num_steps, "guidance": guidance}
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._cancelled, self._ended = threading.Event(), False

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends the reply at its next step; what it holds is freed."""
        self._cancelled.set()

    def put(self, value: StreamEvent) -> None:
        """Hands an event over."""
        self._events.put(value)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come; an error is raised in the thread that reads."""
        self._events.put(error)

    def __iter__(self) -> "AudioStreamer":
        return self

    def __next__(self) -> StreamEvent:
        if self._ended:
            raise StopIteration
        try:
            event = self._events.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"No event for {self.timeout} seconds.") from None
        if isinstance(event, StreamEvent):
            return event
        self._ended = True
        if event is not None:
            raise event
        raise StopIteration


class RowListener:
    """Hears one row of the batch, and passes on its text to the streamer and its frames to the thread that makes sound."""

    def __init__(self, index: int, streamer: AudioStreamer, worker: "SpeechWorker"):
        self.index, self.streamer, self.worker = index, streamer, worker
        self.ids: list[int] = []
        self.said = 0  # characters of `ids` that are out

    def text(self, token: int) -> None:
        text = ""
        if self.streamer.tokenizer is not None:
            self.ids.append(token)
            whole = self.streamer.tokenizer.decode(self.ids)
            if not whole.endswith("\ufffd"):
                text, self.said = whole[self.said :], len(whole)
        self.streamer.put(StreamEvent(self.index, [token], text))

    def frame(self, codes: torch.Tensor) -> None:
        self.worker.push(self.index, codes[:, None], final=False)

    def end_audio(self) -> None:
        self.worker.push(self.index, None, final=True)
        self.ids, self.said = [], 0


class SpeechWorker:
    """
    The thread beside the LLM, on a GPU with a stream of its own: frames of all rows -> sound.

    Args:
        model: the whole model. streamer: gets the sound.
        rows: of the batch; the worker listens to them. seeds: one per row; the pieces of a row count on from it.
    """

    def __init__(self, model, streamer: AudioStreamer, rows: list[ReplyRow], seeds: list[int]):
        self.model, self.streamer, self.seeds = model, streamer, seeds
        for index, row in enumerate(rows):
            row.listener = RowListener(index, streamer, self)
        self.watches = {name: Stopwatch(model.device) for name in ("flow", "vocoder")}
        self.joiners = [WaveformJoiner(model.config.sampling_rate) for _ in rows]
        self.sound: list[list[torch.Tensor]] = [[] for _ in rows]
        self.first_sound: list[float | None] = [None] * len(rows)
        self.pieces, self.streams = [0] * len(rows), {}
        self.prior: NormStatistics | None = None  # it follows from the checkpoint alone: once for all pieces
        self.started, self.error = time.perf_counter(), None
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self.thread.start()

    def push(self, row: int, codes: torch.Tensor | None, final: bool) -> None:
        """`(num_codebooks, frames)` of a row's current piece, or None for its end."""
        self.tasks.put((row, codes, final))

    def finish(self) -> list[torch.Tensor] | None:
        """Waits for all sound; each row's whole waveform, (samples,) float32 on the CPU, or None of a reply that was cancelled."""
        self.tasks.put(None)
        self.thread.join()
        if self.error is not None:
            raise self.error
        if self.streamer.cancelled:
            self.streams.clear()
            return None
        for index, joiner in enumerate(self.joiners):
            self._put(index, joiner.finish())
        return [torch.cat([torch.empty(0), *chunks]) for chunks in self.sound]

    def timings(self, row: int) -> dict[str, float | None]:
        """See `BaichuanAudioGenerateOutput`; called when all sound is there."""
        seconds = time.perf_counter() - self.started
        audio = sum(len(chunk) for chunk in self.sound[row]) / self.model.config.sampling_rate
        return {
            **{f"{name}_seconds": watch.seconds() for name, watch in self.watches.items()},
            "first_sound_seconds": self.first_sound[row],
            "audio_seconds": audio,
            "real_time_factor": seconds / audio if audio else None,
        }

    def abandon(self) -> None:
        """Stops the thread as soon as it can be."""
        self.streamer.cancel()
        self.tasks.put(None)
        self.thread.join()
        self.streams.clear()

    def _run(self) -> None:
        on_gpu = self.model.device.type == "cuda"
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(self.model.device)) if on_gpu else nullcontext():
                open_ended = True
                while open_ended and not self.streamer.cancelled:
                    tasks = [self.tasks.get()]
                    while not self.tasks.empty():  # whatever has come meanwhile is decoded at once
                        tasks.append(self.tasks.get())
                    open_ended = tasks[-1] is not None
                    self._work([task for task in tasks if task is not None])
        except BaseException as error:  # is raised where the reply is waited for
            self.error = error
            self.streamer.cancel()

    def _work(self, tasks: list[tuple[int, torch.Tensor | None, bool]]) -> None:
        """Joins frames of the same piece, and decodes them."""
        waiting: dict[int, list[torch.Tensor]] = {}
        for row, codes, final in tasks:
            if codes is not None:
                waiting.setdefault(row, []).append(codes)
            if final:
                self._decode(row, waiting.pop(row, []), True)
        for row, frames in waiting.items():
            self._decode(row, frames, False)

    def _decode(self, row: int, frames: list[torch.Tensor], final: bool) -> None:
        if row not in self.streams:
            self.streams[row] = SpeechPieceStream(
                self.model,
                self.seeds[row] + self.pieces[row],
                self.streamer.latency,
                watches=self.watches,
                prior=self.prior,
                **self.streamer.solver,
            )
            if self.pieces[row]:
                self.joiners[row].begin_piece()
        codebooks = self.model.config.audio_tokenizer_config.num_codebooks
        codes = torch.cat(frames, dim=1) if frames else torch.empty(codebooks, 0, dtype=torch.long, device=self.model.device)
        for waveform in self.streams[row].push(codes, final):
            if self.streamer.cancelled:
                return
            self._put(row, self.joiners[row].push(waveform.cpu()))
        self.prior = self.streams[row].prior
        if final:
            self.pieces[row] += 1
            del self.streams[row]

    def _put(self, row: int, waveform: torch.Tensor) -> None:
        if len(waveform):
            if self.first_sound[row] is None:
                self.first_sound[row] = time.perf_counter() - self.started
            self.sound[row].append(waveform)
            self.streamer.put(StreamEvent(row, waveform=waveform))


class ReplyStream:
    """
    A reply on its way: iterate over its [`StreamEvent`]s. Closing it, or leaving its `with` block, ends the reply and frees its state.

    `output` is what `generate` returns, once all events are out.
    """

    def __init__(self, generate, streamer: AudioStreamer, options: dict):
        self.streamer = streamer
        self._result = result = {}

        def run():  # knows nothing of this object, so that dropping it ends the reply
            try:
                result["output"] = generate(**options, streamer=streamer)
            except BaseException as error:
                streamer.end(error)

        self.thread = threading.Thread(target=run, name="reply", daemon=True)
        self.thread.start()

    @property
    def output(self):
        return self._result.get("output")

    def __iter__(self) -> "ReplyStream":
        return self

    def __next__(self) -> StreamEvent:
        try:
            return next(self.streamer)
        except StopIteration:
            self.thread.join()
            raise

    def close(self) -> None:
        self.streamer.cancel()
        self.thread.join()

    def __enter__(self) -> "ReplyStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        self.streamer.cancel()


__all__ = ["AudioStreamer", "ReplyStream", "StreamEvent"]
