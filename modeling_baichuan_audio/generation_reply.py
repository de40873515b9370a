"""One spoken reply, step by step: drawing tokens and frames, and where each row of the batch stands."""

from collections import deque
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig

from .modeling_common import seeded_generator


@dataclass
class SamplingSettings:
    """How one kind of token is drawn.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    def __post_init__(self):
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0):
            raise ValueError(
                f"Sampling needs temperature > 0, top_k >= 0, 0 < top_p <= 1 and repetition_penalty > 0, got {self}."
            )

    @classmethod
    def read(cls, generation_config: GenerationConfig, prefix: str = "") -> "SamplingSettings":
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        values = {name: getattr(generation_config, prefix + name, None) for name in neutral}
        return cls(**{name: neutral[name] if value is None else value for name, value in values.items()})


def penalised(scores: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Repetition penalty (arXiv 1909.05858): scores (rows, classes) of the classes `seen` (bool) moved away from being chosen."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose_tokens(
    logits: torch.Tensor,
    settings: list[SamplingSettings],
    seen: torch.Tensor,
    uniforms: torch.Tensor,
    do_sample: bool,
) -> torch.Tensor:
    """
    One token per row: repetition penalty, then the best token, or temperature, top-k, top-p and a draw.

    Args:
        logits (`(rows, classes)`): -inf where a class is not allowed.
        settings: one per row.
        seen (`(rows, classes)`, bool): classes that the repetition penalty applies to.
        uniforms (`(rows,)`): draws in [0, 1), one per row, turned into tokens by the inverse of the cumulative distribution.

    Returns:
        `(rows,)` int64.
    """

    def column(name):
        return torch.tensor([getattr(row, name) for row in settings], device=logits.device, dtype=torch.float32)[:, None]

    logits = penalised(logits.float(), seen, column("repetition_penalty"))
    if not do_sample:
        return logits.argmax(-1)
    largest = max(row.top_k for row in settings) if all(row.top_k for row in settings) else logits.shape[-1]
    values, tokens = (logits / column("temperature")).topk(min(largest, logits.shape[-1]), dim=-1)
    ranks = torch.arange(values.shape[-1], device=logits.device)
    top_k = torch.where(column("top_k") > 0, column("top_k"), torch.inf)
    probabilities = values.masked_fill(ranks >= top_k, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= column("top_p")) & (ranks > 0), 0.0)
    cumulative = probabilities.cumsum(-1)
    drawn = (cumulative <= uniforms[:, None].to(cumulative) * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must never reach an excluded token
    return tokens.gather(1, drawn.minimum(last))[:, 0]


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

    def accept_frame(self, codes: torch.Tensor | None) -> int:
        """Takes a `(num_codebooks,)` frame in audio mode, or None for a forced end; returns the step's token."""
        if codes is not None and int(codes[0]) != self.rules.end_of_audio:
            self.frames.append(codes)
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
        self.frames = []


class ReplyStepper:
    """Runs the LLM: the whole prompt once, then one position per step. Audio frames never touch the text head."""

    def __init__(self, model, input_ids: torch.LongTensor, model_kwargs: dict):
        self.model, self.input_ids, self.model_kwargs = model, input_ids, model_kwargs
        self.cache = model_kwargs["past_key_values"]
        self.mask = model_kwargs.get("attention_mask")

    def prefill(self) -> torch.Tensor:
        """(batch, hidden_size): the final hidden state after the prompt."""
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, is_first_iteration=True, **self.model_kwargs)
        inputs = {name: value for name, value in inputs.items() if name not in ("logits_to_keep", "use_cache")}
        lengths = self.input_ids.shape[1] if self.mask is None else self.mask.sum(-1)
        self.positions = torch.zeros(self.input_ids.shape[0], dtype=torch.long, device=self.model.device) + lengths
        return self.model.model(**inputs, use_cache=True).last_hidden_state[:, -1]

    def advance(self, tokens: torch.LongTensor, codes: torch.LongTensor) -> torch.Tensor:
        """Tokens (batch,) and their code frames (batch, num_codebooks), -1 in text rows -> the next hidden state."""
        base = self.model.model
        is_frame = (codes[:, 0] >= 0)[:, None]
        embeds = base.get_input_embeddings()(tokens.to(base.device))
        embeds = torch.where(is_frame, base.embed_codes(codes.clamp(min=0)).to(embeds.dtype), embeds)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)
        outputs = base(
            inputs_embeds=embeds[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return outputs.last_hidden_state[:, -1]


class ReplySampler:
    """Draws the next token or frame of every row, each by its own rules, history and random stream."""

    DRAWS_AHEAD = 256

    def __init__(self, model, rows: list[ReplyRow], settings: dict[str, SamplingSettings], do_sample: bool, seeds: list[int]):
        self.model, self.rows, self.settings, self.do_sample, self.seeds = model, rows, settings, do_sample, seeds
        self.sizes = model.config.audio_tokenizer_config.codebook_sizes
        self.generators = [seeded_generator(seed, "tokens") for seed in seeds]
        self.steps = 0

    def start(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, suppressed: list[int] | None) -> None:
        """Histories for the repetition penalties, and the tokens that text may not use."""
        model, device, config = self.model, self.model.device, self.model.config
        counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        seen = torch.zeros(len(self.rows), model.vocab_size, dtype=torch.long, device=device)
        self.seen_text = seen.scatter_add(1, input_ids.to(device), counted.to(device)) > 0
        self.seen_codes = [torch.zeros(len(self.rows), size + 1, dtype=torch.bool, device=device) for size in self.sizes]
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
        for seen in self.seen_codes:  # the penalty looks at one piece of audio only
            seen[index] = False
        return self.rows[index].accept_frame(frame)

    def _sample_text(self, hidden, indices, uniforms) -> torch.LongTensor:
        logits = self.model.lm_head(hidden[indices]).float().masked_fill(self.banned, -torch.inf)
        rows = [self.rows[index] for index in indices]
        silent = torch.tensor([not row.text for row in rows], device=logits.device)
        start = self.model.config.audiogen_start_token_id  # audio needs text to speak
        logits[:, start] = logits[:, start].masked_fill(silent, -torch.inf)
        settings = [self.settings["later" if row.spoken_pieces else "first"] for row in rows]
        return choose_tokens(logits, settings, self.seen_text[indices], uniforms[indices, 0], self.do_sample)

    def _sample_frames(self, hidden, indices, uniforms) -> torch.LongTensor:
        settings = [self.settings["audio"]] * len(indices)
        tables = self.model.model.audio_embed_layers

        def sample_code(codebook, logits):
            seen = self.seen_codes[codebook][indices][:, : logits.shape[1]]
            chosen = choose_tokens(logits, settings, seen, uniforms[indices, 1 + codebook], self.do_sample)
            self.seen_codes[codebook][indices, chosen] = True
            return chosen

        return self.model.audio_head.generate_frame(
            hidden[indices], lambda codebook, chosen: tables[codebook](chosen), sample_code
        )
