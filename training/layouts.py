"""Rows -> token layouts with labels (paper, section 3.3 and MODEL facts of training): what the LLM sees, and what it is to predict."""

from dataclasses import dataclass

import numpy as np

from ..processors.processing_baichuan_audio import ASSISTANT_TOKEN, SPECIAL_TOKENS, SYSTEM_TOKEN, USER_TOKEN
from .rows import PROMPTED_TASKS, BrokenRow, Row, Segment


IGNORED = -100


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens that layouts use."""

    audio_start: int
    audio_end: int
    audio_pad: int
    audiotext_start: int
    audiogen_start: int
    audiogen_end: int
    system: int
    user: int
    assistant: int
    end_of_text: int

    @classmethod
    def from_tokenizer(cls, tokenizer, end_of_text: int | None = None) -> "TokenIds":
        """
        Args:
            tokenizer: of a Baichuan-Audio checkpoint. end_of_text (`int`, *optional*): ends a reply; by default `<|endoftext|>`
                (whatever the tokenizer calls its end token), or the tokenizer's own end token where it has none of that name.

        Raises:
            ValueError: the tokenizer lacks a special token.
        """
        vocabulary = tokenizer.get_vocab()
        strings = {name: SPECIAL_TOKENS[name] for name in cls.__dataclass_fields__ if name in SPECIAL_TOKENS}
        strings |= {"system": SYSTEM_TOKEN, "user": USER_TOKEN, "assistant": ASSISTANT_TOKEN}
        missing = [token for token in strings.values() if token not in vocabulary]
        if end_of_text is None:
            end_of_text = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
        if missing or end_of_text is None:
            raise ValueError(f"The tokenizer lacks {', '.join(missing) or 'an end-of-text token'}.")
        return cls(**{name: vocabulary[token] for name, token in strings.items()}, end_of_text=end_of_text)


@dataclass
class Layout:
    """
    One sample as the LLM reads it. Labels are aligned with `input_ids` (the model shifts them) and -100 where nothing is learnt.

    Args:
        input_ids (`(time,)`, int64): with one audio token for each frame.
        labels (`(time,)`, int64): text targets.
        audio_codes (`(num_codebooks, frames)`, int64): the code frames of the audio tokens, in order.
        audio_labels (`(num_codebooks, time)`, int64): at a learnt audio token its frame; at the `audiogen_end` of learnt audio the
            end-of-audio class (`codebook_sizes[0]`) for the first codebook.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    audio_codes: np.ndarray
    audio_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Span:
    """A run of tokens. With `audio`, its frames stand at the tokens between the first and the last."""

    ids: list[int]
    labels: list[int]
    audio: Segment | None = None
    learnt: bool = False


class LayoutBuilder:
    """
    Args:
        tokenizer: of the checkpoint. tokens ([`TokenIds`]): its special tokens. codebook_sizes: of the speech tokenizer.
    """

    def __init__(self, tokenizer, tokens: TokenIds, codebook_sizes: list[int]):
        self.tokenizer, self.tokens, self.codebook_sizes = tokenizer, tokens, list(codebook_sizes)
        self._reserved = {getattr(tokens, name) for name in tokens.__dataclass_fields__} | set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab()
        self._reserved |= {vocabulary[token] for token in SPECIAL_TOKENS.values() if token in vocabulary}

    def _text(self, text: str, learnt: bool) -> _Span:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise BrokenRow("empty_text", f"The text {text!r:.40} has no token.")
        if not self._reserved.isdisjoint(ids):
            raise BrokenRow("special_token", f"The text {text!r:.80} holds a special token.")
        return _Span(ids, list(ids) if learnt else [IGNORED] * len(ids))

    def _special(self, *ids: int, learnt: bool = False) -> _Span:
        return _Span(list(ids), list(ids) if learnt else [IGNORED] * len(ids))

    def _heard(self, segment: Segment) -> _Span:
        """Speech that the model understands."""
        ids = [self.tokens.audio_start, *[self.tokens.audio_pad] * segment.num_frames, self.tokens.audio_end]
        return _Span(ids, [IGNORED] * len(ids), audio=segment)

    def _spoken(self, segment: Segment) -> _Span:
        """Speech that the model learns to generate: the switch to audio is a text target, frames and their end are audio targets."""
        ids = [self.tokens.audiogen_start, *[self.tokens.audio_pad] * segment.num_frames, self.tokens.audiogen_end]
        return _Span(ids, [ids[0], *[IGNORED] * (len(ids) - 1)], audio=segment, learnt=True)

    def _spans(self, row: Row) -> list[_Span]:
        if row.task == "chat":
            return self._dialogue(row)
        segments, end = row.segments, self._special(self.tokens.end_of_text, learnt=True)
        if row.task in PROMPTED_TASKS:
            return [self._text(row.prompt, False), self._heard(segments[0]), self._text(segments[1].text, True), end]
        if row.task == "intlv":
            spans = [self._text(part.text, True) if part.is_text else self._heard(part) for part in segments]
            return [*spans, end] if segments[-1].is_text else spans
        spans = [self._text(part.text, index > 0) if part.is_text else self._spoken(part) for index, part in enumerate(segments)]
        # After the last audio of "itts" it is text's turn to say that nothing follows; one pair of "tts" is not a whole reply.
        return [*spans, end] if row.task == "itts" else spans

    def _dialogue(self, row: Row) -> list[_Span]:
        tokens = self.tokens
        openings = {"system": [tokens.system], "user": [tokens.user], "assistant": [tokens.assistant]}
        if row.speech:
            openings["assistant"] = [tokens.audiotext_start, tokens.assistant]
        spans: list[_Span] = []
        for index, turn in enumerate(row.turns):
            opening, is_reply = self._special(*openings[turn.role]), turn.role == "assistant"
            if index and row.turns[index - 1].role == "assistant":
                # Prompts hold earlier replies without their end-of-text: what a reply is to end with is predicted where the next
                # turn begins.
                opening.labels[0] = tokens.end_of_text
            spans.append(opening)
            for part in turn.segments:
                if part.is_text:
                    spans.append(self._text(part.text, is_reply))
                else:
                    spans.append(self._spoken(part) if is_reply else self._heard(part))
        return [*spans, self._special(tokens.end_of_text, learnt=True)]

    def length(self, row: Row) -> int:
        """Tokens of a row's layout. Audio needs its number of frames only.

        Raises:
            BrokenRow: text without tokens or with special tokens.
        """
        return sum(len(span.ids) for span in self._spans(row))

    def build(self, row: Row, codes: list[np.ndarray] | None = None) -> Layout:
        """
        Args:
            row: as `rows.parse_row` and the readers give it.
            codes (`list` of `(num_codebooks, frames)`, *optional*): of every audio segment in order; the segments' own by default.

        Raises:
            BrokenRow: text without tokens or with special tokens.
            ValueError: audio without codes, or with another number of frames than the segment says.
        """
        segments = list(row.audio_segments())
        codes = [segment.codes for segment in segments] if codes is None else codes
        for segment, frames in zip(segments, codes, strict=True):
            if frames is None or frames.shape != (len(self.codebook_sizes), segment.num_frames):
                got = None if frames is None else frames.shape
                raise ValueError(f"An audio of {segment.num_frames} frames needs as many code frames, got {got}.")
        spans, remaining = self._spans(row), iter(codes)
        input_ids = np.array([token for span in spans for token in span.ids], dtype=np.int64)
        labels = np.array([label for span in spans for label in span.labels], dtype=np.int64)
        labels[0] = IGNORED  # nothing comes before it
        audio_labels = np.full((len(self.codebook_sizes), len(input_ids)), IGNORED, dtype=np.int64)
        position = 0
        for span in spans:
            last = position + len(span.ids) - 1
            if span.audio is not None:
                frames = next(remaining)
                if span.learnt:
                    audio_labels[:, position + 1 : last] = frames
                    audio_labels[0, last] = self.codebook_sizes[0]
            position = last + 1
        empty = np.empty((len(self.codebook_sizes), 0), dtype=np.int64)
        return Layout(input_ids, labels, np.concatenate([empty, *codes], axis=1).astype(np.int64), audio_labels)
