"""Writing a checkpoint folder, or a text, all at once; the digest of a file."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_checkpoint(
    model, processor, folder: Path, replace: bool = False, finish: Callable[[Path], None] | None = None, **settings: Any
) -> None:
    """
    Writes model and processor under a temporary name beside `folder`, then moves them there.

    Args:
        replace: whether a folder with content may be in the way; it is deleted then.
        finish (*optional*): called with the temporary folder before it is moved.
        settings: further arguments of the model's `save_pretrained`.

    Raises:
        OSError: the folder has content and is not to be replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(part, **settings)
        processor.save_pretrained(part)
        if finish is not None:
            finish(part)
        os.chmod(part, 0o755)
        if folder.exists():
            shutil.rmtree(folder) if replace else folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name beside it, then moves it there; what was there keeps its mode."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    if path.exists():
        os.chmod(part, path.stat().st_mode & 0o777)
    part.replace(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
