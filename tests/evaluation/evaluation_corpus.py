"""A toy corpus of tones."""

import json
from pathlib import Path

import numpy as np
import soundfile


def tone(path: Path, seconds: float, pitch: float, rate: int = 24000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time) * np.sin(np.pi * time / seconds), rate)


ENTRIES = [
    ("test_voice", "sentence", "v1", "It is three o'clock.", "", "ann"),
    ("test_voice", "sentence", "v2", "The colour is red.", "", "ann"),
    ("test_voice", "sentence", "v3", "Good morning.", "", "bob"),
    ("test_sentence", "sentence", "s1", "My cup is new.", "", "own"),
    ("test_sentence", "sentence", "s2", "Go home.", "", "own"),
    ("test_voice", "question", "q1", "What is two plus three?", "Two plus three is five.", "ann"),
    ("test_voice", "question", "q2", "What does a cat say?", "A cat says meow.", "bob"),
    ("test_voice", "question", "q3", "What comes after Monday?", "Tuesday.", "bob"),
    ("test_operands", "question", "o1", "What is two plus two?", "Two plus two is four.", "ann"),
    ("test_operands", "question", "o2", "What is one plus two?", "One plus two is three.", "ann"),
    ("train", "answer", "a1", "Two plus three is five.", "", "own"),
    ("train", "answer", "a2", "A cat says meow.", "", "own"),
    ("train", "answer", "a3", "Nobody asks for this.", "", "own"),
    ("train", "sentence", "t1", "This was trained on.", "", "own"),
    ("human", "sentence", "digits/1", "You have one message.", "", "allison"),
    ("human", "sentence", "menu", "Press two, please.", "", "allison"),
]


def write_corpus(folder: Path, entries=ENTRIES) -> Path:
    """A corpus of tones with a manifest as the miniature's corpus has it."""
    lines = []
    for index, (split, kind, name, text, answer, voice) in enumerate(entries):
        path, seconds = f"{split}/{name.replace('/', '-')}.wav", 0.5 + 0.05 * index
        tone(folder / path, seconds, 200 + 40 * index)
        entry = {"id": name, "split": split, "kind": kind, "text": text, "answer": answer, "voice": voice, "path": path}
        lines.append(json.dumps(entry | {"duration": seconds}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder
