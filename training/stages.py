"""What each training stage trains, by parameter name, and LoRA with named targets.

Stages 1 and 2 and supervised fine-tuning are the paper's (section 3.2); the other five train the parts that make codes and sound.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from torch import nn

from ..modeling_baichuan_audio import BaichuanAudioForCausalLM


_AUDIO = (r"^model\.audio_embed_layers\.", r"^audio_head\.")
_LLM_BODY = r"^model\.language_model\."
_MEL_DECODER, _FLOW_MATCHING = r"^model\.audio_tokenizer\.mel_decoder\.", r"^flow_matching\."


@dataclass(frozen=True)
class Stage:
    """Patterns of the parameter names that a stage trains, and whether the text embedding and the text head stay as they are."""

    patterns: tuple[str, ...]
    keeps_text_embeddings: bool = False


STAGES = {
    "stage1": Stage(_AUDIO),
    "stage2": Stage((*_AUDIO, _LLM_BODY), keeps_text_embeddings=True),
    "sft": Stage((*_AUDIO, _LLM_BODY, r"^lm_head\.")),
    "tokenizer": Stage((r"^model\.audio_tokenizer\.",)),
    "mel_decoder": Stage((_MEL_DECODER,)),
    "flow_matching": Stage((_FLOW_MATCHING,)),
    "mel_and_flow": Stage((_MEL_DECODER, _FLOW_MATCHING)),
    "vocoder": Stage((r"^vocoder\.",)),
}
LORA_TARGETS = ("backbone", "audio_head", "both")
# What LoRA may train whole beside its low-rank pieces.
LORA_MODULES_TO_SAVE = ("audio_embed_layers", "audio_head", "lm_head", "embed_tokens")


def apply_stage(model: BaichuanAudioForCausalLM, stage: str, freeze: Sequence[str] = ()) -> list[str]:
    """
    Freezes everything but the stage's parameters.

    Args:
        stage: one of `STAGES`.
        freeze: beginnings of parameter names that stay as they are all the same, such as `"model.audio_tokenizer.encoder."`.

    Returns:
        Names of the parameters that train.

    Raises:
        ValueError: an unknown stage, one whose part the checkpoint lacks, or a name to freeze that no parameter has.
    """
    if stage not in STAGES:
        raise ValueError(f"Stage must be one of {', '.join(STAGES)} (or lora), got {stage!r}.")
    chosen = STAGES[stage]
    idle = [start for start in freeze if not any(name.startswith(start) for name, _ in model.named_parameters())]
    if idle:
        raise ValueError(f"Nothing to freeze is called {', '.join(idle)}; parameter names begin with one of the model's parts.")
    kept = {id(model.get_input_embeddings().weight), id(model.lm_head.weight)} if chosen.keeps_text_embeddings else set()
    trained = []
    for name, parameter in model.named_parameters():
        trains = any(re.search(pattern, name) for pattern in chosen.patterns) and id(parameter) not in kept
        trains = trains and not name.startswith(tuple(freeze))
        parameter.requires_grad_(trains)
        if trains:
            trained.append(name)
    if not trained:
        raise ValueError(f"Stage {stage!r} has nothing to train in this checkpoint: it lacks that part.")
    return trained


def _linear_names(module: nn.Module) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)})


def lora_config(
    model: BaichuanAudioForCausalLM,
    target: str = "backbone",
    rank: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    modules_to_save: list[str] | None = None,
) -> LoraConfig:
    """
    LoRA (arXiv 2106.09685) on the linear layers of named parts.

    Args:
        target: "backbone" (every linear layer of the LLM body), "audio_head" (of the depth transformer), or "both".
        rank, alpha, dropout: as usual; alpha is twice the rank by default.
        modules_to_save: parts to train whole: any of `LORA_MODULES_TO_SAVE`.

    Raises:
        ValueError: an unknown target or part, or a part that is a target too.
    """
    if target not in LORA_TARGETS:
        raise ValueError(f"LoRA target must be one of {', '.join(LORA_TARGETS)}, got {target!r}.")
    saved = list(modules_to_save or [])
    unknown = [name for name in saved if name not in LORA_MODULES_TO_SAVE]
    if unknown:
        raise ValueError(f"`modules_to_save` may hold {', '.join(LORA_MODULES_TO_SAVE)}, got {', '.join(unknown)}.")
    if "audio_head" in saved and target != "backbone":
        raise ValueError("The audio head is either a LoRA target or trained whole, not both.")
    if "audio_embed_layers" in saved:  # peft wraps modules, not lists of them
        tables = [f"audio_embed_layers.{index}" for index in range(len(model.model.audio_embed_layers))]
        saved = [name for name in saved if name != "audio_embed_layers"] + tables
    patterns = []
    if target in ("backbone", "both"):
        patterns.append(rf"model\.language_model\..*\.({'|'.join(_linear_names(model.model.language_model))})")
    if target in ("audio_head", "both"):
        patterns.append(rf"audio_head\.layers\..*\.({'|'.join(_linear_names(model.audio_head.layers))})")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="|".join(f"({pattern})" for pattern in patterns),
        modules_to_save=saved or None,
    )
