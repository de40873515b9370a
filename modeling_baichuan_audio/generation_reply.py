"""One spoken reply, step by step: running the LLM, drawing tokens and frames, and where each row of the batch stands."""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import CompileConfig, DynamicCache

from .generation_sampling import SamplingColumns, SamplingSettings, choose_tokens, compiled, language_step, sample_frame
from .modeling_common import seeded_generator


@dataclass
class ReplyRules:
    """What decides the course of a reply; the same for every row."""

    audio_pad: int
    audiogen_start: int
    audiogen_end: int
    end_of_audio: int
    max_audio_frames: int
    max_text_tokens: int | None
    switch_token_ids: set[int]
    eos_token_ids: set[int]


@dataclass
class ReplyRow:
    """Where one row of the batch stands in its reply."""

    rules: ReplyRules
    in_audio: bool
    script: deque[list[int]] | None = None  # text that is spoken instead of sampled, piece by piece
    done: bool = False
    steps: int = 0
    spoken_pieces: int = 0
    text: list[int] = field(default_factory=list)
    frames: list[torch.Tensor] = field(default_factory=list)
    segments: list[dict] = field(default_factory=list)
    listener: object | None = None  # with methods `text(token)`, `frame(codes)` and `end_audio()`, called as they happen

    def forced_token(self) -> int | None:
        """The next token when it is not sampled."""
        rules = self.rules
        if self.in_audio:
            return rules.audiogen_end if len(self.frames) >= rules.max_audio_frames else None
        if self.script is not None:
            piece = self.script[0]
            return piece[len(self.text)] if len(self.text) < len(piece) else rules.audiogen_start
        limit = rules.max_text_tokens is not None and len(self.text) >= rules.max_text_tokens
        if limit or (self.text and self.text[-1] in rules.switch_token_ids):
            return rules.audiogen_start
        return None

    def accept_text(self, token: int) -> None:
        """Takes a token in text mode."""
        if token == self.rules.audiogen_start:
            self.in_audio = True
            self.close_text()
        elif self.script is None and token in self.rules.eos_token_ids:
            self.done = True
        else:
            self.text.append(token)
            if self.listener is not None:
                self.listener.text(token)

    def accept_frame(self, codes: torch.Tensor | None) -> int:
        """Takes a `(num_codebooks,)` frame in audio mode, or None for a forced end; returns the step's token."""
        if codes is not None and int(codes[0]) != self.rules.end_of_audio:
            self.frames.append(codes)
            if self.listener is not None:
                self.listener.frame(codes)
            return self.rules.audio_pad
        self.close_audio()
        self.in_audio = False
        self.spoken_pieces += 1
        if self.script is not None:
            self.script.popleft()
            self.done = not self.script
        return self.rules.audiogen_end

    def close_text(self) -> None:
        if self.text:
            self.segments.append({"type": "text", "token_ids": torch.tensor(self.text)})
        self.text = []

    def close_audio(self) -> None:
        if self.frames:
            self.segments.append({"type": "audio", "audio_codes": torch.stack(self.frames, dim=1)})
            if self.listener is not None:
                self.listener.end_audio()
        self.frames = []


class Stopwatch:
    """Seconds spent in a kind of work, told apart on a GPU by events, which nothing waits for until the sum is read."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.total, self.spans = device.type == "cuda", 0.0, []

    def __enter__(self):
        self.started = self._now()

    def __exit__(self, *_):
        if self.on_gpu:
            self.spans.append((self.started, self._now()))
        else:
            self.total += time.perf_counter() - self.started

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        if self.on_gpu and self.spans:
            torch.cuda.synchronize()
            self.total += sum(start.elapsed_time(end) for start, end in self.spans) / 1000
            self.spans = []
        return self.total


class ReplyStepper:
    """
    Runs the LLM: the whole prompt once, then one position per step. Audio frames never touch the text head.

    Args:
        model: the whole model. input_ids, model_kwargs: as `generate` prepared them.
        compile_config (*optional*): how to compile a step, with a cache of fixed size. None for plain eager steps.
    """

    def __init__(self, model, input_ids: torch.LongTensor, model_kwargs: dict, compile_config: CompileConfig | None = None):
        self.model, self.input_ids, self.model_kwargs = model, input_ids, model_kwargs
        self.cache = model_kwargs["past_key_values"]
        self.mask = model_kwargs.get("attention_mask")
        self.watch = Stopwatch(model.device)
        self.step = language_step if compile_config is None else compiled(language_step, compile_config)

    def prefill(self) -> torch.Tensor:
        """(batch, hidden_size): the final hidden state after the prompt."""
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, is_first_iteration=True, **self.model_kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in ("logits_to_keep", "use_cache")}
        batch, prompt = self.input_ids.shape
        lengths = prompt if self.mask is None else self.mask.sum(-1)
        self.positions = torch.zeros(batch, dtype=torch.long, device=self.model.device) + lengths
        hidden = self.model.model(**inputs, use_cache=True).last_hidden_state[:, -1]
        # A cache of fixed size wants a mask of its size: what is not yet written is hidden by causality.
        self.grows = type(self.cache) is DynamicCache
        if self.mask is not None and not self.grows:
            self.mask = nn.functional.pad(self.mask, (0, self.cache.layers[0].max_cache_len - prompt), value=1)
        return hidden

    def advance(self, tokens: torch.LongTensor, codes: torch.LongTensor) -> torch.Tensor:
        """Tokens (batch,) and their code frames (batch, num_codebooks), -1 in text rows -> the next hidden state."""
        if self.mask is not None and self.grows:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        base = self.model.model
        with self.watch:
            hidden = self.step(base, tokens.to(base.device), codes, self.mask, self.positions, self.cache)
        self.positions = self.positions + 1
        return hidden


class ReplySampler:
    """
    Draws the next token or frame of every row, each by its own rules, history and random stream.

    Args:
        model: the whole model. rows: where each stands.
        settings: "first", "later" and "audio": for text before the first audio of a reply, text after it, and frames.
        do_sample: False for the best class every time. seeds: one per row.
        compile_config (*optional*): how to compile the drawing of a frame; None for eager.
    """

    DRAWS_AHEAD = 256

    def __init__(
        self,
        model,
        rows: list[ReplyRow],
        settings: dict[str, SamplingSettings],
        do_sample: bool,
        seeds: list[int],
        compile_config: CompileConfig | None = None,
    ):
        self.model, self.rows, self.settings, self.do_sample, self.seeds = model, rows, settings, do_sample, seeds
        self.sizes = model.config.audio_tokenizer_config.codebook_sizes
        self.generators = [seeded_generator(seed, "tokens") for seed in seeds]
        self.audio_settings = SamplingColumns.of([settings["audio"]] * len(rows), model.device)
        self.is_compiled = compile_config is not None
        self.sample_frame = compiled(sample_frame, compile_config) if self.is_compiled else sample_frame
        self.watch = Stopwatch(model.device)
        self.steps = 0

    def start(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, suppressed: list[int] | None) -> None:
        """Histories for the repetition penalties, and the tokens that text may not use."""
        model, device, config = self.model, self.model.device, self.model.config
        counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        seen = torch.zeros(len(self.rows), model.vocab_size, dtype=torch.long, device=device)
        self.seen_text = seen.scatter_add(1, input_ids.to(device), counted.to(device)) > 0
        # One row of all codebooks' classes, each codebook with its end-of-audio class.
        starts = torch.tensor([0, *(size + 1 for size in self.sizes)]).cumsum(0)
        self.code_starts, classes = starts[:-1].to(device), int(starts[-1])
        self.seen_codes = torch.zeros(len(self.rows), classes, dtype=torch.bool, device=device)
        banned = (set(config.special_token_ids) - {config.audiogen_start_token_id}) | set(suppressed or ())
        self.banned = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
        self.banned[list(banned)] = True

    def uniforms(self) -> torch.Tensor:
        """(batch, 1 + num_codebooks) draws of this step. They depend on a row's seed and step alone."""
        index = self.steps % self.DRAWS_AHEAD
        if index == 0:
            shape = (self.DRAWS_AHEAD, 1 + len(self.sizes))
            drawn = torch.stack([torch.rand(shape, generator=generator) for generator in self.generators], dim=1)
            self.table = drawn.to(self.model.device)
        self.steps += 1
        return self.table[index]

    def step(self, hidden: torch.Tensor, pad: int) -> tuple[torch.LongTensor, torch.LongTensor]:
        """(batch, hidden_size) -> tokens (batch,) and code frames (batch, num_codebooks), -1 in rows without one."""
        uniforms = self.uniforms()
        tokens = [pad] * len(self.rows)
        codes = torch.full((len(self.rows), len(self.sizes)), -1, device=hidden.device)
        sample_text, sample_audio = [], []
        for index, row in enumerate(self.rows):
            if row.done:
                continue
            row.steps += 1
            token = row.forced_token()
            if token is None:
                (sample_audio if row.in_audio else sample_text).append(index)
            elif row.in_audio:
                tokens[index] = self._end_audio(index, None)
            else:
                tokens[index] = token
                row.accept_text(token)
        if sample_text:
            for index, token in zip(sample_text, self._sample_text(hidden, sample_text, uniforms).tolist()):
                tokens[index] = token
                self.rows[index].accept_text(token)
        if sample_audio:
            frames = self._sample_frames(hidden, sample_audio, uniforms)
            for index, frame, ended in zip(sample_audio, frames, (frames[:, 0] == self.sizes[0]).tolist()):
                if ended:
                    tokens[index] = self._end_audio(index, frame)
                else:
                    tokens[index] = self.rows[index].accept_frame(frame)
                    codes[index] = frame
        tokens = torch.tensor(tokens, device=hidden.device)
        self.seen_text[torch.arange(len(self.rows), device=hidden.device), tokens] = True
        return tokens.to(torch.long), codes

    def _end_audio(self, index: int, frame: torch.Tensor | None) -> int:
        self.seen_codes[index] = False  # the penalty looks at one piece of audio only
        return self.rows[index].accept_frame(frame)

    def _sample_text(self, hidden, indices, uniforms) -> torch.LongTensor:
        logits = self.model.lm_head(hidden[indices]).float().masked_fill(self.banned, -torch.inf)
        rows = [self.rows[index] for index in indices]
        silent = torch.tensor([not row.text for row in rows], device=logits.device)
        start = self.model.config.audiogen_start_token_id  # audio needs text to speak
        logits[:, start] = logits[:, start].masked_fill(silent, -torch.inf)
        settings = [self.settings["later" if row.spoken_pieces else "first"] for row in rows]
        columns = SamplingColumns.of(settings, logits.device)
        return choose_tokens(logits, columns, self.seen_text[indices], uniforms[indices, 0], self.do_sample)

    def _sample_frames(self, hidden, indices, uniforms) -> torch.LongTensor:
        """Frames of the rows `indices`. A graph serves the whole batch: its shape must not change with the rows in audio."""
        rows = torch.tensor(indices, device=hidden.device)
        everyone = self.is_compiled or len(indices) == len(self.rows)
        chosen = slice(None) if everyone else rows
        settings = self.audio_settings if everyone else SamplingColumns.of([self.settings["audio"]] * len(indices), hidden.device)
        with self.watch:
            frames = self.sample_frame(
                self.model.audio_head,
                self.model.model.audio_embed_layers,
                hidden[chosen],
                self.seen_codes[chosen],
                settings,
                uniforms[chosen, 1:],
                self.do_sample,
            )
        if self.is_compiled:
            frames = frames[rows]
        self.seen_codes[rows[:, None], frames + self.code_starts] = True
        return frames
