"""Generation: plain text, or replies in which text and audio alternate (paper, section 3.2 and 3.3).

A reply alternates between two modes per row. Text mode samples from the LLM's text logits until the model asks for audio
(`audiogen_start`), a switch rule appends that token, or the reply ends. Audio mode samples frames from the audio head until the first
codebook gives its end-of-audio class; that step's token is `audiogen_end`, and text goes on. Rows of a batch are in different modes
at the same step; nothing a row does depends on the others.
"""

import copy
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor
from transformers.utils import ModelOutput

from .modeling_common import draw_seeds, seeded_generator


# The original demo's settings: for text before the first audio of a reply, for text after it, and for audio frames.
TEXT_DEFAULTS = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.85,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2048,
}
REPLY_DEFAULTS = {
    "later_text_temperature": 0.3,
    "later_text_top_k": 20,
    "later_text_top_p": 0.85,
    "later_text_repetition_penalty": 1.05,
    "audio_temperature": 0.5,
    "audio_top_k": 5,
    "audio_top_p": 0.85,
    "audio_repetition_penalty": 1.3,
    # Limits of one piece: audio frames (80 ms each), and text tokens before a switch to audio.
    "max_audio_frames": 500,
    "max_text_tokens": 50,
    # Text tokens (punctuation) after which the reply switches to audio; `BaichuanAudioProcessor.audio_switch_token_ids`.
    "audio_switch_token_ids": [],
}
CROSS_FADE_SECONDS = 0.01


def set_generation_defaults(generation_config: GenerationConfig, text: bool = True) -> None:
    """Fills in the original's settings where `generation_config` has none of its own."""
    if getattr(generation_config, "_from_model_config", False):
        # Read off an original config.json for want of a generation_config.json: its ids are leftovers that nothing uses.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"):
            setattr(generation_config, name, None)
        # As long as it counts as read off a model config, transformers drops the entries below when it is loaded again.
        generation_config._from_model_config = False
    for name, value in ((TEXT_DEFAULTS if text else {}) | REPLY_DEFAULTS).items():
        if getattr(generation_config, name, None) is None:
            setattr(generation_config, name, copy.copy(value))


@dataclass
class BaichuanAudioGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`(batch, time)`, int64): prompt and reply; an audio frame is one audio token, a finished row is padded.
        audio_codes (`(batch, num_codebooks, frames)`, int64): all frames of each row's reply, padded with -1.
        audio (`list` of `(samples,)` float32): each row's waveform, its pieces joined by 10 ms cross-fades; None when not asked for.
        segments (`list` of `list` of `dict`): each row's pieces in order, `{"type": "text", "token_ids": (n,)}` or
            `{"type": "audio", "audio_codes": (num_codebooks, frames)}`.
        timings (`dict`): seconds spent on prefill, on decoding steps and on waveforms, and the number of steps.
    """

    sequences: torch.LongTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio: list[torch.FloatTensor] | None = None
    segments: list[list[dict]] | None = None
    timings: dict[str, float] | None = None


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
        seen (`(rows, classes)`, bool): classes that the repetition penalty applies to (arXiv 1909.05858).
        uniforms (`(rows,)`): draws in [0, 1), one per row, turned into tokens by the inverse of the cumulative distribution.

    Returns:
        `(rows,)` int64.
    """

    def column(name):
        return torch.tensor([getattr(row, name) for row in settings], device=logits.device, dtype=torch.float32)[:, None]

    logits, penalty = logits.float(), column("repetition_penalty")
    logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
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


class PaddedRepetitionPenalty(LogitsProcessor):
    """Repetition penalty that leaves out the padding of the prompt, so that a row in a batch equals the row alone."""

    def __init__(self, penalty: float, prompt_mask: torch.Tensor):
        self.penalty, self.prompt_mask = penalty, prompt_mask.bool()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        counted[:, : self.prompt_mask.shape[1]] = self.prompt_mask
        seen = torch.zeros_like(scores).scatter_add(1, input_ids, counted.to(scores.dtype)) > 0
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


def join_waveforms(pieces: list[torch.Tensor], sampling_rate: int) -> torch.Tensor:
    """Joins (samples,) pieces with linear cross-fades of 10 ms; shorter where a piece is shorter."""
    joined = pieces[0]
    for piece in pieces[1:]:
        overlap = min(round(CROSS_FADE_SECONDS * sampling_rate), len(joined), len(piece))
        ramp = torch.linspace(0, 1, overlap, device=piece.device)
        middle = joined[len(joined) - overlap :] * (1 - ramp) + piece[:overlap] * ramp
        joined = torch.cat([joined[: len(joined) - overlap], middle, piece[overlap:]])
    return joined


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


class BaichuanAudioGenerationMixin(GenerationMixin):
    """`generate` for text and for spoken replies."""

    def prepare_inputs_for_generation(self, input_ids, *args, audio_codes=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        fed = 0 if inputs.get("input_ids") is None else inputs["input_ids"].shape[1]
        # A single new token is text. With a cache, only the last part of a prompt is fed: its audio tokens take the last frames.
        if audio_codes is not None and (fed > 1 or fed == input_ids.shape[1]):
            before = self.model.get_placeholder_mask(input_ids[:, : input_ids.shape[1] - fed]).sum(-1)
            if bool(before.any()):
                index = torch.arange(audio_codes.shape[2], device=audio_codes.device) + before[:, None].to(audio_codes.device)
                past_end = index >= audio_codes.shape[2]
                index = index.clamp(max=audio_codes.shape[2] - 1)[:, None].expand_as(audio_codes)
                audio_codes = audio_codes.gather(2, index).masked_fill(past_end[:, None], -1)
            inputs["audio_codes"] = audio_codes
        return inputs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        mask = (kwargs.get("model_kwargs") or {}).get("attention_mask")
        # In plain text none of the multimodal tokens means anything. First of all, or top-k and top-p could leave nothing else.
        kept = LogitsProcessorList([SuppressTokensLogitsProcessor(self.config.special_token_ids, device=kwargs.get("device"))])
        for processor in processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor and mask is not None:
                processor = PaddedRepetitionPenalty(processor.penalty, mask)
            kept.append(processor)
        return kept

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        generation_mode: str | None = None,
        output_audio: bool | None = None,
        seed: int | list[int] | None = None,
        forced_text_ids: list[list[list[int]] | None] | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_codes: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | BaichuanAudioGenerateOutput:
        """
        Continues prompts of text and speech; see [`~transformers.GenerationMixin.generate`] for everything not listed here.

        Args:
            inputs or input_ids (`(batch, time)`, int64), attention_mask: prompts, padded on the left.
            input_features, input_features_mask, audio_codes (*optional*): the prompts' audio, as in `forward`.
            generation_mode (`"text"` or `"audio"`, defaults to `"text"`): token ids, or a spoken reply that alternates with text.
                A prompt that ends in `audiogen_start` begins with audio.
            output_audio (`bool`, *optional*): make waveforms; the default in audio mode.
            seed (`int` or one per row, *optional*): of all random draws. A row's reply depends on its prompt and its seed alone
                (audio mode). By default seeds come from torch's global generator.
            forced_text_ids (*optional*, audio mode): per row, pieces of text (lists of ids) to be spoken instead of sampled: each
                is fed and followed by its audio; the row ends after the last. None for rows that sample.
            audio_temperature, later_text_temperature, max_audio_frames, ... : any entry of `generation_config`; see
                `REPLY_DEFAULTS` and `TEXT_DEFAULTS`.

        Returns:
            Text mode: as transformers' `generate`. Audio mode: [`BaichuanAudioGenerateOutput`].

        Raises:
            ValueError: an unknown mode, a decoding method that spoken replies do not have, audio that does not fit the prompt, or
                waveforms asked of a checkpoint without a vocoder.
        """
        if generation_mode not in (None, "text", "audio"):
            raise ValueError(f'`generation_mode` must be "text" or "audio", got {generation_mode!r}.')
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and (input_features is not None or audio_codes is not None):
            audio_codes = self.model.resolve_audio_codes(
                input_ids.to(self.device), input_features, input_features_mask, audio_codes
            )
        if audio_codes is not None:
            kwargs["audio_codes"] = audio_codes
        if generation_mode != "audio":
            if output_audio or forced_text_ids is not None:
                raise ValueError('`output_audio` and `forced_text_ids` need `generation_mode="audio"`.')
            if seed is None:
                return super().generate(inputs, generation_config, **kwargs)
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(draw_seeds(seed, 1)[0])
                return super().generate(inputs, generation_config, **kwargs)

        if output_audio is not False:
            self.require_vocoder()
        if input_ids is None:
            raise ValueError("Spoken replies need `input_ids`.")
        refused = [
            name
            for name in ("streamer", "assistant_model", "past_key_values", "logits_processor", "prefix_allowed_tokens_fn")
            if kwargs.get(name) is not None
        ]
        if refused:
            raise ValueError(f"Spoken replies do not take {', '.join(f'`{name}`' for name in refused)}.")
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            set_generation_defaults(generation_config, text=False)
        kwargs["use_cache"] = True

        def decode(model, input_ids, generation_config, stopping_criteria, logits_processor=None, **model_kwargs):
            return self._generate_reply(
                input_ids, generation_config, stopping_criteria, seed, forced_text_ids, output_audio is not False, model_kwargs
            )

        return super().generate(inputs, generation_config, custom_generate=decode, **kwargs)

    def _generate_reply(
        self, input_ids, generation_config, stopping_criteria, seed, forced_text_ids, output_audio, model_kwargs
    ) -> BaichuanAudioGenerateOutput:
        if (generation_config.num_beams or 1) > 1:
            raise ValueError(
                "Spoken replies are sampled or greedy: beams of different modes cannot be compared. Use num_beams=1."
            )
        batch = input_ids.shape[0]
        rules = self._reply_rules(generation_config)
        scripts = self._checked_scripts(forced_text_ids, batch)
        begins_in_audio = (input_ids[:, -1] == rules.audiogen_start).tolist()
        rows = [ReplyRow(rules, in_audio=audio, script=script) for audio, script in zip(begins_in_audio, scripts)]
        for row in rows:
            if row.in_audio and row.script is not None:  # the prompt already holds the first piece
                row.script.appendleft([])
            if row.script is not None and not row.script:
                raise ValueError(
                    "`forced_text_ids` has no piece for a prompt that does not end in `audiogen_start`: nothing to speak."
                )
        settings = {
            "first": SamplingSettings.read(generation_config),
            "later": SamplingSettings.read(generation_config, "later_text_"),
            "audio": SamplingSettings.read(generation_config, "audio_"),
        }
        sampler = ReplySampler(self, rows, settings, bool(generation_config.do_sample), draw_seeds(seed, batch))
        sampler.start(input_ids, model_kwargs.get("attention_mask"), generation_config.suppress_tokens)
        pad = generation_config._pad_token_tensor
        pad = self.config.audiotext_pad_token_id if pad is None else int(pad)

        started = time.perf_counter()
        step = ReplyStepper(self, input_ids, model_kwargs)
        hidden = step.prefill()
        prefilled, steps, sequences = time.perf_counter(), 0, input_ids
        while True:
            tokens, codes = sampler.step(hidden, pad)
            sequences = torch.cat([sequences, tokens[:, None]], dim=1)
            steps += 1
            stopped = stopping_criteria(sequences, None).tolist()
            for row, stop in zip(rows, stopped):
                row.done = row.done or stop
            if all(row.done for row in rows):
                break
            hidden = step.advance(tokens, codes)
        decoded = time.perf_counter()

        for row in rows:
            row.close_text()
            row.close_audio()
        audio = self._reply_waveforms(rows, sampler.seeds) if output_audio else None
        timings = {
            "prefill_seconds": prefilled - started,
            "decode_seconds": decoded - prefilled,
            "waveform_seconds": time.perf_counter() - decoded,
            "steps": steps,
        }
        return BaichuanAudioGenerateOutput(
            sequences=sequences,
            audio_codes=self._reply_codes(rows),
            audio=audio,
            segments=[row.segments for row in rows],
            timings=timings,
        )

    def _reply_rules(self, generation_config) -> ReplyRules:
        config, eos = self.config, generation_config._eos_token_tensor
        values = {name: getattr(generation_config, name, None) for name in REPLY_DEFAULTS}
        if values["max_audio_frames"] < 1 or (values["max_text_tokens"] or 1) < 1:
            raise ValueError(
                "`max_audio_frames` and `max_text_tokens` must be at least 1, got "
                f"{values['max_audio_frames']} and {values['max_text_tokens']}."
            )
        return ReplyRules(
            audio_pad=config.audio_pad_token_id,
            audiogen_start=config.audiogen_start_token_id,
            audiogen_end=config.audiogen_end_token_id,
            end_of_audio=config.audio_tokenizer_config.codebook_sizes[0],
            max_audio_frames=values["max_audio_frames"],
            max_text_tokens=values["max_text_tokens"],
            switch_token_ids=set(values["audio_switch_token_ids"] or ()),
            eos_token_ids=set() if eos is None else set(eos.flatten().tolist()),
        )

    def _checked_scripts(self, forced_text_ids, batch: int) -> list[deque[list[int]] | None]:
        if forced_text_ids is None:
            return [None] * batch
        if len(forced_text_ids) != batch:
            raise ValueError(f"`forced_text_ids` must have one entry per row ({batch}), got {len(forced_text_ids)}.")
        special, scripts = set(self.config.special_token_ids), []
        for script in forced_text_ids:
            for piece in script or ():
                if not all(isinstance(token, int) and 0 <= token < self.vocab_size and token not in special for token in piece):
                    raise ValueError(f"`forced_text_ids` must hold lists of text token ids, got the piece {piece}.")
            scripts.append(None if script is None else deque(list(piece) for piece in script))
        return scripts

    def _reply_codes(self, rows: list[ReplyRow]) -> torch.LongTensor:
        codebooks = self.config.audio_tokenizer_config.num_codebooks
        empty = torch.empty(codebooks, 0, dtype=torch.long, device=self.device)
        joined = [
            torch.cat([empty] + [part["audio_codes"] for part in row.segments if part["type"] == "audio"], dim=1) for row in rows
        ]
        columns = [codes.transpose(0, 1) for codes in joined]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1).transpose(1, 2)

    def _reply_waveforms(self, rows: list[ReplyRow], seeds: list[int]) -> list[torch.Tensor]:
        clips, clip_seeds, counts = [], [], []
        for row, seed in zip(rows, seeds):
            pieces = [part["audio_codes"] for part in row.segments if part["type"] == "audio"]
            clips += pieces
            clip_seeds += [seed + index for index in range(len(pieces))]
            counts.append(len(pieces))
        decoded = iter(self.decode_audio(clips, seed=clip_seeds) if clips else [])
        rate = self.config.sampling_rate
        return [
            join_waveforms([next(decoded) for _ in range(count)], rate) if count else torch.empty(0, device=self.device)
            for count in counts
        ]


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


__all__ = ["BaichuanAudioGenerateOutput", "BaichuanAudioGenerationMixin", "join_waveforms"]
