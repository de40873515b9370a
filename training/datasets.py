"""Training data: rows from files or `datasets`, read as a whole or streamed, in batches of similar length; broken rows are counted."""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm
from transformers.utils import logging

from .layouts import LayoutBuilder
from .row_sources import RawRow, RowSource
from .rows import REASONS, AudioReader, BrokenRow, Row, Segment, Turn, parse_row
from .segmentation import cut_row


logger = logging.get_logger(__name__)


class SkipReport:
    """
    How many rows were read, and how many were left out for which reason; shared with data-loader workers.

    Args:
        examples (`int`, defaults to 3): rows of each reason that are named in a warning as they come; the rest are only counted.
    """

    _WRITERS = 257  # one slot per process: the main one and its workers

    def __init__(self, examples: int = 3):
        self.examples = examples
        self._counts = torch.zeros(self._WRITERS, 1 + len(REASONS), dtype=torch.long).share_memory_()

    def _slot(self) -> torch.Tensor:
        worker = get_worker_info()
        return self._counts[0 if worker is None else 1 + worker.id % (self._WRITERS - 1)]

    def add_read(self) -> None:
        self._slot()[0] += 1

    def add_skipped(self, reason: str, message: str, where: str) -> None:
        slot, index = self._slot(), 1 + list(REASONS).index(reason)
        slot[index] += 1
        if int(slot[index]) <= self.examples:
            logger.warning(f"Skipped {where}: {message}")

    @property
    def read(self) -> int:
        """Rows that could be used."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> dict[str, int]:
        """Rows left out, by reason; only reasons that occurred."""
        counts = self._counts[:, 1:].sum(0).tolist()
        return {reason: count for reason, count in zip(REASONS, counts) if count}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {REASONS[reason]}" for reason, count in self.skipped.items())
        return f"{sum(self.skipped.values())} rows skipped ({reasons or 'none'}), {self.read} used"

    def log(self, usable: int | None = None) -> None:
        """One warning that sums up, when anything was skipped; `usable` rows where they were only looked at, not read."""
        if self.skipped:
            logger.warning(str(self) if usable is None else str(self).replace(f"{self.read} used", f"{usable} can be used"))


class RowReader:
    """
    Raw rows -> checked rows with their audio read; broken ones are counted and left out.

    Args:
        audio ([`AudioReader`]), builder ([`LayoutBuilder`], *optional*): with it, text is checked and lengths are counted.
        max_tokens (`int`, *optional*): longest layout; needs `builder`.
        on_error (`"skip"` or `"raise"`): what a broken row does.

    Raises:
        ValueError: settings out of range.
    """

    def __init__(
        self,
        audio: AudioReader,
        builder: LayoutBuilder | None = None,
        max_tokens: int | None = None,
        on_error: str = "skip",
        report: SkipReport | None = None,
    ):
        if on_error not in ("skip", "raise"):
            raise ValueError(f'`on_error` must be "skip" or "raise", got {on_error!r}.')
        if max_tokens is not None and (max_tokens < 1 or builder is None):
            raise ValueError(f"`max_tokens` must be at least 1 and needs a `builder`, got {max_tokens}.")
        self.audio, self.builder, self.max_tokens, self.on_error = audio, builder, max_tokens, on_error
        self.report = SkipReport() if report is None else report

    def _parse(self, raw: RawRow) -> Row:
        value = raw.value
        if isinstance(value, (str, bytes)):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise BrokenRow("bad_row", f"not JSON: {error}") from error
        return parse_row(value)

    def _with_audio(self, row: Row, read) -> Row:
        def turn(given: Turn) -> Turn:
            return Turn(given.role, [part if part.is_text else read(part) for part in given.segments])

        return Row(row.task, [turn(given) for given in row.turns], row.prompt, row.speech)

    def _measured(self, row: Row) -> Row:
        if self.builder is not None:
            row.length = self.builder.length(row)
            if self.max_tokens is not None and row.length > self.max_tokens:
                raise BrokenRow("too_long", f"{row.length} tokens, {self.max_tokens} is the most.")
        return row

    def _guarded(self, make, raw: RawRow) -> Row | None:
        try:
            return make()
        except BrokenRow as error:
            if self.on_error == "raise":
                raise BrokenRow(error.reason, f"{raw.where}: {error}") from error
            self.report.add_skipped(error.reason, str(error), raw.where)
            return None

    def __call__(self, raw: RawRow) -> Row | None:
        """The row, its audio read and cut at timestamps; None where it is broken.

        Raises:
            BrokenRow: with `on_error="raise"`.
        """

        def make() -> Row:
            row = self._with_audio(self._parse(raw), lambda part: self.audio.read(part, raw.root))
            row = self._measured(cut_row(row, self.audio))
            return row

        row = self._guarded(make, raw)
        if row is not None:
            self.report.add_read()
        return row

    def inspect(self, raw: RawRow) -> Row | None:
        """As calling it, but audio files are not decoded: their headers give the length. Does not count as reading the row."""

        def estimate(part: Segment) -> Segment:
            return self.audio.estimate(part, raw.root)

        return self._guarded(lambda: self._measured(self._with_audio(self._parse(raw), estimate)), raw)


class SpeechDataset(Dataset):
    """
    Rows with random access. All rows are checked once, without decoding audio files; broken ones are not part of the data set.

    A file that turns out to be damaged only when it is decoded is counted then, and the next row of the data set takes its place in
    the batch, so that batches keep their size on every rank.

    Args:
        source ([`RowSource`]): with random access; see `load_rows`.
        reader ([`RowReader`]): with a `builder`.

    Attributes:
        lengths (`list` of `int`): tokens of every row, for [`LengthGroupedSampler`]; within a token per audio of the exact number.

    Raises:
        ValueError: a streamed source, a reader without a builder, or no row that could be used.
    """

    def __init__(self, source: RowSource, reader: RowReader):
        if source.streamed or reader.builder is None:
            raise ValueError("A SpeechDataset needs rows with random access and a reader with a `builder`.")
        self.source, self.reader = source, reader
        self.indices: list[int] = []
        self.lengths: list[int] = []
        for index in tqdm(range(len(source)), desc="checking rows", leave=False, disable=not sys.stderr.isatty()):
            row = reader.inspect(source[index])
            if row is not None:
                self.indices.append(index)
                self.lengths.append(row.length)
        reader.report.log(usable=len(self.indices))
        if not self.indices:
            raise ValueError(f"None of the {len(source)} rows can be used: {reader.report}.")
        self._damaged = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        for place in range(index, index + len(self)):
            place %= len(self)
            if not self._damaged[place]:
                row = self.reader(self.source[self.indices[place]])
                if row is not None:
                    return row
                self._damaged[place] = True
        raise ValueError(f"None of the {len(self)} rows can be used: {self.reader.report}.")


class LengthGroupedSampler(Sampler[int]):
    """
    Indices in an order in which every `batch_size` neighbours have similar lengths: rows are shuffled, sorted by length within pools
    of `pool_batches` batches, and the batches shuffled again. The order depends on `seed` and the epoch alone.

    Args:
        lengths: of every row. batch_size: of one step on all ranks together. pool_batches (`int`, defaults to 50).
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0, pool_batches: int = 50):
        if batch_size < 1 or pool_batches < 1 or not len(lengths):
            raise ValueError(f"Needs lengths, and sizes of at least 1, got {len(lengths)}, {batch_size} and {pool_batches}.")
        self.lengths, self.batch_size, self.seed, self.pool_batches = np.asarray(lengths), batch_size, seed, pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order, pool = random.permutation(len(self.lengths)), self.batch_size * self.pool_batches
        batches: list[np.ndarray] = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size)]
        # An incomplete batch stays at the end, or every batch after it would straddle two groups.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        random.shuffle(order := np.arange(len(batches)))
        return iter([int(index) for batch in [*(batches[place] for place in order), *last] for index in batch])


def bucketed(rows: Iterable[Row], batch_size: int, buffer_size: int, random: np.random.Generator) -> Iterator[Row]:
    """
    A stream in an order in which every `batch_size` neighbours have similar lengths: `buffer_size` rows at a time are sorted by
    length, cut into batches, and the batches shuffled.
    """
    buffer: list[Row] = []

    def drained() -> Iterator[Row]:
        buffer.sort(key=lambda row: -row.length)
        starts = np.arange(0, len(buffer), batch_size)
        full = starts[: len(buffer) // batch_size]
        random.shuffle(full)
        for start in [*full, *starts[len(full) :]]:
            yield from buffer[start : start + batch_size]
        buffer.clear()

    for row in rows:
        buffer.append(row)
        if len(buffer) == buffer_size:
            yield from drained()
    yield from drained()


class SpeechStream(IterableDataset):
    """
    Rows as they come, for data that is not to be held or scanned. With data-loader workers each reads its own share.

    Args:
        source ([`RowSource`]), reader ([`RowReader`]).
        batch_size, buffer_batches (`int`): rows of similar length are grouped within a buffer of so many batches; 0 for no grouping,
            which keeps the order of the source. Grouping needs a reader with a `builder`.
        seed (`int`): of the order; with the epoch (`set_epoch`) it decides it. rank, world_size: this process's share.
    """

    def __init__(
        self,
        source: RowSource,
        reader: RowReader,
        batch_size: int = 1,
        buffer_batches: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or buffer_batches < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "Needs `batch_size` of at least 1, `buffer_batches` of at least 0 and a `rank` below `world_size`, got "
                f"{batch_size}, {buffer_batches}, {rank} and {world_size}."
            )
        if buffer_batches and reader.builder is None:
            raise ValueError("Grouping by length needs a reader with a `builder`.")
        self.source, self.reader, self.batch_size, self.buffer_batches = source, reader, batch_size, buffer_batches
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _rows(self) -> Iterator[Row]:
        for raw in self.source.share(self.rank, self.world_size, self.epoch):
            row = self.reader(raw)
            if row is not None:
                yield row

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        random: Any = np.random.default_rng([self.seed, self.epoch, self.rank, 0 if worker is None else worker.id])
        rows = self._rows()
        if self.buffer_batches:
            rows = bucketed(rows, self.batch_size, self.batch_size * self.buffer_batches, random)
        yield from rows
        self.reader.report.log()
