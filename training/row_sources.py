"""Where raw rows come from: JSONL files, Parquet files, any data set of the `datasets` library, or a list."""

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info


@dataclass
class RawRow:
    """A row as it stands in its source: a mapping, or a line of JSON. `where` names it; relative audio paths start from `root`."""

    value: Any
    where: str
    root: Path | None = None


class JsonLines:
    """A JSONL file: line by line, so that rows may differ in their keys and one broken line costs one row. Blank lines are no rows."""

    def __init__(self, path: Path):
        self.path, self._lines = path, None

    def _offsets(self) -> list[tuple[int, int]]:
        """(number, first byte) of every line; found at first need, as streaming has no use for them."""
        if self._lines is None:
            self._lines, position = [], 0
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._lines.append((number, position))
                    position += len(line)
        return self._lines

    def _row(self, number: int, line: bytes) -> RawRow:
        return RawRow(line, f"{self.path}:{number}", self.path.parent)

    def __len__(self) -> int:
        return len(self._offsets())

    def __getitem__(self, index: int) -> RawRow:
        number, position = self._offsets()[index]
        with open(self.path, "rb") as file:
            file.seek(position)
            return self._row(number, file.readline())

    def __iter__(self) -> Iterator[RawRow]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._row(number, line)


class Rows:
    """A `datasets.Dataset`, a `datasets.IterableDataset`, or a sequence of mappings. Audio features are left undecoded."""

    def __init__(self, data: Any, name: str = "row", root: Path | None = None):
        # In Arrow format an Audio feature is its bytes and path: our own reader decodes them, whatever decoder is installed.
        self._arrow = isinstance(data, (datasets.Dataset, datasets.IterableDataset)) and "Audio(" in repr(data.features)
        if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
            data = data.with_format("arrow" if self._arrow else None)
        self.data, self.name, self.root = data, name, root

    @property
    def splits_itself(self) -> bool:
        """Whether the data set gives each data-loader worker its own share by itself."""
        return isinstance(self.data, datasets.IterableDataset)

    def _row(self, index: int, value: Any) -> RawRow:
        return RawRow(value.to_pylist()[0] if self._arrow else value, f"{self.name} {index}", self.root)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> RawRow:
        return self._row(index, self.data[index])

    def __iter__(self) -> Iterator[RawRow]:
        return (self._row(index, value) for index, value in enumerate(self.data))

    def share(self, rank: int, world_size: int, epoch: int) -> Iterator[RawRow]:
        """A rank's part of an IterableDataset, in the order of the epoch; within a data loader, this worker's part of it."""
        data = split_dataset_by_node(self.data, rank, world_size) if world_size > 1 else self.data
        data.set_epoch(epoch)
        return (self._row(index, value) for index, value in enumerate(data))


class RowSource:
    """
    Several sources as one.

    Args:
        parts ([`JsonLines`] or [`Rows`]): in order. streamed: without random access.
    """

    def __init__(self, parts: list, streamed: bool):
        self.parts, self.streamed = parts, streamed
        self._ends = [] if streamed else list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        if self.streamed:
            raise TypeError("A streamed source has no length.")
        return self._ends[-1]

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[RawRow]:
        if self.streamed:
            return (raw for part in self.parts for raw in part)
        return (self[index] for index in range(len(self)))

    def share(self, rank: int, world_size: int, epoch: int = 0) -> Iterator[RawRow]:
        """The rows that fall to this rank and, within a data loader, to this worker; all shares together are every row once."""
        worker = get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        count, first = world_size * workers, rank * workers + own
        if not self.streamed:
            yield from (self[index] for index in range(first, len(self), count))
            return
        seen = 0
        for part in self.parts:
            if getattr(part, "splits_itself", False):
                yield from part.share(rank, world_size, epoch)
                continue
            for raw in part:
                if seen % count == first:
                    yield raw
                seen += 1


def _files(name: str) -> list[Path]:
    """The JSONL or Parquet files that a path, a folder or a pattern names."""
    if Path(name).is_dir():
        found = sorted(Path(name).rglob("*.parquet")) or sorted(Path(name).rglob("*.jsonl"))
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(name).parts)]
    else:
        found = [Path(path) for path in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else [Path(name)]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise ValueError(f"Training data {missing[0] if missing else name} does not exist or holds no .jsonl or .parquet file.")
    return found


def _load_one(name: str, split: str, streaming: bool) -> list:
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"{name} has the splits {', '.join(saved)}, not {split!r}.")
            saved = saved[split]
        return [Rows(saved.to_iterable_dataset() if streaming else saved, f"{name}, row", folder)]
    is_hub_id = name.count("/") == 1 and not folder.exists() and not folder.suffix and not glob.has_magic(name)
    if is_hub_id:
        try:
            return [Rows(datasets.load_dataset(name, split=split, streaming=streaming), f"{name}, row")]
        except (OSError, ValueError) as error:
            raise ValueError(f"Training data {name} is neither a file here nor a data set of the Hub: {error}") from error
    files = _files(name)
    endings = {path.suffix for path in files}
    if endings == {".parquet"}:
        loaded = datasets.load_dataset("parquet", data_files=[str(path) for path in files], split="train", streaming=streaming)
        return [Rows(loaded, f"{name}, row", files[0].parent)]
    if endings <= {".jsonl", ".json"}:
        return [JsonLines(path) for path in files]
    raise ValueError(f"Training data must be .jsonl or .parquet files, got {name} with {', '.join(sorted(endings))}.")


def load_rows(source: Any, split: str = "train", streaming: bool = False) -> RowSource:
    """
    Training data from anywhere; rows are checked later, by a `RowReader`.

    Args:
        source: a JSONL or Parquet file, a folder of them, a pattern, a folder written by `datasets.save_to_disk`, a Hub id, a
            `datasets` data set, a sequence of mappings; or a list of such names, read one after the other.
        split (`str`, defaults to `"train"`): of data sets that have several.
        streaming (`bool`): read rows as they come; for files and Hub ids. A `datasets.IterableDataset` is always streamed.

    Raises:
        ValueError: nothing there, or another type.
    """
    if isinstance(source, (str, Path)):
        return RowSource(_load_one(str(source), split, streaming), streaming)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return RowSource([part for item in source for part in _load_one(str(item), split, streaming)], streaming)
    if isinstance(source, datasets.IterableDataset):
        return RowSource([Rows(source)], True)
    if isinstance(source, (datasets.Dataset, Sequence)) and len(source):
        return RowSource([Rows(source)], False)
    raise ValueError(f"Training data must be a path, a data set or a list of rows, got {type(source).__name__} {source!r:.80}.")
