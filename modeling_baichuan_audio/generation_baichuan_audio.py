"""Generation: plain text, or replies in which text and audio alternate (paper, section 3.2 and 3.3).

A reply alternates between two modes per row. Text mode samples from the LLM's text logits until the model asks for audio
(`audiogen_start`), a switch rule appends that token, or the reply ends. Audio mode samples frames from the audio head until the first
codebook gives its end-of-audio class; that step's token is `audiogen_end`, and text goes on. Rows of a batch are in different modes
at the same step; nothing a row does depends on the others.
"""

import copy
import time
from collections import deque
from dataclasses import dataclass

import torch
from transformers import CompileConfig, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor
from transformers.utils import ModelOutput

from .generation_reply import ReplyRow, ReplyRules, ReplySampler, ReplyStepper
from .generation_sampling import SamplingSettings, penalised
from .modeling_common import draw_seeds, pad_codes
from .streaming_baichuan_audio import CROSS_FADE_SECONDS, AudioStreamer, ReplyStream, SpeechWorker


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
    # Text tokens (punctuation) after which the reply switches to audio; `BaichuanAudioProcessor.audio_switch_token_ids`. None of them,
    # where a checkpoint says so with an empty list or does not say.
    "audio_switch_token_ids": None,
}


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
        timings (`list` of `dict`): per row, seconds of its batch: prefill, decoding, in it the LLM's steps (`language_seconds`) and the
            frames (`audio_head_seconds`), and waveforms after it; and the row's own number of steps. With a streamer also the thread's
            `flow_seconds` and `vocoder_seconds` and the row's `first_sound_seconds` (None without sound), `audio_seconds` of sound, and
            `real_time_factor`, seconds of work for each of them.
    """

    sequences: torch.LongTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio: list[torch.FloatTensor] | None = None
    segments: list[list[dict]] | None = None
    timings: list[dict[str, float]] | None = None


class PaddedRepetitionPenalty(LogitsProcessor):
    """Repetition penalty that leaves out the padding of the prompt, so that a row in a batch equals the row alone."""

    def __init__(self, penalty: float, prompt_mask: torch.Tensor):
        self.penalty, self.prompt_mask = penalty, prompt_mask.bool()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        counted[:, : self.prompt_mask.shape[1]] = self.prompt_mask
        seen = torch.zeros_like(scores).scatter_add(1, input_ids, counted.to(scores.dtype)) > 0
        return penalised(scores, seen, self.penalty)


def join_waveforms(pieces: list[torch.Tensor], sampling_rate: int) -> torch.Tensor:
    """Joins (samples,) pieces with linear cross-fades of 10 ms; shorter where a piece is shorter."""
    joined = pieces[0]
    for piece in pieces[1:]:
        overlap = min(round(CROSS_FADE_SECONDS * sampling_rate), len(joined), len(piece))
        ramp = torch.linspace(0, 1, overlap, device=piece.device)
        middle = joined[len(joined) - overlap :] * (1 - ramp) + piece[:overlap] * ramp
        joined = torch.cat([joined[: len(joined) - overlap], middle, piece[overlap:]])
    return joined


class BaichuanAudioGenerationMixin(GenerationMixin):
    """`generate` for text and for spoken replies."""

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, audio_codes=None, **kwargs):
        # `generate` takes `inputs_embeds` only where it finds the name in this signature.
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
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
            streamer (*optional*): audio mode: an [`AudioStreamer`], which gets text and sound as they are made; see `stream`.
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
            settings = self.generation_config if generation_config is None else generation_config
            if kwargs.get("prefill_chunk_size", settings.prefill_chunk_size) is not None and audio_codes is not None:
                # The chunks come without their place in the prompt, and with it their frames.
                raise ValueError("`prefill_chunk_size` cannot cut prompts with audio into chunks: leave it out.")
            if seed is None:
                return super().generate(inputs, generation_config, **kwargs)
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(draw_seeds(seed, 1)[0])
                return super().generate(inputs, generation_config, **kwargs)

        if output_audio is not False:
            self.require_vocoder()
        if input_ids is None:
            raise ValueError("Spoken replies need `input_ids`.")
        streamer = kwargs.pop("streamer", None)
        if streamer is not None and (not isinstance(streamer, AudioStreamer) or output_audio is False):
            raise ValueError(
                f"Spoken replies stream to an `AudioStreamer`, with sound, got {type(streamer).__name__} and {output_audio=}."
            )
        refused = [
            name
            for name in ("assistant_model", "past_key_values", "logits_processor", "prefix_allowed_tokens_fn")
            if kwargs.get(name) is not None
        ]
        if refused:
            raise ValueError(f"Spoken replies do not take {', '.join(f'`{name}`' for name in refused)}.")
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            set_generation_defaults(generation_config, text=False)
        kwargs["use_cache"] = True

        def decode(model, input_ids, generation_config, stopping_criteria, logits_processor=None, **model_kwargs):
            speaks = output_audio is not False
            return self._generate_reply(
                input_ids, generation_config, stopping_criteria, seed, forced_text_ids, speaks, model_kwargs, streamer
            )

        return super().generate(inputs, generation_config, custom_generate=decode, **kwargs)

    def _generate_reply(
        self, input_ids, generation_config, stopping_criteria, seed, forced_text_ids, output_audio, model_kwargs, streamer=None
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
        compile_config = None
        if self._valid_auto_compile_criteria(model_kwargs, generation_config):
            compile_config = generation_config.compile_config or CompileConfig(fullgraph=True)
        sampler = ReplySampler(self, rows, settings, bool(generation_config.do_sample), draw_seeds(seed, batch), compile_config)
        sampler.start(input_ids, model_kwargs.get("attention_mask"), generation_config.suppress_tokens)
        pad = generation_config._pad_token_tensor
        pad = self.config.audiotext_pad_token_id if pad is None else int(pad)

        started = time.perf_counter()
        step = ReplyStepper(self, input_ids, model_kwargs, compile_config)
        worker = None if streamer is None else SpeechWorker(self, streamer, rows, sampler.seeds)
        try:
            hidden = step.prefill()
            prefilled, sequences = time.perf_counter(), input_ids
            while streamer is None or not streamer.cancelled:
                tokens, codes = sampler.step(hidden, pad)
                sequences = torch.cat([sequences, tokens[:, None]], dim=1)
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
            if worker is not None:
                audio = worker.finish()
            else:
                audio = self._reply_waveforms(rows, sampler.seeds) if output_audio else None
        except BaseException as error:
            if worker is not None:
                worker.abandon()
                streamer.end(error)
            raise
        seconds = {
            "prefill_seconds": prefilled - started,
            "decode_seconds": decoded - prefilled,
            "language_seconds": step.watch.seconds(),
            "audio_head_seconds": sampler.watch.seconds(),
            "waveform_seconds": time.perf_counter() - decoded,
        }
        timings = [{**seconds, "steps": row.steps} for row in rows]
        if worker is not None:
            for index, timing in enumerate(timings):
                timing |= worker.timings(index)
            streamer.end()
        return BaichuanAudioGenerateOutput(
            sequences=sequences,
            audio_codes=self._reply_codes(rows),
            audio=audio,
            segments=[row.segments for row in rows],
            timings=timings,
        )

    def stream(
        self,
        latency: str = "exact",
        tokenizer=None,
        num_steps: int | None = None,
        guidance: float | None = None,
        **options,
    ) -> ReplyStream:
        """
        A spoken reply as it is made: an iterator over [`StreamEvent`]s, pieces of text and of waveform of every row, in the order in
        which they become ready. The LLM and the making of sound run in threads of their own.

        ```python
        for event in model.stream(**inputs, tokenizer=processor.tokenizer, latency="low_latency"):
            print(event.text, end="") if event.waveform is None else speaker.write(event.waveform.numpy())
        ```

        Args:
            latency: "exact": a piece of audio is heard when it is complete, and sounds as without streaming. "low_latency": sound
                begins with the first frames of a piece, and differs a little.
            tokenizer (*optional*): turns token ids into the events' `text`.
            num_steps, guidance (*optional*): of the flow-matching solver.
            options: as `generate` takes them, but for `generation_mode`, `output_audio` and `streamer`.

        Returns:
            [`ReplyStream`]: close it, or leave its `with` block, to end the reply early; `output` is `generate`'s at the end.

        Raises:
            ValueError: an unknown `latency`, no vocoder; what `generate` refuses is raised by the first step of the iteration.
        """
        self.require_vocoder()
        streamer = AudioStreamer(tokenizer, latency, num_steps, guidance)
        return ReplyStream(self.generate, streamer, {**options, "generation_mode": "audio"})

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
        return pad_codes(joined)

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


__all__ = ["BaichuanAudioGenerateOutput", "BaichuanAudioGenerationMixin", "join_waveforms"]
