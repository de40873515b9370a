"""Where listening starts: audio embeddings near the words that are said, and spliced recordings that must be listened to.

    python -m modeling_baichuan_audio.training.miniature.flat_start CHECKPOINT ROWS FOLDER

An LLM that has learnt to repeat words one by one, passing over what is none, then hears speech as text from the first step on; from
random embeddings it would have to discover by itself that the two go together. The name is that of speech recognisers' first round,
which also began without any alignment.

The recordings of ROWS are also taken apart between words and put together anew, into `spliced.jsonl` beside it: nothing but the sound
says what comes next in them.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from ...conversion.files import save_checkpoint
from ...modeling_baichuan_audio import BaichuanAudioForCausalLM
from .reader import CodeReader, Pair, fit_reader
from .rows import FILLER, write_rows_file
from .splice import cut_into_words, splice


SPLICED = 24_000
_RIDGE = 1.0  # frames


def read_pairs(path: Path, tokenizer, task: str = "asr") -> list[Pair]:
    """
    Codes `(num_codebooks, frames)` and token ids `(tokens,)` of a file's rows of one task, "asr" or "tts"; each once, and only those
    with at least one frame for each token.

    Raises:
        ValueError: no file, or none of its transcriptions can be used.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write the rows with codes first (training/miniature/README.md).")
    pairs: dict[str, Pair] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] != task or line in pairs:
            continue
        parts = {name: value for segment in row["segments"] for name, value in segment.items()}
        codes = torch.tensor(parts["audio_codes"])
        ids = torch.tensor(tokenizer(parts["text"], add_special_tokens=False)["input_ids"])
        if 0 < len(ids) <= codes.shape[1]:
            pairs[line] = (codes, ids)
    if not pairs and task == "asr":
        raise ValueError(f"{path} has no transcription with as many frames as tokens.")
    return list(pairs.values())


@torch.no_grad()
def expected_words(reader: CodeReader, codes: torch.Tensor, words: torch.Tensor, filler: torch.Tensor) -> torch.Tensor:
    """
    What the reader takes each frame for, as an embedding: the mean over its classes, the filler's for the blank.

    Args:
        codes (`(num_codebooks, frames)`), words (`(vocabulary, width)`), filler (`(width,)`).

    Returns:
        `(frames, width)` float32.
    """
    classes = torch.cat([words[reader.tokens], filler[None]])
    return torch.cat([reader(part).exp() @ classes for part in codes.split(8192, dim=1)])


@torch.no_grad()
def fit_tables(codes: torch.Tensor, targets: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """
    One table for each codebook, so that a frame's sum over them is nearest to its target (least squares).

    Args:
        codes (`(num_codebooks, frames)`), targets (`(frames, width)`).
        sizes: rows of each table.

    Returns:
        `(size, width)` float32 each; the targets' mean is spread evenly over the tables, and so is all that a rare entry cannot tell.
    """
    first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    count, mean = sum(sizes), targets.mean(0)
    gram, moments = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, targets.shape[1], dtype=torch.float64)
    for part, wanted in zip((codes + first[:, None]).split(4096, dim=1), (targets - mean).split(4096)):
        used = torch.zeros(part.shape[1], count).scatter_(1, part.T, 1.0)
        gram += used.T @ used
        moments += used.T @ wanted
    tables = torch.linalg.solve(gram + _RIDGE * torch.eye(count, dtype=torch.float64), moments).float()
    return [table + mean / len(sizes) for table in tables.split(sizes)]


@torch.no_grad()
def embed_codebooks(model: BaichuanAudioForCausalLM, reader: CodeReader, pairs: list[Pair], filler: int) -> None:
    """Sets the audio embeddings so that frames look like the words that the reader takes them for. The end of audio keeps its row."""
    words, sizes = model.get_input_embeddings().weight.float(), [table.num_embeddings for table in reader.tables]
    codes = torch.cat([codes for codes, _ in pairs], dim=1)
    tables = fit_tables(codes, expected_words(reader, codes, words, words[filler]), sizes)
    for embedding, table in zip(model.model.audio_embed_layers, tables):
        embedding.weight[: len(table)] = table.to(embedding.weight.dtype)


def flat_start(checkpoint: str | Path, rows: str | Path, folder: str | Path, spliced: int = SPLICED, seed: int = 0) -> Path:
    """
    Args:
        checkpoint: with a text LLM and a trained tokenizer. rows: training rows with codes, for their transcriptions.
        folder: gets the checkpoint with its audio embeddings set.
        spliced: transcriptions in `spliced.jsonl`; a third as many are to be spoken, cut from what the model's own voice says.

    Raises:
        ValueError: rows that cannot be used.
    """
    rows = Path(rows)
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    pairs = read_pairs(rows, processor.tokenizer)
    reader = fit_reader(pairs, [codebook.size for codebook in model.audio_tokenizer.quantizer.codebooks], seed=seed)
    made: list[dict] = []
    for task, count in (("asr", spliced), ("tts", spliced // 3)):
        recordings = pairs if task == "asr" else read_pairs(rows, processor.tokenizer, task)
        clips = [clip for clip in (cut_into_words(reader, *pair, processor.tokenizer) for pair in recordings) if clip]
        print(f"{task}: {len(clips)} of {len(recordings)} read without a mistake")
        made += splice(clips, task, count, seed)
    write_rows_file(made, rows.with_name("spliced.jsonl"))
    embed_codebooks(model, reader, pairs, processor.tokenizer.convert_tokens_to_ids(FILLER))
    save_checkpoint(model, processor, Path(folder).absolute(), replace=True)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, meaning in (("checkpoint", "text LLM and tokenizer"), ("rows", "rows/speech.jsonl"), ("folder", "result")):
        parser.add_argument(name, type=Path, help=meaning)
    parser.add_argument(
        "--spliced", type=int, default=SPLICED, help="transcriptions in spliced.jsonl; a third as many are spoken"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        print(flat_start(options.checkpoint, options.rows, options.folder, options.spliced, options.seed))
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
