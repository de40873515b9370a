"""Cutting spoken text and its audio at punctuation, by timestamps: pieces as generation alternates them."""

import bisect
from dataclasses import replace

import numpy as np

from ..processors.processing_baichuan_audio import split_speech_text
from .rows import AudioReader, BrokenRow, Row, Segment, Turn


def cut_times(text: str, timestamps: list[tuple[str, float, float]]) -> list[tuple[int, float]]:
    """
    Where a spoken text is cut: after the punctuation that `split_speech_text` cuts at, between two timestamps.

    Args:
        text: what is spoken. timestamps: `(text, start, end)` in seconds, of all its words or phrases in order.

    Returns:
        `(characters, seconds)` of every cut: the length of the text before it, and the middle of the pause there. Punctuation inside
        a timestamp is no cut.

    Raises:
        BrokenRow: timestamps that are not in order or that do not spell the text.
    """
    starts, ends, position, previous = [], [], 0, 0.0
    for word, start, end in timestamps:
        found = text.find(word.strip(), position)
        if not word.strip() or found < 0 or any(character.isalnum() for character in text[position:found]):
            raise BrokenRow(
                "bad_timestamps", f"The timestamps do not spell the text: no {word!r:.40} after {text[:position]!r:.80}."
            )
        if not previous <= start <= end:
            raise BrokenRow("bad_timestamps", f"The timestamp of {word!r:.40} ({start} to {end} s) is out of order.")
        position, previous = found + len(word.strip()), start
        starts.append(found)
        ends.append(position)
    if any(character.isalnum() for character in text[position:]):
        raise BrokenRow("bad_timestamps", f"The timestamps end before {text[position:]!r:.80}.")
    cuts, characters = [], 0
    for piece in split_speech_text(text)[:-1]:
        characters += len(piece)
        after = bisect.bisect_left(starts, characters)  # the first timestamp that begins behind the cut
        if 0 < after < len(starts) and ends[after - 1] <= characters:
            cuts.append((characters, (timestamps[after - 1][2] + timestamps[after][1]) / 2))
    return cuts


def cut_speech(text: Segment, audio: Segment, reader: AudioReader) -> list[Segment]:
    """
    One text and its audio -> text, audio, text, audio, ...; as they are without timestamps, or where there is nothing to cut.

    Pieces too short for a code frame stay with the piece after them (the last with the one before).

    Raises:
        BrokenRow: timestamps that do not fit.
    """
    if audio.timestamps is None:
        return [text, audio]
    is_codes = audio.codes is not None
    rate = reader.frame_rate if is_codes else reader.feature_extractor.sampling_rate
    total = audio.codes.shape[1] if is_codes else len(audio.waveform)
    # One frame of tolerance: timestamps often count the last, dropped, remainder of a recording.
    if audio.timestamps[-1][2] > total / rate + 1 / reader.frame_rate:
        raise BrokenRow(
            "bad_timestamps", f"The timestamps end at {audio.timestamps[-1][2]} s, the audio at {total / rate:.2f} s."
        )

    def frames(first: int, last: int) -> int:
        return last - first if is_codes else reader.count_frames(last - first)

    borders = [(0, 0)]
    for characters, seconds in cut_times(text.text, audio.timestamps):
        place = min(round(seconds * rate), total)
        if frames(borders[-1][1], place) > 0:
            borders.append((characters, place))
    if len(borders) > 1 and frames(borders[-1][1], total) < 1:
        borders.pop()
    borders.append((len(text.text), total))
    pieces = []
    for (first_character, first), (last_character, last) in zip(borders, borders[1:]):
        sound = {
            "codes": np.ascontiguousarray(audio.codes[:, first:last]) if is_codes else None,
            "waveform": None if is_codes else audio.waveform[first:last],
            "num_frames": frames(first, last),
        }
        pieces += [replace(text, text=text.text[first_character:last_character]), replace(audio, timestamps=None, **sound)]
    return pieces


def cut_row(row: Row, reader: AudioReader) -> Row:
    """Cuts the spoken pieces of an "itts" row and of assistant turns; other audio, whose text is not spoken by the model, is left."""
    turns = []
    for turn in row.turns:
        if row.task != "itts" and turn.role != "assistant":
            turns.append(turn)
            continue
        segments: list[Segment] = []
        for segment in turn.segments:
            if segment.is_text or not segments[-1].is_text:
                segments.append(segment)
            else:
                segments += cut_speech(segments.pop(), segment, reader)
        turns.append(Turn(turn.role, segments))
    return replace(row, turns=turns)
