"""Checkpoint -> self-contained Hub folder: weights in shards, config with every Auto class, code, tokenizer, processor, card."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from .convert import ConversionReport, convert_checkpoint, find_checkpoint


MAX_SHARD_SIZE = 5_000_000_000


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    push: str | None = None,
    private: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """
    Writes a folder that loads without this package (`trust_remote_code=True`), and with it as any other checkpoint.

    Args:
        checkpoint: folder or Hub id, original or converted; a fine-tuned copy counts as converted.
        output: folder to make; it must not exist, or be empty. It is written under a temporary name and then moved.
        push (*optional*): Hub repository to upload it to; made where it does not exist, `private` or not.
        max_shard_size: most bytes of a weight file.
        progress: called with bytes written and bytes in all.

    Raises:
        ValueError: a checkpoint without a tokenizer, or anything that `convert_checkpoint` refuses: nothing has been written then;
            or an upload that failed: the folder is complete.
    """
    if push is not None:
        validate_repo_id(push)
    source = find_checkpoint(checkpoint)
    if (source / "config.json").is_file() and not (source / "tokenizer_config.json").is_file():
        raise ValueError(f"{checkpoint} has no tokenizer: save its processor there too (`processor.save_pretrained`).")
    report = convert_checkpoint(source, output, progress=progress, max_shard_size=max_shard_size)
    if push is not None:
        try:
            api = HfApi()
            repository = api.create_repo(push, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repository, folder_path=output, commit_message="Upload model")
        except Exception as error:  # many kinds: offline, no token, no right to write
            raise ValueError(f"{output} is written, but cannot be pushed to {push}: {error}") from error
    return report
