"""The corpus as training rows: `python -m modeling_baichuan_audio.training.miniature.rows CORPUS [--codes CHECKPOINT]`.

Without a checkpoint it writes the rows that need no codes, into `CORPUS/rows/`:

| file | rows | for |
|---|---|---|
| `audio.jsonl`, `audio-valid.jsonl` | recordings, with what they say | tokenizer, flow matching, vocoder |
| `text.jsonl` | questions and answers, sums, words to be repeated one by one, all written | the text LLM |
| `sums.jsonl` | sums beyond those that are ever spoken, with a share of the above | the text LLM, afterwards |

With the checkpoint whose tokenizer is trained, every clip is encoded once and these follow:

| file | rows | for |
|---|---|---|
| `speech.jsonl`, `speech-valid.jsonl` | transcription and speech, with a share of the written rows | stages 1 and 2 |
| `chat.jsonl` | questions, spoken or written, with answers, written or spoken, sums, speech and some transcription | fine-tuning |
| `longer.jsonl` | transcriptions of several clips in a row | fine-tuning |
"""

import argparse
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

from ...processors import BaichuanAudioFeatureExtractor
from ...processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT, split_speech_text
from ..audio_codes import AudioCodeEncoder
from ..augmentation import through_a_room
from .corpus import read_manifest
from .plan import OWN_VOICE
from .sentences import SUMS, longer_sums, questions, wide_arithmetic, wide_comparisons


FILLER = "_"  # no text of the domain has it
COPIES = 40_000
LONGER_SUMS = 12_000
LONGER = 6000
# Copies of rows with speech that is hard to learn: of `balanced.py` and `frames.py`, of answers to small facts, of answers to sums.
RARE, SMALL_ANSWERS, SUM_ANSWERS = 3, 4, 2
TAKES_HEARD = 4  # times that each take of an answer to a small fact is among the recordings
SPEEDS = (0.9, 1.1)
ROOMS = ("room0", "room1")
Entry = dict[str, Any]
Row = dict[str, Any]


def write_rows_file(rows: Iterable[Row], path: Path) -> None:
    """One JSON object a line, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(part, path)


def _chat(question: dict[str, Any] | str, answer: list[dict[str, Any]] | str, speech: bool = False) -> Row:
    system = [{"role": "system", "content": DEFAULT_VOICE_PROMPT}] if speech else []
    asked = question if isinstance(question, str) else [question]
    messages = [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"task": "chat", "speech": speech, "messages": messages}


def _asked(copies: int = 1) -> list[Row]:
    """The questions that are not held out with their answers; small facts, of which there are fewer, twice as often as sums."""
    lines = [line for line in questions() if not line.held_out]
    lines += [line for line in lines if line.category != "arithmetic"]
    return [_chat(line.text, line.answer) for line in lines] * copies


def text_rows(entries: list[Entry], rng: random.Random) -> list[Row]:
    """Questions with answers, and training sentences to be repeated."""
    told = _told(entries)
    chosen = rng.sample(told, min(len(told), 1500))
    return _asked(copies=2) + [_chat(f"Repeat after me: {text}", text) for text in chosen]


def _told(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(entry["text"] for entry in entries if entry["split"] == "train"))


def copy_rows(entries: list[Entry], count: int, rng: random.Random) -> Iterator[Row]:
    """
    Words in no order to be repeated, every other time with fillers between them that are to be passed over.

    What comes next cannot be guessed, so a model has to learn to look it up: a sentence of the domain it would rather make up. Speech
    is then the same again, with frames in the place of words and fillers (`flat_start.py`).
    """
    told = _told(entries)
    vocabulary = sorted({word for text in told for word in text.split()})
    for _ in range(count if told else 0):
        words: list[str] = []
        wanted = rng.randint(2, 10)
        while len(words) < wanted:
            sentence = rng.choice(told).split()
            start = rng.randrange(len(sentence))
            words += [rng.choice(vocabulary)] if rng.random() < 0.5 else sentence[start : start + rng.randint(1, 3)]
        spoken = " ".join(words)
        if rng.random() < 0.5:
            spoken = "".join(f"{FILLER * rng.choice((0, 1, 1, 2, 2, 3))} {word}" for word in words) + FILLER * rng.randint(0, 2)
        yield _chat(f"Repeat after me: {spoken.strip()}", " ".join(words))


def sum_rows() -> list[Row]:
    """More sums and comparisons than are ever spoken."""
    return [_chat(line.text, line.answer) for line in [*wide_arithmetic(), *wide_comparisons(), *longer_sums(LONGER_SUMS)]]


def _recordings(entry: Entry) -> list[Row]:
    """A clip, read from the manifest's folder: true voices, which are few, five times, answers to small facts `TAKES_HEARD` times."""
    row = {"task": "asr", "segments": [{"audio": f"../{entry['path']}"}, {"text": entry["text"]}]}
    if entry["kind"] == "answer" and entry["category"] not in SUMS:
        return [row] * TAKES_HEARD
    return [row] * (5 if entry["engine"] == "kokoro" else 1)


def _is_further_take(entry: Entry) -> bool:
    """An answer at another speed: for mel decoder and flow matching. An LLM that learnt them as well was understood less."""
    return entry["id"].startswith("answer-take-")


def _heard(entry: Entry) -> list[str]:
    """Names of a clip's codes: one, and of the few true voices those at other speeds and through other rooms too."""
    others = (*SPEEDS, *ROOMS) if entry["engine"] == "kokoro" and entry["split"] == "train" else ()
    return [entry["path"], *(f"{entry['path']}@{change}" for change in others)]


def _changed(extractor: BaichuanAudioFeatureExtractor, samples: np.ndarray, name: str) -> np.ndarray:
    """
    A clip at the extractor's rate as its name in `_heard` says, always the same for the same name.

    Speed is changed by resampling, which moves the pitch as well: Ko et al., Audio Augmentation for Speech Recognition, 2015.
    """
    change, rate = name.partition("@")[2], extractor.sampling_rate
    if change in ROOMS:
        return through_a_room(samples, rate, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return extractor.at_rate(samples, round(rate / float(change))) if change else samples


def _transcription(entry: Entry, codes: list) -> Row:
    return {"task": "asr", "segments": [{"audio_codes": codes}, {"text": entry["text"]}]}


def longer_transcriptions(rows: list[Row], count: int, rng: random.Random) -> Iterator[Row]:
    """
    Transcriptions of two to six clips in a row, of any voices: recordings of people are longer than any sentence of the corpus.

    Args:
        rows: transcriptions of single clips. count: of rows.
    """
    for _ in range(count if rows else 0):
        clips = [row["segments"] for row in rng.choices(rows, k=rng.randint(2, 6))]
        books = zip(*(heard["audio_codes"] for heard, _ in clips))
        codes = [[code for clip in book for code in clip] for book in books]
        yield _transcription({"text": " ".join(said["text"] for _, said in clips)}, codes)


def _speech(entry: Entry, codes: list) -> Row:
    return {"task": "tts", "segments": [{"text": entry["text"]}, {"audio_codes": codes}]}


def _pieces(entry: Entry, codes: dict[str, list]) -> Row | None:
    """A sentence that is spoken piece by piece, where all pieces were recorded."""
    paths = [f"{entry['path'].removesuffix('.wav')}-{number}.wav" for number in range(len(split_speech_text(entry["text"])))]
    if len(paths) < 2 or not all(path in codes for path in paths):
        return None
    pairs = zip(split_speech_text(entry["text"]), paths)
    return {"task": "itts", "segments": [part for text, path in pairs for part in ({"text": text}, {"audio_codes": codes[path]})]}


def speech_rows(entries: list[Entry], codes: dict[str, list], split: str, own_heard: int = 1) -> list[Row]:
    """
    Transcription of everything, the few true voices at three speeds and through two rooms; speech in the model's own voice, lines of
    rare words and frames `RARE` times.

    Args:
        own_heard: the own voice, which is easily understood, is transcribed in every so many of its clips.
    """
    heard, spoken = [], []
    members = [entry for entry in entries if entry["split"] == split and entry["kind"] != "piece"]
    for number, entry in enumerate(members):
        own = entry["voice"] == OWN_VOICE
        if not own or number % own_heard == 0:
            heard += [_transcription(entry, codes[name]) for name in _heard(entry)]
        if own:
            row = _pieces(entry, codes) or _speech(entry, codes[entry["path"]])
            spoken += [row] * (RARE if entry["category"] in ("balanced", "frame") else 1)
    return heard + spoken


def chat_rows(entries: list[Entry], codes: dict[str, list]) -> list[Row]:
    """
    Spoken questions with written and with spoken answers, and written questions with spoken answers, where one was recorded: those
    to small facts `SMALL_ANSWERS` times, to sums `SUM_ANSWERS` times.
    """
    spoken = {entry["text"]: codes[entry["path"]] for entry in entries if entry["kind"] == "answer"}
    rows: list[Row] = []

    def answered(question: dict[str, Any] | str, answer: str, category: str) -> list[Row]:
        if answer not in spoken:
            return []
        said = [{"type": "text", "text": answer}, {"type": "audio", "audio_codes": spoken[answer]}]
        return [_chat(question, said, speech=True)] * (SUM_ANSWERS if category in SUMS else SMALL_ANSWERS)

    for entry in entries:
        if entry["split"] != "train" or entry["kind"] != "question":
            continue
        for heard in ({"type": "audio", "audio_codes": codes[name]} for name in _heard(entry)):
            rows += [_chat(heard, entry["answer"]), *answered(heard, entry["answer"], entry["category"])]
    for line in questions():
        if not line.held_out:
            rows += answered(line.text, line.answer, line.category)
    return rows


def encode(entries: list[Entry], folder: Path, checkpoint: str) -> dict[str, list]:
    """Name (`_heard`) -> codes, `num_codebooks` lists each. Clips of similar length are encoded together."""
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    extractor = processor.feature_extractor
    encoder = AudioCodeEncoder(model.eval().audio_tokenizer, extractor, batch_size=16)

    def waveform(name: str):
        samples = extractor.read_audio(str(folder / name.partition("@")[0]))
        return _changed(extractor, samples, name)

    codes: dict[str, list] = {}
    ordered = [name for entry in sorted(entries, key=lambda entry: entry["duration"]) for name in _heard(entry)]
    for start in tqdm(range(0, len(ordered), 64), desc="codes", unit="batch"):
        batch = ordered[start : start + 64]
        codes |= {name: array.tolist() for name, array in zip(batch, encoder([waveform(name) for name in batch]))}
    return codes


def write_rows(folder: str | Path, checkpoint: str | None = None, seed: int = 0) -> Path:
    """
    Writes the files named above.

    Args:
        folder: of the corpus.
        checkpoint (*optional*): with a trained tokenizer.
        seed: of the shares that are drawn.

    Returns:
        The folder of the rows.

    Raises:
        ValueError: no corpus, no such checkpoint.
    """
    folder = Path(folder)
    entries, target, rng = read_manifest(folder), folder / "rows", random.Random(seed)
    learnt = [entry for entry in entries if entry["split"] in ("train", "valid")]
    texts, sums = text_rows(entries, rng), sum_rows()
    if checkpoint is None:
        for split, name in (("train", "audio"), ("valid", "audio-valid")):
            clips = [entry for entry in learnt if entry["split"] == split]
            write_rows_file((row for entry in clips for row in _recordings(entry)), target / f"{name}.jsonl")
        write_rows_file([*_asked(copies=12), *sums, *copy_rows(entries, COPIES, rng)], target / "text.jsonl")
        write_rows_file(sums + rng.sample(texts, len(texts) // 2), target / "sums.jsonl")
        return target
    learnt = [entry for entry in learnt if not _is_further_take(entry)]
    codes = encode(learnt, folder, checkpoint)
    speech, chat = speech_rows(learnt, codes, "train"), chat_rows(learnt, codes)
    write_rows_file(speech + rng.sample(texts, len(texts) // 3) + rng.sample(sums, 1500), target / "speech.jsonl")
    write_rows_file(speech_rows(learnt, codes, "valid"), target / "speech-valid.jsonl")
    share = speech_rows(learnt, codes, "train", own_heard=8)
    write_rows_file(chat + _asked() + rng.sample(sums, len(sums) // 3) + share, target / "chat.jsonl")
    heard = [row for row in speech if row["task"] == "asr"]
    write_rows_file(longer_transcriptions(heard, LONGER, random.Random(seed)), target / "longer.jsonl")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--codes", metavar="CHECKPOINT", help="checkpoint with a trained tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        print(write_rows(options.corpus, options.codes, options.seed))
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
