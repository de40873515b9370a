"""The untrained miniature: `python -m modeling_baichuan_audio.training.miniature.start ASSETS FOLDER`.

Whisper tiny.en and a text LLM with its own tokenizer, put together by the package's `build`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, WhisperConfig, WhisperModel

from ...conversion import build_checkpoint
from ...conversion.tiny import END_OF_TEXT
from ...processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT, TRANSCRIPTION_PROMPT
from .sentences import questions, sentences


VOCABULARY_SIZE = 2048
OVERRIDES = {
    "audio_tokenizer_config": {
        "codebook_sizes": [512, 256, 128, 128, 128, 128, 128, 128],
        "decoder_layers": 2,
        "decoder_ffn_dim": 576,
        "refine_channels": 64,
        "codebook_dropout": 0.25,
        "codebook_decay": 0.97,
        "codebook_restart_threshold": 0.2,
        "max_audio_seconds": 30,
    },
    "audio_head_config": {"num_hidden_layers": 2, "intermediate_size": 256},
    "flow_matching_config": {
        "prenet_hidden_size": 192,
        "prenet_layers": 2,
        "prenet_attention_heads": 3,
        "prenet_ffn_dim": 576,
        # Less than the 160 channels that it reads would have to forget some of them.
        "estimator_channels": 160,
        "estimator_blocks": 1,
        "estimator_mid_stages": 1,
        "estimator_attention_heads": 2,
        "estimator_head_dim": 64,
        # More than the released 0.7: words are understood better (README.md beside this file).
        "guidance": 1.5,
    },
    "vocoder_config": {
        "base_channels": 128,
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilations": [1, 3, 5],
        # A longer inverse STFT takes the place of a third stage, whose few channels at 6 kHz are slow on a CPU.
        "upsample_rates": [8, 5],
        "upsample_kernel_sizes": [16, 11],
        "source_resblock_kernel_sizes": [7, 11],
        "istft_n_fft": 48,
        "istft_hop_length": 12,
        "f0_channels": 128,
        "f0_layers": 4,
        # Overtones up to some 5 kHz in the source signal: more than a small network could add.
        "num_harmonics": 31,
        # More than the released 0.003: what a voice has above its overtones is breath.
        "noise_std": 0.01,
        "mel_loss_weight": 0.0,
        "stft_loss_weight": 0.0,
        "multi_scale_mel_loss_weight": 6.0,
        "f0_loss_weight": 0.1,
    },
}


def train_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of the domain's own text, in Qwen2's form."""
    lines = [text for line in [*questions(), *sentences(12_000)] for text in (line.text, line.answer) if text]
    lines += [TRANSCRIPTION_PROMPT, DEFAULT_VOICE_PROMPT] * 200  # said at every turn: a few tokens each
    splitter = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splitter.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE - 1, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    trained.train_from_iterator(lines, trainer)
    learnt = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges)


def make_text_llm(folder: Path, seed: int) -> Path:
    """An untrained Qwen2 of 4 layers with its tokenizer."""
    tokenizer = train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_theta=10_000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
            pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# OpenAI's names for the parts of a Whisper encoder, and transformers'.
_RENAMES = {
    "blocks": "layers",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
    ".attn_ln": ".self_attn_layer_norm",
    ".attn.query": ".self_attn.q_proj",
    ".attn.key": ".self_attn.k_proj",
    ".attn.value": ".self_attn.v_proj",
    ".attn.out": ".self_attn.out_proj",
    "ln_post": "layer_norm",
    "positional_embedding": "embed_positions.weight",
}


def make_whisper(checkpoint: Path, folder: Path) -> Path:
    """OpenAI's `tiny.en.pt` -> a folder that `build` takes an encoder from. The decoder is left as transformers initialises it."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    sizes = stored["dims"]
    config = WhisperConfig(
        num_mel_bins=sizes["n_mels"],
        d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"],
        encoder_attention_heads=sizes["n_audio_head"],
        encoder_ffn_dim=4 * sizes["n_audio_state"],
        max_source_positions=sizes["n_audio_ctx"],
        decoder_layers=1,
        decoder_attention_heads=sizes["n_text_head"],
        decoder_ffn_dim=4 * sizes["n_text_state"],
    )
    model, state = WhisperModel(config), {}
    for name, tensor in stored["model_state_dict"].items():
        if name.startswith("encoder."):
            for theirs, ours in _RENAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(name.startswith("encoder.") for name in missing):
        raise ValueError(f"{checkpoint} is not OpenAI's tiny.en: {unexpected or missing}")
    model.save_pretrained(folder)
    return folder


def make_start(assets: str | Path, folder: str | Path, seed: int = 0) -> Path:
    """
    Builds the untrained miniature.

    Args:
        assets: folder of `assets.fetch_assets`, for `tiny.en.pt`.
        folder: gets the checkpoint; it must not exist, or be empty.

    Raises:
        ValueError: `tiny.en.pt` is missing or something else, the folder is in use.
    """
    assets, folder = Path(assets), Path(folder).absolute()
    if not (assets / "tiny.en.pt").is_file():
        raise ValueError(f"{assets} holds no tiny.en.pt: make the corpus first.")
    scratch = folder.with_name(f".{folder.name}.parts")
    try:
        llm = make_text_llm(scratch / "llm", seed)
        whisper = make_whisper(assets / "tiny.en.pt", scratch / "whisper")
        report = build_checkpoint(llm, whisper, folder, overrides=OVERRIDES, seed=seed, dtype=torch.float32)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{report.parameters:,} parameters, {report.vocab_size} tokens: {folder}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        make_start(options.assets, options.folder, options.seed)
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
