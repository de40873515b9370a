"""Training rows: one schema for every task (docs/data.md), checked, with their audio read."""

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile

from ..processors.processing_baichuan_audio import TRANSCRIPTION_PROMPT


# Why a row is left out, and what that says in a report.
REASONS = {
    "bad_row": "not of the documented schema",
    "unknown_task": "unknown task",
    "wrong_order": "segments or messages out of order for the task",
    "empty_text": "empty text",
    "special_token": "text that holds a special token",
    "missing_audio": "audio file missing",
    "unreadable_audio": "audio that cannot be decoded",
    "short_audio": "audio shorter than one code frame",
    "bad_codes": "audio codes of the wrong shape or out of range",
    "bad_timestamps": "timestamps that do not fit the text or the audio",
    "too_long": "too long",
}
PROMPTED_TASKS = ("asr", "aqa", "s2tt")
TASKS = (*PROMPTED_TASKS, "intlv", "tts", "itts", "audio", "chat")
_AUDIO_KEYS = ("audio", "path", "url", "base64")
_LONGEST_PATH = 1024


class BrokenRow(ValueError):
    """A row that cannot be trained on. `reason` is a key of `REASONS`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Segment:
    """
    A piece of text, or a piece of audio: not read yet (`source`), read (`waveform`), or already codes.

    Args:
        text: the text. source: audio in any packaging the feature extractor reads.
        waveform (`(samples,)` float32, at the reader's rate). codes (`(num_codebooks, frames)`, int64).
        timestamps: `(text, start, end)` of consecutive words or phrases, in seconds.
        num_frames: code frames of the audio once it is read.
    """

    text: str | None = None
    source: Any = None
    waveform: np.ndarray | None = None
    codes: np.ndarray | None = None
    timestamps: list[tuple[str, float, float]] | None = None
    num_frames: int = 0

    @property
    def is_text(self) -> bool:
        return self.text is not None


@dataclass
class Turn:
    """One message of a dialogue: `role` is "system", "user" or "assistant"; for the other tasks the one turn of a row has none."""

    role: str | None
    segments: list[Segment]


@dataclass
class Row:
    """A checked row. `speech` (chat): replies are spoken. `length`: tokens of its layout, where a data set has counted them."""

    task: str
    turns: list[Turn]
    prompt: str | None = None
    speech: bool = False
    length: int | None = None

    @property
    def segments(self) -> list[Segment]:
        return self.turns[0].segments

    def audio_segments(self) -> Iterator[Segment]:
        """The audio of the row in the order of its layout."""
        return (segment for turn in self.turns for segment in turn.segments if not segment.is_text)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BrokenRow("bad_row", f"{name} must be a string, got {type(value).__name__}.")
    if not value.strip():
        raise BrokenRow("empty_text", f"{name} is empty.")
    return value


def _timestamps(value: Any) -> list[tuple[str, float, float]] | None:
    if value is None or len(value) == 0:
        return None
    try:
        return [(str(stamp["text"]), float(stamp["start"]), float(stamp["end"])) for stamp in value]
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenRow("bad_timestamps", 'A timestamp needs "text", "start" and "end" (seconds).') from error


def _given(value: Any) -> bool:
    """Whether an entry holds anything: Parquet gives every row every key, and unused ones as null."""
    if isinstance(value, Mapping):  # an Audio feature without a file
        return any(item is not None for item in value.values())
    return value is not None


def _segment(part: Any) -> Segment:
    if not isinstance(part, Mapping):
        raise BrokenRow("bad_row", f"A segment must be a mapping, got {type(part).__name__}.")
    given = [key for key in ("text", "audio_codes", *_AUDIO_KEYS) if _given(part.get(key))]
    if len(given) != 1:
        raise BrokenRow(
            "bad_row", f'A segment needs exactly one of "text", "audio" and "audio_codes", got {given or sorted(map(str, part))}.'
        )
    value = part[given[0]]
    if given[0] == "text":
        return Segment(text=_text(value, "The text of a segment"))
    timestamps = _timestamps(part.get("timestamps"))
    if given[0] == "audio_codes":
        try:
            codes = np.asarray(value if isinstance(value, np.ndarray) else [list(row) for row in value])
        except (TypeError, ValueError) as error:
            raise BrokenRow("bad_codes", "`audio_codes` must be a regular (num_codebooks, frames) list of lists.") from error
        return Segment(codes=codes, timestamps=timestamps)
    return Segment(source=value, timestamps=timestamps)


def _list(raw: Mapping, name: str) -> list:
    value = raw.get(name)
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) == 0:
        raise BrokenRow("bad_row", f'A row of task "{raw["task"]}" needs a list under "{name}", got {value!r:.80}.')
    return list(value)


def _check_order(task: str, kinds: str) -> None:
    """`kinds`: one letter per segment, `t` for text and `a` for audio."""
    wanted = {"asr": "audio, text", "aqa": "audio, text", "s2tt": "audio, text", "tts": "text, audio", "audio": "one audio"}
    wanted |= {"intlv": "audio, text, audio, ...", "itts": "text, audio, text, audio, ..."}
    pairs = {"intlv": "at", "itts": "ta"}
    if task in pairs:
        right = len(kinds) > 1 and kinds == (pairs[task] * len(kinds))[: len(kinds)] and (task == "intlv" or len(kinds) % 2 == 0)
    else:
        right = kinds == {"tts": "ta", "audio": "a"}.get(task, "at")
    if not right:
        got = ", ".join("text" if kind == "t" else "audio" for kind in kinds)
        raise BrokenRow("wrong_order", f'Task "{task}" is {wanted[task]}; got {got}.')


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant"):
        got = message.get("role") if isinstance(message, Mapping) else type(message).__name__
        raise BrokenRow("bad_row", f'A message needs the role "system", "user" or "assistant", got {got!r}.')
    content = message.get("content")
    if isinstance(content, str):
        return Turn(message["role"], [Segment(text=_text(content, "The content of a message"))])
    if not isinstance(content, (list, tuple, np.ndarray)) or len(content) == 0:
        raise BrokenRow("bad_row", f"The content of a message must be a string or a list of parts, got {content!r:.80}.")
    segments: list[Segment] = []
    for part in content:
        segment = _segment(part)
        if part.get("type") not in (None, "text" if segment.is_text else "audio"):
            raise BrokenRow("bad_row", f"A part of type {part['type']!r} does not hold {'text' if segment.is_text else 'audio'}.")
        if segment.is_text and segments and segments[-1].is_text:  # the chat template joins them
            segments[-1] = Segment(text=segments[-1].text + segment.text)
        else:
            segments.append(segment)
    return Turn(message["role"], segments)


def _check_dialogue(turns: list[Turn], speech: bool) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BrokenRow("wrong_order", f"A dialogue is [system,] user, assistant, user, assistant, ...; got {', '.join(roles)}.")
    for segments in (turn.segments for turn in turns if turn.role == "assistant"):
        silent = [True, *(not segment.is_text for segment in segments)]
        if any(before and not segment.is_text for before, segment in zip(silent, segments)):
            raise BrokenRow("wrong_order", "Every audio of an assistant turn needs its text directly before it.")
        if not speech and any(not segment.is_text for segment in segments):
            raise BrokenRow("wrong_order", 'An assistant turn has audio although "speech" is false.')


def parse_row(raw: Any) -> Row:
    """
    Checks one row's structure; its audio is not touched.

    Args:
        raw: a mapping of the schema in docs/data.md. Keys that the schema does not have are ignored, null counts as absent.

    Raises:
        BrokenRow: not of the schema, an unknown task, segments out of order, an empty text.
    """
    if not isinstance(raw, Mapping):
        raise BrokenRow("bad_row", f"A row must be a mapping, got {type(raw).__name__}.")
    task = raw.get("task")
    if task not in TASKS:
        raise BrokenRow("unknown_task", f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    if task == "chat":
        turns = [_turn(message) for message in _list(raw, "messages")]
        speech = raw.get("speech")
        if not isinstance(speech, (bool, np.bool_, type(None))):
            raise BrokenRow("bad_row", f"`speech` must be true or false, got {speech!r}.")
        if speech is None:
            speech = any(turn.role == "assistant" and not segment.is_text for turn in turns for segment in turn.segments)
        _check_dialogue(turns, bool(speech))
        return Row(task, turns, speech=bool(speech))
    segments = [_segment(part) for part in _list(raw, "segments")]
    _check_order(task, "".join("t" if segment.is_text else "a" for segment in segments))
    prompt = raw.get("prompt")
    if task not in PROMPTED_TASKS and prompt is not None:
        raise BrokenRow("bad_row", f'Task "{task}" has no prompt, got {prompt!r:.80}.')
    if task in PROMPTED_TASKS:
        if prompt is None and task != "asr":
            raise BrokenRow("bad_row", f'Task "{task}" needs a prompt.')
        prompt = _text(TRANSCRIPTION_PROMPT if prompt is None else prompt, "The prompt")
    return Row(task, [Turn(None, segments)], prompt=prompt)


class AudioReader:
    """
    Reads and checks the audio of rows.

    Args:
        feature_extractor ([`BaichuanAudioFeatureExtractor`]): reads waveforms and counts frames.
        codebook_sizes: of the speech tokenizer.
    """

    def __init__(self, feature_extractor, codebook_sizes: list[int]):
        self.feature_extractor, self.codebook_sizes = feature_extractor, list(codebook_sizes)

    @property
    def frame_rate(self) -> float:
        """Code frames per second."""
        extractor = self.feature_extractor
        return extractor.sampling_rate / (extractor.hop_length * extractor.stride_size * extractor.downsample_factor)

    def count_frames(self, num_samples: int) -> int:
        """Code frames of `num_samples` samples at the feature extractor's rate; 0 where too short."""
        extractor = self.feature_extractor
        size = extractor.max_audio_seconds * extractor.sampling_rate
        whole, rest = divmod(num_samples, size)
        return whole * extractor.num_frames(size) + (extractor.num_frames(rest) if rest >= extractor.n_fft else 0)

    def _resolve(self, source: Any, root: Path | None) -> Any:
        """Finds files, so that a missing one is told from a broken one; returns what the feature extractor reads."""
        if isinstance(source, Mapping) and source.get("array") is None:
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if isinstance(source, os.PathLike):
            source = str(source)
        if not isinstance(source, str) or source.startswith(("http://", "https://")):
            return source
        try:
            if "://" in source:  # a file inside an archive or a store, as streamed data sets name them
                with fsspec.open(source, "rb") as file:
                    return file.read()
            is_path = len(source) < _LONGEST_PATH and not source.startswith("data:")
            path = Path(root or ".", source) if is_path else None
            if path is not None and not path.is_file():
                raise FileNotFoundError(path)
        except (FileNotFoundError, ValueError, OSError) as error:
            raise BrokenRow("missing_audio", f"Audio file {source:.200} does not exist.") from error
        return source if path is None else str(path)

    def read(self, segment: Segment, root: Path | None = None) -> Segment:
        """
        A copy of an audio segment with its waveform or its checked codes.

        Args:
            root: folder that relative paths start from.

        Raises:
            BrokenRow: missing, unreadable or too short audio, or codes of the wrong shape or out of range.
        """
        if segment.codes is not None:
            codes = self.check_codes(segment.codes)
            return replace(segment, codes=codes, num_frames=codes.shape[1])
        source = self._resolve(segment.source, root)
        try:
            waveform = self.feature_extractor.read_audio(source)
        except (ValueError, OSError, RuntimeError) as error:
            raise BrokenRow("unreadable_audio", str(error)) from error
        frames = self.count_frames(len(waveform))
        if frames == 0:
            raise BrokenRow("short_audio", f"Audio of {len(waveform)} samples is shorter than one code frame.")
        return replace(segment, source=None, waveform=waveform, num_frames=frames)

    def check_codes(self, codes: np.ndarray) -> np.ndarray:
        """Codes as int64 `(num_codebooks, frames)`.

        Raises:
            BrokenRow: another shape, no frame, or a code outside its codebook.
        """
        books = len(self.codebook_sizes)
        if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.shape[0] != books or codes.shape[1] == 0:
            raise BrokenRow("bad_codes", f"`audio_codes` must be integers ({books}, frames), got {codes.dtype} {codes.shape}.")
        if codes.min() < 0 or (codes.max(axis=1) >= self.codebook_sizes).any():
            raise BrokenRow("bad_codes", f"`audio_codes` must lie in codebooks of {self.codebook_sizes} entries.")
        return codes.astype(np.int64)

    def estimate(self, segment: Segment, root: Path | None = None) -> Segment:
        """As `read`, but files are not decoded: `num_frames` comes from the header, and may differ by one after resampling."""
        if segment.codes is not None:
            return self.read(segment, root)
        source = self._resolve(segment.source, root)
        if not isinstance(source, (str, bytes, bytearray)) or (isinstance(source, str) and not os.path.isfile(source)):
            return self.read(segment, root)
        try:
            header = soundfile.info(source if isinstance(source, str) else io.BytesIO(source))
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise BrokenRow("unreadable_audio", f"Audio {source!r:.80} cannot be decoded: {error}") from error
        samples = round(header.frames * self.feature_extractor.sampling_rate / header.samplerate)
        frames = self.count_frames(samples)
        if frames == 0:
            raise BrokenRow("short_audio", f"Audio of {samples} samples is shorter than one code frame.")
        return replace(segment, num_frames=frames)
