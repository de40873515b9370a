"""transformers' and PEFT's own tests, fetched for the installed versions and laid out so that they run beside our testers.

Nothing of them is kept in this repository: the source distributions lie in the user's cache folder, and every run unpacks them into a
folder of its own. What the distributions leave out (generation tests, exporters, helpers of the multi-process tests) is replaced by
our `stand_ins`.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
NAME = "baichuan_audio"
# Where a stand-in takes the place of a file that the distribution lacks. Two of them are found by name only.
STAND_INS = {
    "generation.py": "tests/generation/test_utils.py",
    "exporters.py": "tests/exporters/test_export.py",
    "distributed.py": "tests/distributed_testing_utils.py",
    "configuration.py": "tests/utils/test_configuration_utils.py",
    "sounds.py": "utils/fetch_hub_objects_for_ci.py",
    "tiny_models.json": "tests/utils/tiny_model_summary.json",
}


class SourcesUnavailable(RuntimeError):
    """The source distributions could not be fetched; says why."""


def cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "baichuan-audio" / "conformance"


def fetch_sdist(package: str) -> Path:
    """The source distribution of the installed version of `package`, from the cache or else from the package index.

    Raises:
        SourcesUnavailable: it is not in the cache and cannot be downloaded.
    """
    wanted = version(package)
    kept = cache_folder() / f"{package}-{wanted}.tar.gz"
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--retries", "1", "--timeout", "20", "--no-binary", package, f"{package}=={wanted}", "--dest", folder]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired as error:
            raise SourcesUnavailable(f"The source distribution of {package} {wanted} did not arrive in five minutes.") from error
        found = list(Path(folder).glob(f"{package}-*.tar.gz"))
        if result.returncode or not found:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            reason = lines[-1] if lines else f"pip ended with status {result.returncode}"
            raise SourcesUnavailable(
                f"The tests of {package} {wanted} are not cached and the package index cannot be reached: {reason}"
            )
        os.replace(found[0], kept)
    return kept


def _unpack(archive: Path, wanted, target: Path) -> None:
    """Writes the files of `archive` for which `wanted(path)` names a place, a relative path, in `target`."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            place = wanted(member.name.partition("/")[2]) if member.isfile() else None
            if place:
                (target / place).parent.mkdir(parents=True, exist_ok=True)
                (target / place).write_bytes(tar.extractfile(member).read())


def build_tree(target: Path, with_peft: bool = True) -> list[Path]:
    """Fills the empty folder `target` and returns our test files in it, ready for pytest.

    Raises:
        SourcesUnavailable: see `fetch_sdist`.
    """
    _unpack(fetch_sdist("transformers"), lambda path: path if path.startswith("tests/") else None, target)
    if with_peft:
        files = {f"tests/testing_{name}.py": f"peft_tests/testing_{name}.py" for name in ("common", "utils")}
        _unpack(fetch_sdist("peft"), files.get, target)
    for name, place in STAND_INS.items():
        if not (target / place).exists():  # should a later distribution bring the file, it is used
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / "stand_ins" / name, target / place)

    # The tests import one another relatively, and processor tests find the model type in their file's name.
    ours = target / "tests" / "models" / NAME
    ours.mkdir(parents=True)
    testers = []
    for source in sorted((HERE / "testers").glob("*.py")):
        is_peft = source.stem == "peft"
        if source.stem == "shared":
            shutil.copy2(source, ours / source.name)
        elif with_peft or not is_peft:
            testers.append(ours / f"test_{source.stem}_{NAME}.py")
            shutil.copy2(source, testers[-1])
    for folder in {path.parent for path in target.rglob("*.py")} - {target}:
        for package in (folder, *folder.parents):
            if package == target:
                break
            (package / "__init__.py").touch()

    # One module looks for the library's sources beside the tests.
    (target / "src").mkdir()
    library = Path(importlib.util.find_spec("transformers").origin).parent
    os.symlink(library, target / "src" / "transformers", target_is_directory=True)
    (target / "pytest.ini").write_text("[pytest]\nfilterwarnings =\n    ignore\naddopts = -p no:cacheprovider\n")
    return testers
