"""Everything of a checkpoint folder but its weights: config, code files, generation config, tokenizer, processor, model card."""

import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_baichuan_audio import BaichuanAudioConfig
from ..generation_baichuan_audio import set_generation_defaults
from ..hub_card import write_card
from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..original_format import is_original_config
from ..processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor


def save_companions(source: Path, target: Path, config: BaichuanAudioConfig) -> None:
    """
    Writes the companions of a checkpoint with `config`, from those of the original or converted checkpoint `source`.

    Args:
        source: folder with the tokenizer and, where it has them, processor, generation config, licence and model card.
        target: folder to write into; what is there is replaced.
    """
    with torch.device("meta"):
        model = BaichuanAudioForCausalLM(config)
    config.architectures = [BaichuanAudioForCausalLM.__name__]
    model.set_auto_map()
    custom_object_save(model, target, config=config)
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    else:
        generation = GenerationConfig()
    set_generation_defaults(generation)
    if (source / "tokenizer_config.json").is_file():
        processor = BaichuanAudioProcessor.from_pretrained(source)
        processor.save_pretrained(target)
        if generation.audio_switch_token_ids is None:
            generation.audio_switch_token_ids = processor.audio_switch_token_ids()
        if generation.eos_token_id is None:
            generation.eos_token_id = processor.tokenizer.eos_token_id
        if generation.pad_token_id is None:
            generation.pad_token_id = processor.tokenizer.pad_token_id
    else:  # a model saved without its processor has none to carry along
        del config.auto_map["AutoProcessor"]
        try:
            BaichuanAudioFeatureExtractor.from_pretrained(source).save_pretrained(target)
        except OSError:
            del config.auto_map["AutoFeatureExtractor"]
    generation.save_pretrained(target)
    config.save_pretrained(target)
    original = is_original_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    # A card that somebody wrote goes with the checkpoint; that of an original one describes other code.
    for name in ("LICENSE", "NOTICE") if original else ("LICENSE", "NOTICE", "README.md"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    write_card(target, model)
