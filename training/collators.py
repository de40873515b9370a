"""Rows -> batches for the LLM: audio tokenised where it is not yet, layouts, padding on the right or packing."""

from typing import Any

import numpy as np
import torch

from .audio_codes import AudioCodeEncoder
from .layouts import IGNORED, Layout, LayoutBuilder
from .rows import Row


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Which samples share a row: each goes into the first row with room for it.

    Returns:
        Indices of the samples of every row, in order; at most `capacity` tokens a row.

    Raises:
        ValueError: a sample longer than `capacity`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"A sample of {length} tokens does not fit into a packed row of {capacity}: skip longer rows.")
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


def join(layouts: list[Layout]) -> Layout:
    """Layouts one after the other. Each begins with an ignored label, so no target is predicted across a border."""
    parts = ([getattr(layout, name) for layout in layouts] for name in ("input_ids", "labels", "audio_codes", "audio_labels"))
    return Layout(*(np.concatenate(part, axis=-1) for part in parts))


class SpeechCollator:
    """
    A list of rows -> one batch of the LLM's inputs.

    Args:
        builder ([`LayoutBuilder`]).
        pad_token_id (`int`): fills rows up; ignored by attention and loss.
        encoder ([`AudioCodeEncoder`], *optional*): for rows whose audio is not tokenised yet.
        pack_tokens (`int`, *optional*): pack the batch's samples into as few rows of at most so many tokens as fit in order,
            without attention from one to another.

    Raises:
        ValueError: a padding token that stands for audio.
    """

    def __init__(
        self,
        builder: LayoutBuilder,
        pad_token_id: int,
        encoder: AudioCodeEncoder | None = None,
        pack_tokens: int | None = None,
    ):
        if pad_token_id is None or pad_token_id == builder.tokens.audio_pad:
            raise ValueError(f"`pad_token_id` must be a token that is not the audio token, got {pad_token_id}.")
        if pack_tokens is not None and pack_tokens < 1:
            raise ValueError(f"`pack_tokens` must be at least 1, got {pack_tokens}.")
        self.builder, self.pad_token_id, self.encoder, self.pack_tokens = builder, pad_token_id, encoder, pack_tokens

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """
        Returns:
            `input_ids`, `labels` (`(batch, time)`, int64); `audio_labels` (`(batch, num_codebooks, time)`); `audio_codes`
            (`(batch, num_codebooks, frames)`, -1 past a row's last frame) where a row has audio; `attention_mask` (`(batch, time)`).
            Packed: instead of the mask, `position_ids` (`(batch, time)`) that begin again with every sample, and
            `use_cache=False`; from these transformers makes attention masks per sample (a cache, or a mask of padding, would make it
            take a row for one sequence).

        Raises:
            ValueError: audio that is not tokenised and no `encoder`, or a sample longer than `pack_tokens`.
        """
        if self.encoder is not None:
            codes = self.encoder.encode_rows(rows)
        elif any(segment.codes is None for row in rows for segment in row.audio_segments()):
            raise ValueError("Rows hold waveforms: give the collator an `encoder`, or tokenise the data beforehand.")
        else:
            codes = [None] * len(rows)
        layouts = [self.builder.build(row, frames) for row, frames in zip(rows, codes)]
        if self.pack_tokens is None:
            groups = [[layout] for layout in layouts]
        else:
            packed = pack([len(layout) for layout in layouts], self.pack_tokens)
            groups = [[layouts[index] for index in group] for group in packed]
        return self._batch(groups)

    def _batch(self, groups: list[list[Layout]]) -> dict[str, Any]:
        rows = [join(group) for group in groups]
        time, frames = max(map(len, rows)), max(row.audio_codes.shape[1] for row in rows)

        def padded(name: str, size: int, value: int) -> torch.LongTensor:
            parts = [getattr(row, name) for row in rows]
            widths = [[(0, 0)] * (part.ndim - 1) + [(0, size - part.shape[-1])] for part in parts]
            return torch.from_numpy(np.stack([np.pad(part, width, constant_values=value) for part, width in zip(parts, widths)]))

        batch: dict[str, Any] = {
            "input_ids": padded("input_ids", time, self.pad_token_id),
            "labels": padded("labels", time, IGNORED),
            # Without audio targets too: every data-parallel rank has to run the audio head.
            "audio_labels": padded("audio_labels", time, IGNORED),
        }
        if frames:
            batch["audio_codes"] = padded("audio_codes", frames, -1)
        if self.pack_tokens is None:
            batch["attention_mask"] = (torch.arange(time) < torch.tensor([len(row) for row in rows])[:, None]).long()
        else:
            # The padding counts as one more sample.
            lengths = [[*map(len, group), time - len(row)] for group, row in zip(groups, rows)]
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
            batch["use_cache"] = False
        return batch
