"""A small, seeded, untrained checkpoint with every part present: for tests, for trying the commands, for learning the code."""

import os
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from ..configuration_baichuan_audio import BaichuanAudioConfig
from ..processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from ..processors.processing_baichuan_audio import ASSISTANT_TOKEN, SPECIAL_TOKENS, SYSTEM_TOKEN, USER_TOKEN
from .files import save_checkpoint


END_OF_TEXT = "<|endoftext|>"
TINY_VERSION = 2


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer without merges: 256 bytes, then the special tokens."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special = [END_OF_TEXT, SYSTEM_TOKEN, "<B_USYS>", USER_TOKEN, ASSISTANT_TOKEN, *SPECIAL_TOKENS.values()]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer


def tiny_config(**overrides) -> BaichuanAudioConfig:
    """Under a million parameters; ids as in `tiny_tokenizer`."""
    vocabulary = tiny_tokenizer().get_vocab()
    codebook_sizes = [64, 32, 16, 16, 16, 16, 16, 16]
    settings = {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 288,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        "audio_tokenizer_config": {
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64,
            "codebook_sizes": codebook_sizes,
            "refine_channels": 16,
        },
        "audio_head_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "codebook_sizes": codebook_sizes,
        },
        "flow_matching_config": {
            "input_size": 32,
            "prenet_hidden_size": 32,
            "prenet_layers": 2,
            "prenet_attention_heads": 2,
            "prenet_ffn_dim": 64,
            "estimator_channels": 32,
            "estimator_blocks": 1,
            "estimator_mid_stages": 2,
            "estimator_attention_heads": 2,
            "estimator_head_dim": 16,
        },
        "vocoder_config": {"base_channels": 32, "f0_channels": 32},
        # Wide enough that attention is not uniform and errors in masks or positions show.
        "initializer_range": 0.1,
    }
    for name, token in SPECIAL_TOKENS.items():
        settings[f"{name}_token_id"] = vocabulary[token]
    for part in ("audio_tokenizer_config", "audio_head_config", "flow_matching_config", "vocoder_config"):
        settings[part]["initializer_range"] = settings["initializer_range"]
    settings["text_config"]["initializer_range"] = settings["initializer_range"]
    return BaichuanAudioConfig(**(settings | overrides))


def tiny_processor() -> BaichuanAudioProcessor:
    return BaichuanAudioProcessor(BaichuanAudioFeatureExtractor(), tiny_tokenizer())


def tiny_model(seed: int = 0, config: BaichuanAudioConfig | None = None):
    """A seeded random model in evaluation mode; the caller's random state is left alone."""
    from ..modeling_baichuan_audio import BaichuanAudioForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BaichuanAudioForCausalLM(config or tiny_config()).eval()


def make_tiny_checkpoint(folder: str | Path, seed: int = 0) -> Path:
    """Writes the untrained checkpoint with its processor; short replies are set in its generation config."""
    folder = Path(folder)
    model, processor = tiny_model(seed), tiny_processor()
    with torch.no_grad():  # an untrained vocoder is a buzz: keep it quiet
        model.vocoder.conv_post.bias.sub_(4.0)
    generation = model.generation_config
    generation.eos_token_id = generation.pad_token_id = processor.tokenizer.eos_token_id
    generation.audio_switch_token_ids = processor.audio_switch_token_ids()
    generation.max_new_tokens, generation.max_text_tokens, generation.max_audio_frames = 96, 16, 25
    save_checkpoint(model, processor, folder, replace=True)
    return folder


def untrained_checkpoint() -> Path:
    """The untrained checkpoint in the user's cache folder, made there once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "baichuan-audio" / f"untrained-{TINY_VERSION}"
    return folder if (folder / "config.json").is_file() else make_tiny_checkpoint(folder)
