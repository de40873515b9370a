"""Prompts of text and speech -> model inputs: chat template, transcription and speech requests, audio placeholders."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AudioKwargs, BatchFeature, ProcessingKwargs, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import is_soundfile_available


if is_soundfile_available():
    import soundfile


SPECIAL_TOKENS = {
    name: f"<{name}_baichuan>"
    for name in (
        "audio_start",
        "audio_end",
        "audio_pad",
        "audio_delim",
        "audiotext_start",
        "audiotext_end",
        "audiotext_pad",
        "audiogen_start",
        "audiogen_end",
    )
}
SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN = "<B_SYS>", "<C_Q>", "<C_A>"

# Speech of a user stands between audio_start and audio_end, spoken replies between audiogen_start and audiogen_end. In speech mode
# (`speech=True`) audiotext_start comes directly before every assistant token.
CHAT_TEMPLATE = """\
{%- set speech = speech | default(false) -%}
{%- set reply = ('<audiotext_start_baichuan>' if speech else '') ~ '<C_A>' -%}
{%- macro parts(content, before, after) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{- part.text -}}
{%- elif part.type == 'audio' -%}{{- before ~ '<audio_pad_baichuan>' ~ after -}}
{%- else -%}{{- raise_exception('Content parts are of type "text" or "audio", got "' ~ part.type ~ '".') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- '<B_SYS>' ~ parts(message.content, '<audio_start_baichuan>', '<audio_end_baichuan>') -}}
{%- elif message.role == 'user' -%}
{{- '<C_Q>' ~ parts(message.content, '<audio_start_baichuan>', '<audio_end_baichuan>') -}}
{%- elif message.role == 'assistant' -%}
{{- reply -}}
{%- generation -%}{{- parts(message.content, '<audiogen_start_baichuan>', '<audiogen_end_baichuan>') -}}{%- endgeneration -%}
{%- else -%}{{- raise_exception('Roles are "system", "user" and "assistant", got "' ~ message.role ~ '".') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- reply -}}{%- endif -%}
"""
TRANSCRIPTION_PROMPT = "将语音转录为文本:"
DEFAULT_VOICE_PROMPT = "请用【邻家女声】这个声音回答问题。"
# Where spoken text may be cut into pieces, and how long a piece must be before it is.
_PIECE_ENDS = ":,;!?，。；：！？"
_PIECE_LENGTH = 10
# Endings of text tokens after which the original demo switches a spoken reply to audio.
_SWITCH_ENDINGS = (",", "!", "?", "，", "。", "！", "？", ". ")


class AudioCodes(np.ndarray):
    """An int64 `(num_codebooks, frames)` array that stands for earlier speech in place of a waveform."""

    @classmethod
    def read(cls, codes: Any) -> "AudioCodes":
        try:
            codes = np.asarray(codes.cpu() if isinstance(codes, torch.Tensor) else codes)
        except ValueError as error:
            raise ValueError("`audio_codes` of one audio must be a regular array; its rows have different lengths.") from error
        if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.size == 0 or codes.min() < 0:
            raise ValueError(
                "`audio_codes` of one audio must be non-negative integers of shape (num_codebooks, frames), "
                f"got {codes.dtype} of shape {codes.shape}."
            )
        return codes.astype(np.int64).view(cls)


def split_speech_text(text: str) -> list[str]:
    """Cuts a text to be spoken after punctuation into pieces of more than 10 characters (the last may be shorter)."""
    pieces, piece = [], ""
    for part in re.split(f"(?<=[{_PIECE_ENDS}])", text):
        piece += part
        if len(piece) > _PIECE_LENGTH and piece[-1] in _PIECE_ENDS:
            pieces.append(piece)
            piece = ""
    return pieces + [piece] if piece.strip() else pieces


class BaichuanAudioAudioKwargs(AudioKwargs, total=False):
    """Options of the audio part: `sampling_rate` of raw samples, in Hz."""


_TEXT_DEFAULTS = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


class BaichuanAudioProcessorKwargs(ProcessingKwargs, total=False):
    audio_kwargs: BaichuanAudioAudioKwargs
    _defaults = {"text_kwargs": _TEXT_DEFAULTS}  # where older releases of transformers look for them


class BaichuanAudioProcessor(ProcessorMixin):
    r"""
    Tokenizer and feature extractor behind one interface.

    Args:
        feature_extractor ([`BaichuanAudioFeatureExtractor`]).
        tokenizer: the checkpoint's tokenizer; it must know the special tokens of Baichuan-Audio.
        chat_template (`str`, *optional*): Jinja template; the original's layout by default.

    Raises:
        ValueError: the tokenizer lacks special tokens; the message lists them.
    """

    valid_processor_kwargs = BaichuanAudioProcessorKwargs
    _auto_class = "AutoProcessor"  # saving copies the code files
    text_kwargs = _TEXT_DEFAULTS

    def __init__(self, feature_extractor, tokenizer, chat_template=None):
        vocabulary = tokenizer.get_vocab()
        needed = [*SPECIAL_TOKENS.values(), SYSTEM_TOKEN, USER_TOKEN, ASSISTANT_TOKEN]
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise ValueError(f"The tokenizer lacks the special tokens {', '.join(missing)}.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or "<|endoftext|>"
        # Replies follow the prompt. Pipelines pad with the tokenizer's own setting, so it has to be saved with it.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self.audio_token = SPECIAL_TOKENS["audio_pad"]
        self.audio_token_id = vocabulary[self.audio_token]
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_frames"]

    def save_pretrained(self, save_directory, **kwargs):
        """See [`~transformers.ProcessorMixin.save_pretrained`]."""
        saved = super().save_pretrained(save_directory, **kwargs)
        self.__dict__.pop("auto_map", None)  # saving leaves its own note of the code files behind
        return saved

    def audio_switch_token_ids(self) -> list[int]:
        """Ids of the text tokens that end in punctuation, for `generate(audio_switch_token_ids=...)`."""
        pieces = self.tokenizer.batch_decode([[index] for index in range(len(self.tokenizer))])
        return [index for index, piece in enumerate(pieces) if piece.endswith(_SWITCH_ENDINGS)]

    def _read_audio(self, audio: Any, sampling_rate: int | None) -> np.ndarray:
        if isinstance(audio, AudioCodes):
            return audio
        if isinstance(audio, dict) and audio.get("audio_codes") is not None:
            return AudioCodes.read(audio["audio_codes"])
        return self.feature_extractor.read_audio(audio, sampling_rate)

    def _num_frames(self, audio: np.ndarray) -> int:
        if isinstance(audio, AudioCodes):
            return audio.shape[1]
        return sum(self.feature_extractor.num_frames(len(piece)) for piece in self.feature_extractor.chunks(audio))

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        # Audio has been read by `__call__` already.
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        return images, text, videos, audio

    def _process_audio(self, audio: list[np.ndarray], **kwargs):
        waveforms = [item for item in audio if not isinstance(item, AudioCodes)]
        processed = self.feature_extractor(waveforms, return_tensors=kwargs.get("return_tensors")) if waveforms else {}
        processed["num_frames"] = [self._num_frames(item) for item in audio]
        return processed, [self.replace_audio_token(processed, index) for index in range(len(audio))]

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """What stands in the prompt for one audio: a token for each of its code frames."""
        return self.audio_token * audio_inputs["num_frames"][audio_idx]

    def _get_num_multimodal_tokens(self, audio_lengths: list[int] | None = None, **kwargs) -> MultiModalData:
        """Tokens that audios of these lengths, in samples at the feature extractor's rate, take in a prompt. Serving engines ask."""
        if audio_lengths is None:
            return MultiModalData()
        return MultiModalData(num_audio_tokens=[self._num_frames(np.zeros(length, dtype=np.float32)) for length in audio_lengths])

    def __call__(self, text: str | list[str] | None = None, audio: Any = None, **kwargs) -> BatchFeature:
        """
        Prompts and their audio -> model inputs.

        Args:
            text (`str` or `list[str]`): prompts, with one `<audio_pad_baichuan>` for each audio.
            audio (*optional*): one audio or a list, in the order of the placeholders over all prompts; each as
                [`BaichuanAudioFeatureExtractor.read_audio`] takes it, or `{"audio_codes": (num_codebooks, frames)}`.
            sampling_rate (`int`, *optional*): of raw samples, in Hz; 16000 by default. Files carry their own.
            return_tensors, padding, ...: as for tokenizers; `"pt"`, padded on the left, by default.

        Returns:
            `input_ids`, `attention_mask` (`(batch, time)`); `input_features` (`(chunks, 128, mel_frames)`) and `input_features_mask`
            when a waveform was given; `audio_codes` (`(batch, num_codebooks, frames)`, -1 for frames that come from
            `input_features` and past the end) when codes were given.

        Raises:
            ValueError: numbers of placeholders and audios that differ, or audio that cannot be used.
        """
        if text is None:
            raise ValueError("`text` is needed: a prompt with one <audio_pad_baichuan> for each audio.")
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")
        if audio is None:
            self._check_placeholders(prompts, None, kwargs)
            return super().__call__(text=list(prompts), audio=None, **kwargs)
        rate = kwargs.pop("sampling_rate", None)
        nested = dict(kwargs.pop("audio_kwargs", None) or {})
        rate = nested.pop("sampling_rate", rate)
        single = self.feature_extractor._is_one_audio(audio)
        audio = [self._read_audio(item, rate) for item in ([audio] if single else audio)]
        self._check_placeholders(prompts, len(audio), kwargs)
        inputs = super().__call__(text=list(prompts), audio=audio, audio_kwargs=nested, **kwargs)
        if any(isinstance(item, AudioCodes) for item in audio):
            inputs["audio_codes"] = self._batch_codes(list(prompts), audio, like=inputs["input_ids"])
        return inputs

    def _check_placeholders(self, prompts: list[str], num_audios: int | None, kwargs: dict) -> None:
        """One placeholder for each audio. (transformers checks it too, but only its newer releases do.)"""
        if kwargs.get(
            "sanitize_control_tokens"
        ):  # placeholders in the user's own text are marked, and transformers tells them apart
            return
        found = sum(prompt.count(self.audio_token) for prompt in prompts)
        if num_audios is None and found:
            raise ValueError(f"Found {found} {self.audio_token} tokens in the text but no audio inputs were passed.")
        if num_audios is not None and found != num_audios:
            raise ValueError(
                f"The number of {self.audio_token} tokens in the prompts should be the same as the number of audio inputs, "
                f"got {found} and {num_audios}."
            )

    def _batch_codes(self, prompts: list[str], audio: list[np.ndarray], like: Any):
        """Every audio frame of every prompt: its codes, or -1 where they are still to be computed from features."""
        counts = {item.shape[0] for item in audio if isinstance(item, AudioCodes)}
        if len(counts) != 1:
            raise ValueError(f"All `audio_codes` must have the same number of codebooks, got {sorted(counts)}.")
        codebooks, remaining, rows = counts.pop(), iter(audio), []
        for prompt in prompts:
            frames = [np.empty((codebooks, 0), dtype=np.int64)]
            for item in (next(remaining) for _ in range(prompt.count(self.audio_token))):
                unknown = not isinstance(item, AudioCodes)
                frames.append(np.full((codebooks, self._num_frames(item)), -1) if unknown else np.asarray(item))
            rows.append(np.concatenate(frames, axis=1))
        batch = np.full((len(rows), codebooks, max(row.shape[1] for row in rows)), -1, dtype=np.int64)
        for target, row in zip(batch, rows):
            target[:, : row.shape[1]] = row
        if isinstance(like, torch.Tensor):
            return torch.from_numpy(batch)
        return batch if isinstance(like, np.ndarray) else batch.tolist()

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        Renders and (with `tokenize=True`) encodes one conversation or a list; see [`~transformers.ProcessorMixin.apply_chat_template`].

        A part of a message's content is `{"type": "text", "text": ...}` or `{"type": "audio", ...}` with the audio under `"audio"`,
        `"path"`, `"url"` or `"base64"`, or earlier speech as `"audio_codes"`. `speech=True` asks for a spoken reply.

        Raises:
            ValueError: no message, an audio part without audio, a text part without text, or audio that cannot be used.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        if not all(conversations):
            raise ValueError("`conversation` must hold at least one message.")
        # A copy: the base class writes into it. Audio is at the feature extractor's rate once read, so the rate ends here.
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        for name in ("audio_kwargs", "sampling_rate"):
            if name in kwargs:
                options.setdefault(name, kwargs.pop(name))
        nested = dict(options.pop("audio_kwargs", None) or {})
        rate = nested.pop("sampling_rate", options.pop("sampling_rate", None))
        kwargs["processor_kwargs"] = options | ({"audio_kwargs": nested} if nested else {})
        read = [[self._read_message(message, rate, kwargs.get("tokenize", False)) for message in one] for one in conversations]
        return super().apply_chat_template(read if batched else read[0], chat_template, **kwargs)

    def _read_message(self, message: dict, rate: int | None, read: bool) -> dict:
        if not isinstance(message, dict):
            raise ValueError(f'A message must be a dict with "role" and "content", got {type(message).__name__}.')
        if not isinstance(message.get("content"), (list, tuple)):
            return message
        content = []
        for part in message["content"]:
            if not isinstance(part, dict) or "type" not in part:
                got = f"the keys {sorted(map(str, part))}" if isinstance(part, dict) else type(part).__name__
                raise ValueError(f'A part of a message must be a dict with a "type", got {got}.')
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f'A text part needs a string under "text", got {part.get("text")!r}.')
            if part["type"] == "audio" and read:
                sources = [key for key in ("audio", "path", "url", "base64", "audio_codes") if part.get(key) is not None]
                if len(sources) != 1:
                    raise ValueError(
                        'An audio part needs exactly one of "audio", "path", "url", "base64" and "audio_codes", '
                        f"got {sources or sorted(part)}."
                    )
                source = part[sources[0]]
                source = {"audio_codes": source} if sources[0] == "audio_codes" else source
                part = {"type": "audio", "audio": self._read_audio(source, rate)}
            content.append(part)
        return {**message, "content": content}

    def apply_transcription_request(self, audio: Any, prompt: str = TRANSCRIPTION_PROMPT, **kwargs) -> BatchFeature:
        """
        Inputs that ask for the text of each audio: `model.generate(**inputs, do_sample=False)`.

        Args:
            audio: one audio or a list; see `__call__`.
            prompt (`str`): the instruction before the audio; the original's by default.
        """
        single = self.feature_extractor._is_one_audio(audio)
        audio = [audio] if single else list(audio)
        text = prompt + SPECIAL_TOKENS["audio_start"] + self.audio_token + SPECIAL_TOKENS["audio_end"]
        return self(text=[text] * len(audio), audio=audio, **kwargs)

    def apply_tts_request(self, text: str | list[str], **kwargs) -> BatchFeature:
        """
        Inputs that ask for texts to be spoken: `model.generate(**inputs, generation_mode="audio")`.

        A text is cut after punctuation. The prompt is its first piece and `audiogen_start`; `forced_text_ids` are the pieces that
        are fed, one after the other, once the piece before has been spoken.

        Raises:
            ValueError: a text without anything to speak.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r}.")
        pieces = [split_speech_text(item) for item in texts]
        if not all(pieces):
            raise ValueError(f"There is nothing to speak in {texts[[bool(piece) for piece in pieces].index(False)]!r}.")
        inputs = self(text=[piece[0] + SPECIAL_TOKENS["audiogen_start"] for piece in pieces], **kwargs)
        inputs["forced_text_ids"] = [
            [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in piece[1:]] for piece in pieces
        ]
        return inputs

    def post_process_multimodal_output(self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs):
        """`generate`'s result -> a list of texts, or with `generation_mode="audio"` a list of float32 waveforms `(samples,)`."""
        if generation_mode not in (None, "text", "audio"):
            raise ValueError(f'`generation_mode` must be "text" or "audio", got {generation_mode!r}.')
        if generation_mode == "audio":
            waveforms = generated_outputs.get("audio") if isinstance(generated_outputs, dict) else None
            if waveforms is None:
                raise ValueError(
                    'There are no waveforms: call `generate` with `generation_mode="audio"`, not `output_audio=False`.'
                )
            return [waveform.float().cpu().numpy() for waveform in waveforms]
        sequences = getattr(generated_outputs, "sequences", generated_outputs)
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def save_audio(self, audio: Any, saving_path: str | Path | list, sampling_rate: int = 24000, **kwargs) -> None:
        """
        Writes waveforms to files; the format follows the ending.

        Args:
            audio: `(samples,)` arrays or tensors, one or a list. saving_path: one path for each.
            sampling_rate (`int`, defaults to 24000): Hz.

        Raises:
            ValueError: waveforms that are no waveforms (then nothing is written), or a file that cannot be written.
        """
        audios = list(audio) if isinstance(audio, (list, tuple)) else [audio]
        paths = list(saving_path) if isinstance(saving_path, (list, tuple)) else [saving_path]
        if len(audios) != len(paths):
            raise ValueError(f"{len(audios)} waveforms but {len(paths)} paths.")
        for samples, path in zip([self._checked_waveform(waveform) for waveform in audios], map(Path, paths)):
            part = path.with_name(f".{path.stem}.part{path.suffix}")
            try:
                soundfile.write(part, samples, sampling_rate, **kwargs)
                part.replace(path)
            except (soundfile.LibsndfileError, TypeError) as error:
                raise ValueError(f"{path} cannot be written: {error}") from error
            finally:
                part.unlink(missing_ok=True)

    @staticmethod
    def _checked_waveform(waveform: Any) -> np.ndarray:
        if isinstance(waveform, torch.Tensor):
            waveform = waveform.detach().cpu()
            waveform = waveform.float() if waveform.is_floating_point() else waveform
        samples = np.asarray(waveform)
        if samples.ndim != 1 or samples.size == 0:
            raise ValueError(f"A waveform must be (samples,) with samples, got shape {samples.shape}.")
        if samples.dtype.kind != "f" and samples.dtype not in (np.int16, np.int32):
            raise ValueError(f"A waveform must be float, int16 or int32, got {samples.dtype}.")
        if not np.isfinite(samples).all():
            raise ValueError("A waveform holds NaN or infinite samples.")
        return samples.astype(np.float32) if samples.dtype.kind == "f" else samples


__all__ = ["BaichuanAudioProcessor"]
