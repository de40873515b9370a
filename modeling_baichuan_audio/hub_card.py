"""The model card of a saved checkpoint: README.md with the metadata that the Hub reads, what the checkpoint holds, how it is used."""

import re
from pathlib import Path

from transformers import PreTrainedModel


METADATA = """\
library_name: transformers
pipeline_tag: any-to-any
license: apache-2.0
language: [zh, en]
tags: [speech, audio, text-to-speech, automatic-speech-recognition, baichuan-audio]
"""
# In the package's own card: what a checkpoint's card leaves out, and where it says what it holds.
_SKIPPED = r"<!-- here-only:start -->.*?<!-- here-only:end -->\n*"
_PLACE = "<!-- checkpoint -->"
_MADE_HERE = "<!-- Made by baichuan-audio, and made anew on saving: delete this line to keep your changes. -->"
# Cards that nobody wrote: ours, and the one that transformers makes up where a repository has none.
_AUTOMATIC = (_MADE_HERE, "This model card has been automatically generated")

_USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoProcessor

# With the package `modeling_baichuan_audio` imported, the code comes from there and `trust_remote_code` is not needed.
model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "audio", "path": "question.wav"}]}],
    tokenize=True, return_dict=True, add_generation_prompt=True, speech=True,
)
"""
_SPOKEN = """\
reply = model.generate(**inputs, generation_mode="audio", seed=0)
processor.save_audio(reply.audio[0], "answer.wav")
```

| pipeline | from | to |
|---|---|---|
| `any-to-any` | chats of text and speech | text, or with `generation_mode="audio"` speech |
| `text-to-audio` | text | speech |
| `flow-matching-vocoder` | audio codes | sound; the LLM is not loaded |
"""
_SILENT = """\
reply = model.generate(**inputs, generation_mode="audio", output_audio=False, seed=0)  # codes: this checkpoint has no vocoder
```
"""
_INTRODUCTION = """\
# Baichuan-Audio

An end-to-end speech language model ([arXiv 2502.17239](https://arxiv.org/abs/2502.17239)): speech and text in, speech and text out.

"""


def package_card() -> str | None:
    """The text of `model_card.md` without its metadata; None where the code came out of a checkpoint's folder, which has none."""
    for folder in Path(__file__).parents[:2]:  # installed, it lies in the package; in a checkout beside it
        if (folder / "model_card.md").is_file():
            text = (folder / "model_card.md").read_text(encoding="utf-8")
            return re.sub(r"\A---\n.*?\n---\n+", "", text, flags=re.DOTALL)
    return None


def checkpoint_card(model: PreTrainedModel) -> str:
    """The card of a checkpoint of `model`, a [`BaichuanAudioForCausalLM`] on any device."""
    config, tokenizer = model.config, model.config.audio_tokenizer_config
    parts = {
        f"language model ({config.text_config.model_type})": [model.model.language_model, model.lm_head],
        "audio embeddings": [model.model.audio_embed_layers],
        "audio tokenizer": [model.audio_tokenizer],
        "audio head": [model.audio_head],
        "flow matching": [model.flow_matching],
        "vocoder": [model.vocoder] if model.vocoder is not None else [],
    }
    rows = ""
    for name, modules in parts.items():
        parameters = {parameter for module in modules for parameter in module.parameters()}  # a tied one counts once
        count = f"{sum(parameter.numel() for parameter in parameters):,}" if parameters else "none"
        rows += f"| {name} | {count} |\n"
    held = (
        f"## This checkpoint\n\n| part | parameters |\n|---|---|\n{rows}\n"
        f"Codes: {tokenizer.num_codebooks} codebooks of {', '.join(map(str, tokenizer.codebook_sizes))} entries, "
        f"{tokenizer.frame_rate:g} frames a second. Audio in: {tokenizer.sampling_rate} Hz, in chunks of at most "
        f"{tokenizer.max_audio_seconds} s; audio out: {config.sampling_rate} Hz.\n\n"
    )
    held += _USE + (_SPOKEN if model.vocoder is not None else _SILENT)
    card = package_card()
    body = f"{_INTRODUCTION}{_PLACE}\n" if card is None else re.sub(_SKIPPED, "", card, flags=re.DOTALL)
    # Relative links lead nowhere from here.
    body = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", body)
    return f"---\n{METADATA}---\n\n{_MADE_HERE}\n\n{body.replace(_PLACE, held.rstrip())}"


def write_card(folder: str | Path, model: PreTrainedModel) -> None:
    """Writes README.md, unless there is one that somebody wrote."""
    path = Path(folder) / "README.md"
    if not path.is_file() or any(mark in path.read_text(encoding="utf-8") for mark in _AUTOMATIC):
        path.write_text(checkpoint_card(model), encoding="utf-8")


__all__ = ["checkpoint_card", "package_card", "write_card"]
