"""Makes the miniature model's corpus: `python -m modeling_baichuan_audio.training.miniature.corpus FOLDER`.

The folder gets `assets/` (see `assets.py`), WAV files in a folder for each split, and `manifest.jsonl`. Called again it goes on where
it stopped; clips depend on the counts and the seed alone. `manifest.jsonl.xz` beside this file is the manifest of the corpus that the
shipped miniature was trained on; the command says how much of it it has made again.
"""

import argparse
import gzip
import json
import lzma
import os
import random
import re
import subprocess
from collections.abc import Container
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from ...conversion.files import sha256_of
from .assets import fetch_assets
from .plan import Clip, Plan, make_plan


SPEAK = Path(__file__).parent / "speak.py"
REFERENCE = Path(__file__).parent / "manifest.jsonl.xz"
# Debian's asterisk-core-sounds-en-g722 and asterisk-core-sounds-en, CC BY-SA 3.0: recorded by a person.
_PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
_TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")


def speak(clips: list[Clip], folder: Path, assets: Path, workers: int) -> None:
    """Speaks what is missing, in `workers` processes.

    Raises:
        RuntimeError: a process failed; its last lines are in the message.
    """
    jobs = [clip.job() for clip in clips if not (folder / clip.path).exists()]
    if not jobs:
        return
    listing = folder / "jobs.jsonl"
    listing.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    command = [str(assets / "environment" / "bin" / "python"), str(SPEAK), str(assets), str(listing), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, "--part", str(part), "--parts", str(workers)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for part in range(workers)
    ]
    failures = [process.communicate()[1].strip().splitlines()[-3:] for process in running]
    for process, lines in zip(running, failures):
        if process.returncode:
            raise RuntimeError(f"Speaking failed (exit code {process.returncode}): {' / '.join(lines)}")
    listing.unlink()


def human_prompts(folder: Path, count: int, seed: int, taught: Container[str]) -> list[dict[str, Any]]:
    """
    Manifest entries of recorded prompts, decoded with ffmpeg to 16 kHz WAV: a test set only.

    At most `count` prompts of three words or more, without sound effects, and none that is among the texts taught; no prompts, with a
    warning, where the Debian packages are not installed.
    """
    if not (_PROMPTS.is_dir() and _TRANSCRIPTS.is_file()):
        print("No human test set: install Debian's asterisk-core-sounds-en-g722, asterisk-core-sounds-en and ffmpeg.")
        return []
    lines = gzip.decompress(_TRANSCRIPTS.read_bytes()).decode("utf-8", "replace").splitlines()
    texts = dict(re.match(r"([^:;]+):\s*(.+)", line).groups() for line in lines if re.match(r"[^:;]+:\s*.+", line))
    usable = [
        (name, text.strip())
        for name, text in sorted(texts.items())
        if len(text.split()) >= 3 and not re.search(r"[<\[(*]", text) and (_PROMPTS / f"{name}.g722").is_file()
    ]
    entries = []
    for name, text in random.Random(f"{seed} human").sample(usable, min(count, len(usable))):
        if text in taught:
            continue
        path = folder / "human" / f"{name.replace('/', '-')}.wav"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            source = ["-f", "g722", "-i", str(_PROMPTS / f"{name}.g722")]
            subprocess.run(["ffmpeg", "-loglevel", "error", "-y", *source, "-ar", "16000", "-f", "wav", str(part)], check=True)
            os.replace(part, path)
        entries.append(
            {"id": name, "text": text, "kind": "sentence", "category": "prompt", "engine": "asterisk", "voice": "allison"}
            | {"split": "human", "path": f"human/{path.name}", "answer": ""}
        )
    return entries


def write_manifest(entries: list[dict[str, Any]], folder: Path) -> Path:
    """Writes `manifest.jsonl` of the entries whose file exists, with `duration` in seconds and `sha256`."""
    path, known = folder / "manifest.jsonl", {}
    if path.is_file():
        known = {entry["path"]: entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        for entry in tqdm(entries, desc="manifest", unit="clip"):
            audio = folder / entry["path"]
            if not audio.is_file():
                continue
            before = known.get(entry["path"], {})
            if {name: before.get(name) for name in entry} != entry:
                info = soundfile.info(audio)
                before = {"duration": round(info.frames / info.samplerate, 3), "sha256": sha256_of(audio)}
            file.write(json.dumps(entry | {name: before[name] for name in ("duration", "sha256")}, ensure_ascii=False) + "\n")
    os.replace(part, path)
    return path


def read_manifest(folder: str | Path) -> list[dict[str, Any]]:
    """
    The entries of a corpus folder's manifest.

    Raises:
        ValueError: the folder has none.
    """
    path = Path(folder) / "manifest.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no manifest.jsonl: make the corpus first (training/miniature/README.md).")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def agreement(entries: list[dict[str, Any]], reference: Path = REFERENCE) -> str:
    """How many of the reference's clips are here, and how many of those are the same to the bit; empty without a reference."""
    if not reference.is_file():
        return ""
    with lzma.open(reference, "rt", encoding="utf-8") as file:
        expected = {entry["path"]: entry["sha256"] for entry in map(json.loads, file)}
    made = {entry["path"]: entry["sha256"] for entry in entries if entry["path"] in expected}
    same = sum(expected[path] == digest for path, digest in made.items())
    return f"Of the {len(expected)} clips of the shipped miniature {len(made)} are here, {same} of them the same to the bit."


def make_corpus(folder: str | Path, plan: Plan, workers: int = 2, assets: str | Path | None = None) -> Path:
    """
    Speaks the whole plan.

    Args:
        folder: gets the clips and the manifest.
        plan: what to speak.
        workers: processes.
        assets (*optional*): folder of [`fetch_assets`]; `folder/assets` by default.

    Returns:
        The manifest's path.

    Raises:
        ValueError: a plan that cannot be made, assets that cannot be had.
        RuntimeError: a synthesis process failed.
    """
    clips, folder = make_plan(plan), Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    assets = fetch_assets(assets or folder / "assets")
    speak(clips, folder, assets, workers)
    taught = {clip.text for clip in clips if clip.split == "train"}
    return write_manifest([clip.entry() for clip in clips] + human_prompts(folder, plan.test + 30, plan.seed, taught), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--assets", type=Path, help="folder of the voices; FOLDER/assets by default")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    for name, value in vars(Plan()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = vars(parser.parse_args())
    folder, assets, workers = (options.pop(name) for name in ("folder", "assets", "workers"))
    try:
        manifest = make_corpus(folder, Plan(**options), workers, assets)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"Error: {error}") from error
    entries = read_manifest(folder)
    hours = sum(entry["duration"] for entry in entries) / 3600
    print(f"{len(entries)} clips, {hours:.2f} hours: {manifest}", agreement(entries), sep="\n")


if __name__ == "__main__":
    main()
