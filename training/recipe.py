"""A training recipe: a YAML file, checked before anything is loaded, with `key=value` changes from the command line."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .stages import LORA_TARGETS, STAGES


SHIPPED_RECIPES = Path(__file__).parent / "recipes"
LLM_STAGES = ("stage1", "stage2", "sft", "lora")


@dataclass
class DataRecipe:
    """
    Args:
        train, eval: JSONL or Parquet files, folders written by `datasets`, or Hub ids; see docs/data.md.
        streaming: read rows as they come instead of loading the data set.
        max_tokens: longer rows are skipped (LLM stages). max_seconds: longer recordings are skipped (the other stages).
        pack: fill rows of `max_tokens` with several samples, without attention between them.
        group_by_length: batches of rows of similar length.
        on_error: "skip" (count and report broken rows) or "raise".
    """

    train: str | list[str] = ""
    eval: str | list[str] | None = None
    streaming: bool = False
    max_tokens: int = 4096
    max_seconds: float = 30.0
    pack: bool = False
    group_by_length: bool = True
    on_error: str = "skip"


@dataclass
class LoraRecipe:
    """See `stages.lora_config`."""

    target: str = "backbone"
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    modules_to_save: list[str] = field(default_factory=list)


@dataclass
class SampleRecipe:
    """Audio written while training: every `every` optimiser steps (0 for never), of these texts (LLM stages) or of this many clips."""

    every: int = 0
    texts: list[str] = field(default_factory=list)
    clips: int = 2


@dataclass
class Recipe:
    """
    Args:
        stage: "stage1", "stage2", "sft", "lora", "tokenizer", "mel_decoder", "flow_matching", "mel_and_flow" or "vocoder".
        model: checkpoint to start from; also "miniature" or "untrained", see `conversion.find_checkpoint`.
        output: folder for checkpoints, metrics and the result.
        dtype: of the weights in training, "float32" or "bfloat16"; `training: {bf16: true}` computes in bfloat16 with float32 weights.
        attn_implementation: as `from_pretrained` takes it; transformers' choice where it is null.
        loss: options of the stage's loss; `audio_frames` (LLM stages) takes the audio loss over that many frames of a batch.
        training: any argument of `transformers.TrainingArguments`.
        freeze: beginnings of parameter names that stay as they are although the stage trains them.
        seed: of initialisation, data order and every draw.
    """

    stage: str
    model: str
    output: str
    data: DataRecipe
    lora: LoraRecipe | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    samples: SampleRecipe = field(default_factory=SampleRecipe)
    training: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn_implementation: str | None = None
    freeze: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self):
        stages = [*STAGES, "lora"]
        if self.stage not in stages:
            raise ValueError(f"`stage` must be one of {', '.join(stages)}, got {self.stage!r}.")
        if (self.stage == "lora") != (self.lora is not None):
            raise ValueError("A `lora` section belongs to `stage: lora`, and to no other.")
        if self.lora is not None and self.lora.target not in LORA_TARGETS:
            raise ValueError(f"`lora.target` must be one of {', '.join(LORA_TARGETS)}, got {self.lora.target!r}.")
        for name in ("model", "output"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"`{name}` must name a folder, got {getattr(self, name)!r}.")
        if not isinstance(self.freeze, list) or not all(isinstance(name, str) and name for name in self.freeze):
            raise ValueError(f"`freeze` must be a list of beginnings of parameter names, got {self.freeze!r}.")
        if self.freeze and self.stage == "lora":
            raise ValueError("`freeze` is for the stages that train whole parameters, not for lora.")
        if not self.data.train:
            raise ValueError("`data.train` must name the training data.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'`dtype` must be "float32" or "bfloat16", got {self.dtype!r}.')
        if self.attn_implementation is not None and (
            not isinstance(self.attn_implementation, str) or not self.attn_implementation
        ):
            raise ValueError(f"`attn_implementation` must be a name or null, got {self.attn_implementation!r}.")
        if self.data.on_error not in ("skip", "raise"):
            raise ValueError(f'`data.on_error` must be "skip" or "raise", got {self.data.on_error!r}.')
        for name in ("max_tokens", "max_seconds"):
            if getattr(self.data, name) <= 0:
                raise ValueError(f"`data.{name}` must be positive, got {getattr(self.data, name)}.")
        if self.data.pack and self.stage not in LLM_STAGES:
            raise ValueError(f"`data.pack` is for the stages {', '.join(LLM_STAGES)}, not for {self.stage}.")


_SECTIONS = {"data": DataRecipe, "lora": LoraRecipe, "samples": SampleRecipe}


def _build(cls, values: Any, section: str):
    if not isinstance(values, dict):
        raise ValueError(f"`{section}` must be a mapping, got {values!r}.")
    allowed = [item.name for item in fields(cls)]
    unknown = [name for name in values if name not in allowed]
    if unknown:
        raise ValueError(f"Unknown {section} entries {', '.join(map(str, unknown))}; there are {', '.join(allowed)}.")
    for item in fields(cls):  # YAML says 1e-4 for a string and 1 for an int where a float is meant
        if item.type in (int, float) and item.name in values and not isinstance(values[item.name], (int, float)):
            raise ValueError(f"`{section}.{item.name}` must be a number, got {values[item.name]!r}.")
        if item.type is bool and item.name in values and not isinstance(values[item.name], bool):
            raise ValueError(f"`{section}.{item.name}` must be true or false, got {values[item.name]!r}.")
    return cls(**values)


def _as_meant(name: str, value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string, and the strategy `no` as false."""
    if value is False and name.endswith("_strategy"):
        return "no"
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_recipe(path: str | Path, changes: list[str] | None = None) -> Recipe:
    """
    Reads a recipe.

    Args:
        path: YAML file, or the name of a shipped recipe ("stage1", "tiny/stage1").
        changes: `section.key=value` strings, values in YAML; they win over the file.

    Raises:
        ValueError: no such file, not YAML, unknown entries, or settings that contradict one another; the message names them.
    """
    shipped = SHIPPED_RECIPES / Path(path).with_suffix(".yaml")
    path = Path(path) if Path(path).is_file() or not shipped.is_file() else shipped
    if not path.is_file():
        found = [item.relative_to(SHIPPED_RECIPES).with_suffix("") for item in SHIPPED_RECIPES.rglob("*.yaml")]
        names = sorted(str(name) for name in found if name.parts[0] != "accelerate")
        raise ValueError(f"Recipe {path} does not exist; the package has {', '.join(names)}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {path} must be a mapping of settings.")
    for change in changes or []:
        key, separator, text = change.partition("=")
        if not separator or not key:
            raise ValueError(f"A change is written key=value, got {change!r}.")
        target, *rest = key.split(".")
        place = values
        while rest:
            place = place.setdefault(target, {})
            if not isinstance(place, dict):
                raise ValueError(f"{change!r} reaches into {target}, which is no section.")
            target, *rest = rest
        place[target] = yaml.safe_load(text)
    for name, cls in _SECTIONS.items():
        if values.get(name) is not None:
            values[name] = _build(cls, values[name], name)
    if isinstance(values.get("training"), dict):
        values["training"] = {name: _as_meant(name, value) for name, value in values["training"].items()}
    values.setdefault("data", DataRecipe())
    missing = [name for name in ("stage", "model", "output") if name not in values]
    if missing:
        raise ValueError(f"Recipe {path} lacks {', '.join(missing)}.")
    return _build(Recipe, values, "recipe")
