"""Tokenising a data set beforehand: the same rows with their audio as codes, in Parquet shards; can be stopped and resumed."""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from pyarrow import parquet
from transformers.utils import logging

from .audio_codes import AudioCodeEncoder
from .datasets import RowReader
from .layouts import LayoutBuilder, TokenIds
from .row_sources import RawRow, RowSource, load_rows
from .rows import PROMPTED_TASKS, AudioReader, Row, Segment


logger = logging.get_logger(__name__)

_CODES = datasets.List(datasets.List(datasets.Value("int32")))
_SCHEMA = datasets.Features(
    {
        "task": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "segments": datasets.List({"text": datasets.Value("string"), "audio_codes": _CODES}),
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List(
                    {"type": datasets.Value("string"), "text": datasets.Value("string"), "audio_codes": _CODES}
                ),
            }
        ),
        "speech": datasets.Value("bool"),
        # Tokens of the layout with the tokenizer at hand, and the whole row as the source had it, less its audio.
        "length": datasets.Value("int64"),
        "source": datasets.Value("string"),
    }
)


def weights_fingerprint(tokenizer_model) -> str:
    """A digest of what decides codes: the weights of the encoder, the bridge and the codebooks, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer_model.state_dict().items()):
        if not name.startswith("mel_decoder.") and not name.endswith(("cluster_size", "embed_avg")):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _light(value: Any) -> Any:
    """A row without its audio: files by their path, samples and codes by their number, bytes by a digest."""
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha256(value).hexdigest()[:16]
    if isinstance(value, dict):
        return {str(key): _light(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        if len(value) > 0 and isinstance(value[0], (int, float)):
            return f"{len(value)} numbers"
        return [_light(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value if not isinstance(value, str) or len(value) < 10000 else f"{len(value)} characters"
    return f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}"


def _source_text(raw: RawRow) -> str:
    value = raw.value
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except ValueError:
            value = str(value)
    return json.dumps(_light(value), ensure_ascii=False, sort_keys=True)


def _record(row: Row, codes: list, source: str) -> dict:
    remaining = iter(codes)

    def part(segment: Segment) -> dict:
        return {"text": segment.text, "audio_codes": None if segment.is_text else next(remaining).tolist()}

    record = dict.fromkeys(_SCHEMA) | {"task": row.task, "length": row.length, "source": source}
    if row.task == "chat":
        contents = [[{"type": "text" if item.is_text else "audio", **part(item)} for item in turn.segments] for turn in row.turns]
        messages = [{"role": turn.role, "content": content} for turn, content in zip(row.turns, contents)]
        return record | {"messages": messages, "speech": row.speech}
    prompt = row.prompt if row.task in PROMPTED_TASKS else None
    return record | {"prompt": prompt, "segments": [part(item) for item in row.segments]}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_json(path: Path, value: dict) -> None:
    _write(path, lambda part: part.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"))


def _check_plan(path: Path, plan: dict, folder: Path) -> None:
    if not path.is_file():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds Parquet files that this command did not write: name another folder.")
        _write_json(path, plan)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key} (then {before.get(key)!r}, now {plan[key]!r})" for key in plan if before.get(key) != plan[key]]
    if changed:
        raise ValueError(
            f"{folder} was begun with other settings: {', '.join(changed)}. Name another folder, or delete this one."
        )


def _shards(source: RowSource, size: int) -> Iterator[Iterator[RawRow]]:
    """The rows of every shard. With random access, rows that the caller does not take are not read."""
    if not source.streamed:
        for start in range(0, len(source), size):
            yield (source[place] for place in range(start, min(start + size, len(source))))
        return
    remaining = iter(source)
    for first in remaining:
        shard = chain([first], islice(remaining, size - 1))
        yield shard
        deque(shard, maxlen=0)


def pretokenize(
    dataset: Any,
    tokenizer_model,
    processor,
    output_folder: str | Path,
    shard_size: int = 1000,
    batch_size: int = 8,
    max_tokens: int | None = None,
    on_error: str = "skip",
    streaming: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict:
    """
    Replaces the audio of every row by its codes and writes `shard-00000.parquet`, ... and `summary.json`.

    A shard is `shard_size` rows of the source, less the broken ones (no file where none is left). A finished shard is kept when the
    command runs again; its settings, the tokenizer's weights and the first row of every finished shard must be those of the first
    time. Spoken text is cut at timestamps on the way, as in training. What is not of the schema (names, speakers, ...) is kept as
    JSON under `source`.

    Args:
        dataset: anything that `load_rows` takes, or a [`RowSource`].
        tokenizer_model ([`BaichuanAudioTokenizerModel`]): on any device. processor ([`BaichuanAudioProcessor`]).
        output_folder: made where it does not exist.
        shard_size, batch_size (`int`): source rows of a shard; 30 s chunks encoded at once.
        max_tokens (`int`, *optional*): longer rows are skipped. on_error (`"skip"` or `"raise"`): what a broken row does.
        streaming (`bool`): read the source as it comes.
        rank, world_size (`int`): of several processes that share the work; shard i is written by rank i % world_size.
        progress (*optional*): called with the number of source rows done and their total (None while unknown) after every batch.

    Returns:
        The content of `summary.json`: `rows_read`, `rows_written`, `skipped` (by reason), `audio_clips`, `audio_frames`, `audio_hours`,
        `text_and_audio_tokens`, `shards`, over all shards that are finished, and `complete`.

    Raises:
        ValueError: settings out of range, an output folder begun with others, or a source that changed since.
    """
    if shard_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"Needs `shard_size` of at least 1 and a `rank` below `world_size`, got {shard_size}, {rank}, {world_size}."
        )
    source = dataset if isinstance(dataset, RowSource) else load_rows(dataset, streaming=streaming)
    total = None if source.streamed else len(source)
    extractor, sizes = processor.feature_extractor, list(tokenizer_model.config.codebook_sizes)
    builder = LayoutBuilder(processor.tokenizer, TokenIds.from_tokenizer(processor.tokenizer), sizes)
    encoder = AudioCodeEncoder(tokenizer_model, extractor, batch_size)
    folder = Path(output_folder)
    state = folder / ".pretokenize"  # hidden: data loaders look at the Parquet files only
    state.mkdir(parents=True, exist_ok=True)
    plan = {
        "format": 1,
        "tokenizer_weights": weights_fingerprint(tokenizer_model),
        "codebook_sizes": sizes,
        "shard_size": shard_size,
        "max_tokens": max_tokens,
        "source_rows": total,
    }
    _check_plan(state / "plan.json", plan, folder)

    last = -1
    for index, rows in enumerate(_shards(source, shard_size)):
        last = index
        path, note = folder / f"shard-{index:05d}.parquet", state / f"shard-{index:05d}.json"
        if index % world_size != rank:
            continue
        head = next(rows)
        first = hashlib.sha256(_source_text(head).encode()).hexdigest()[:16]
        written = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if written is not None and (path.is_file() or not written["counts"].get("rows_written")):
            if written["first_row"] != first:
                raise ValueError(f"The data changed since {path} was written: name another folder, or delete this one.")
            if progress is not None:
                progress(index * shard_size + written["counts"]["rows_read"], total)
            continue
        rows, reader = chain([head], rows), RowReader(AudioReader(extractor, sizes), builder, max_tokens, on_error)
        records, counts = [], Counter()
        while part := list(islice(rows, 4 * batch_size)):  # several batches at once: chunks of similar length share one
            read = [(raw, row) for raw, row in ((raw, reader(raw)) for raw in part) if row is not None]
            for (raw, row), codes in zip(read, encoder.encode_rows([row for _, row in read])):
                records.append(_record(row, codes, _source_text(raw)))
                counts.update(rows_written=1, audio_clips=len(codes), text_and_audio_tokens=row.length)
                counts.update(audio_frames=sum(clip.shape[1] for clip in codes))
            counts.update(rows_read=len(part))
            if progress is not None:
                progress(index * shard_size + counts["rows_read"], total)
        if records:  # an empty Parquet file cannot be loaded
            table = pa.Table.from_pylist(records, schema=_SCHEMA.arrow_schema)
            _write(path, lambda part, table=table: parquet.write_table(table, part))
        _write_json(note, {"first_row": first, "counts": dict(counts), "skipped": reader.report.skipped})
    return _summarise(folder, state, sizes, AudioReader(extractor, sizes).frame_rate, last + 1)


def _summarise(folder: Path, state: Path, sizes: list[int], frame_rate: float, shards: int) -> dict:
    counts: Counter = Counter()
    skipped: Counter = Counter()
    finished = sorted(state.glob("shard-*.json"))
    for path in finished:
        note = json.loads(path.read_text(encoding="utf-8"))
        counts.update(note["counts"])
        skipped.update(note["skipped"])
    names = ("rows_read", "rows_written", "audio_clips", "audio_frames", "text_and_audio_tokens")
    summary = {name: counts[name] for name in names} | {
        "audio_hours": round(counts["audio_frames"] / frame_rate / 3600, 4),
        "skipped": dict(skipped),
        "codebook_sizes": sizes,
        "shards": len(finished),
        "complete": len(finished) == shards,
    }
    _write_json(folder / "summary.json", summary)
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        logger.warning(f"{sum(skipped.values())} of {summary['rows_read']} rows were skipped: {reasons}.")
    return summary
