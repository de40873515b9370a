"""Trained parts -> one checkpoint: `python -m modeling_baichuan_audio.training.miniature.assemble FOLDER --llm ... --tokenizer ...`.

Every part but the vocoder is rounded to bfloat16, so that what is trained on a tokenizer's codes meets the same codes in the release.
`--release` also stores them so: two bytes a weight (float16 for the vocoder), without the codebooks' running sums, which follow from
their entries. In memory everything is float32 again.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from ...configuration_baichuan_audio import BaichuanAudioConfig
from ...conversion.files import save_checkpoint
from ...modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from ...modeling_baichuan_audio import BaichuanAudioForCausalLM
from ...modeling_flow_matching import BaichuanAudioFlowMatchingDecoder
from ...modeling_vocoder import BaichuanAudioVocoder


_LARGEST_FILE = "24MB"
# Answers of so small a domain are known, not invented: text and frames are the most likely ones, numbers may repeat their digits.
# A reply decides for itself when to speak: it has learnt to finish a sentence first.
_GENERATION = {
    "top_k": 1,
    "repetition_penalty": 1.0,
    "later_text_top_k": 1,
    "later_text_repetition_penalty": 1.0,
    "audio_top_k": 1,
    "audio_repetition_penalty": 1.0,
    "audio_switch_token_ids": [],
    "max_audio_frames": 150,
    "max_new_tokens": 512,
}
_PARTS = {
    "audio_tokenizer": BaichuanAudioTokenizerModel,
    "flow_matching": BaichuanAudioFlowMatchingDecoder,
    "vocoder": BaichuanAudioVocoder,
}


def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the two bytes a weight that it is released in."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float16 if name.startswith("vocoder.") else torch.bfloat16)


def _replace(model: BaichuanAudioForCausalLM, name: str, source: str | Path) -> None:
    """Puts the part in with its own config. The config of the whole refuses parts that do not fit one another."""
    part = _PARTS[name].from_pretrained(source, dtype=torch.float32)
    setattr(model.model if name == "audio_tokenizer" else model, name, part)
    setattr(model.config, f"{name}_config", part.config)
    try:
        BaichuanAudioConfig.from_dict(model.config.to_dict())
    except ValueError as error:
        raise ValueError(f"The {name} of {source} does not fit: {error}") from error


def _remove_code(folder: Path) -> None:
    """
    Takes out the copies of the code that a folder for the Hub carries, and what points to them: the package is at hand. Weights become
    readable by all, as they have to be once installed.
    """
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            part.pop("auto_map", None)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def assemble(
    folder: str | Path,
    llm: str | Path,
    release: bool = False,
    **parts: str | Path | None,
) -> Path:
    """
    Writes the checkpoint.

    Args:
        folder: to make, or to replace.
        llm: checkpoint with the LLM, its audio embeddings and head, and every part that is not named otherwise.
        release: store it in two bytes a weight.
        parts: checkpoints to take `audio_tokenizer`, `flow_matching` and `vocoder` from.

    Raises:
        ValueError: a checkpoint that lacks tensors, or parts of other sizes.
    """
    model, processor = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), AutoProcessor.from_pretrained(llm)
    for name, source in parts.items():
        if source is not None:
            _replace(model, name, source)
            getattr(model.config, f"{name}_config")._name_or_path = ""  # a folder of whoever trains says nothing to others
    tied = set(model.all_tied_weights_keys)
    state = {name: stored(name, tensor) for name, tensor in model.state_dict().items() if name not in tied}
    if release:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".embed_avg")}
    else:
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.generation_config.update(**_GENERATION)
    folder = Path(folder).absolute()
    save_checkpoint(
        model,
        processor,
        folder,
        replace=True,
        finish=_remove_code if release else None,
        state_dict=state,
        max_shard_size=_LARGEST_FILE,
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llm", type=Path, required=True, help="checkpoint with the LLM and whatever is not named below")
    for name in _PARTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help="checkpoint to take this part from")
    parser.add_argument("--release", action="store_true", help="store two bytes a weight, in files below 25 MB")
    options = vars(parser.parse_args())
    try:
        folder = assemble(**options)
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB: {folder}")


if __name__ == "__main__":
    main()
