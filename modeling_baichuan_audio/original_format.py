"""How the released checkpoints are written down, as data: config fields and tensor names, original -> ours.

Nothing here touches tensors. `configuration_baichuan_audio` reads original `config.json` files with it, the package registers the
names with transformers' on-the-fly weight conversion, and `conversion` rewrites checkpoints shard by shard with the same table.
"""

from typing import Any


ORIGINAL_MODEL_TYPE = "omni"

# Top-level keys of an original config.json that describe the LLM (Qwen2 geometry).
_TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "initializer_range",
    "vocab_size",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)

# Original `audio_config` key -> ours in `audio_tokenizer_config`.
_TOKENIZER_KEYS = {
    "sampling_rate": "sampling_rate",
    "num_mel_bins": "num_mel_bins",
    "n_fft": "n_fft",
    "hop_length": "hop_length",
    "max_audio_seconds": "max_audio_seconds",
    "d_model": "hidden_size",
    "encoder_layers": "encoder_layers",
    "encoder_attention_heads": "encoder_attention_heads",
    "encoder_ffn_dim": "encoder_ffn_dim",
    "kernel_size": "kernel_size",
    "stride_size": "stride_size",
    "avg_pooler": "downsample_factor",
    "decoder_layers": "decoder_layers",
    "decoder_attention_heads": "decoder_attention_heads",
    "decoder_ffn_dim": "decoder_ffn_dim",
    "decoder_kernel_size": "decoder_kernel_size",
    "decoder_stride_size": "decoder_stride_size",
}

# Original `flow_matching_config` key -> ours.
_FLOW_KEYS = {
    "prenet_in_dim": "input_size",
    "prenet_out_dim": "num_mel_bins",
    "prenet_d_model": "prenet_hidden_size",
    "prenet_nlayers": "prenet_layers",
    "prenet_attention_heads": "prenet_attention_heads",
    "prenet_ffn_dim": "prenet_ffn_dim",
    "prenet_activation_function": "prenet_hidden_act",
    "prenet_loss_weight": "prior_loss_weight",
    "sampling_rate": "sampling_rate",
    "hop_length": "hop_length",
    "n_blocks": "estimator_blocks",
    "num_mid_blocks": "estimator_mid_stages",
    "num_heads": "estimator_attention_heads",
    "attention_head_dim": "estimator_head_dim",
    "diffusion_steps": "num_steps",
}
_CFM_KEYS = {
    "sigma_min": "sigma_min",
    "t_scheduler": "time_schedule",
    "inference_cfg_rate": "guidance",
    "training_cfg_rate": "condition_dropout",
}

_SPECIAL_TOKENS = (
    "audio_start",
    "audio_end",
    "audio_pad",
    "audio_delim",
    "audiotext_start",
    "audiotext_end",
    "audiotext_pad",
    "audiogen_start",
    "audiogen_end",
)

# Settings of the original code that select another architecture. Only the released value is implemented.
_REQUIRED_VALUES = {
    "flow_matching_config": {
        "spk_emb_dim": 0,
        "unet_use_omni_attn": False,
        "use_hidden_states_before_dconv2": True,
        "prenet_target_mel_length_scale_ratio": 1.0,
    },
    "flow_matching_config.cfm_params": {"solver": "euler"},
    "audio_config": {"split_overlap": 0.0},
}


def _renamed(source: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: source[theirs] for theirs, ours in names.items() if theirs in source}


def _check_supported(section: str, values: dict[str, Any]) -> None:
    for key, allowed in _REQUIRED_VALUES[section].items():
        if values.get(key, allowed) != allowed:
            raise ValueError(f"Original config has {section}.{key}={values[key]!r}; only {allowed!r} is supported.")


def is_original_config(config: dict[str, Any]) -> bool:
    """True for the content of an original, flat `config.json` (Baichuan-Audio or Baichuan-Omni)."""
    return config.get("model_type") == ORIGINAL_MODEL_TYPE


def translate_config(original: dict[str, Any]) -> dict[str, Any]:
    """Original flat config -> nested `BaichuanAudioConfig` fields.

    Fields of the vision parts and of the demo are dropped; `eos_token_id`, `bos_token_id` and `pad_token_id` too, which the original
    never uses (generation_config.json has the real end-of-text id).

    Raises:
        ValueError: a part is missing, or a setting selects an architecture that was never released.
    """
    missing = [key for key in ("audio_config", "vocoder_config", "flow_matching_config") if not original.get(key)]
    if missing:
        raise ValueError(f"Original config lacks {', '.join(missing)}: is this a Baichuan-Audio checkpoint?")
    audio, refine, flow = original["audio_config"], original["vocoder_config"], original["flow_matching_config"]
    cfm = flow.get("cfm_params", {})
    _check_supported("audio_config", audio)
    _check_supported("flow_matching_config", flow)
    _check_supported("flow_matching_config.cfm_params", cfm)
    if original.get("use_norm_head") or original.get("sparse_attention_layers"):
        raise ValueError("Original config asks for a normalised lm_head or sparse attention layers, which are not supported.")
    if original.get("position_embedding_type", "rope") != "rope":
        raise ValueError(
            f"Original config has position_embedding_type={original['position_embedding_type']!r}; only 'rope' is supported."
        )

    text = {"model_type": "qwen2"} | {key: original[key] for key in _TEXT_KEYS if key in original}
    codebook_sizes = list(audio["vq_config"]["codebook_sizes"])
    channels = list(refine["channels"])
    if len(set(channels)) != 1:
        raise ValueError(f"Original config has refine-net channels {channels}; all must be equal.")
    if len(flow["channels"]) != 1:
        raise ValueError(f"Original config has flow_matching_config.channels {flow['channels']}; exactly one stage is supported.")

    tokenizer = _renamed(audio, _TOKENIZER_KEYS) | {
        "codebook_sizes": codebook_sizes,
        "refine_sampling_rate": refine["sampling_rate"],
        "refine_hop_length": refine["hop_length"],
        "refine_n_fft": refine["n_fft"],
        "num_output_mel_bins": refine["num_mel_bins"],
        "refine_channels": channels[0],
        "refine_layers": len(channels) - 1,
    }
    head = {
        "hidden_size": original["hidden_size"],
        "num_hidden_layers": audio["audio_head_transformer_layers"],
        "codebook_sizes": codebook_sizes,
        "rms_norm_eps": original["rms_norm_eps"],
    }
    flow_matching = _renamed(flow, _FLOW_KEYS) | _renamed(cfm, _CFM_KEYS) | {"estimator_channels": flow["channels"][0]}
    config = {
        "text_config": text,
        "audio_tokenizer_config": tokenizer,
        "audio_head_config": head,
        "flow_matching_config": flow_matching,
        "vocoder_config": None,
        "tie_word_embeddings": original.get("tie_word_embeddings", False),
        "initializer_range": original.get("initializer_range", 0.02),
    }
    for name in _SPECIAL_TOKENS:
        config[f"{name}_token_id"] = audio[f"{name}_token_id"]
    for key in ("dtype", "torch_dtype"):
        if key in original:
            config["dtype"] = original[key]
    return config


# Tensor names: (regular expression, replacement), every matching pair applied in order. No pattern matches one of our own names
# or a name inside any LLM backbone, so a converted checkpoint passes through unchanged.
KEY_RENAMES: list[tuple[str, str]] = [
    (r"^model\.(layers|norm|embed_tokens)\.", r"model.language_model.\1."),
    (r"^audio_tokenizer\.audio_model\.", r"model.audio_tokenizer.encoder."),
    (r"^audio_tokenizer\.audio_bridge_model\.vq_list\.", r"model.audio_tokenizer.quantizer.codebooks."),
    (r"^audio_tokenizer\.audio_bridge_model\.proj_decoder\.", r"model.audio_tokenizer.mel_decoder.in_proj."),
    (r"^audio_tokenizer\.audio_bridge_model\.", r"model.audio_tokenizer.bridge."),
    (r"(\.quantizer\.codebooks\.\d+)\.codebook\.", r"\1."),
    (r"^audio_tokenizer\.audio_decoder\.", r"model.audio_tokenizer.mel_decoder."),
    (r"\.post_net\.layers\.0\.", r".refine_net.convs.0."),
    (r"\.post_net\.layers\.3\.", r".refine_net.convs.1."),
    (r"\.post_net\.layers\.6\.", r".refine_net.convs.2."),
    (r"\.post_net\.layers\.9\.", r".refine_net.convs.3."),
    (r"\.post_net\.layers\.1\.", r".refine_net.norms.0."),
    (r"\.post_net\.layers\.4\.", r".refine_net.norms.1."),
    (r"\.post_net\.layers\.7\.", r".refine_net.norms.2."),
    (r"\.post_net\.layers\.10\.", r".refine_net.norms.3."),
    (r"\.post_net\.layers\.12\.", r".refine_net.out_conv."),
    (r"^audio_tokenizer\.audio_flow_matching_decoder\.prenet\.", r"flow_matching.prenet."),
    (r"\.prenet\.in_mlp\.0\.", r".prenet.in_fc1."),
    (r"\.prenet\.in_mlp\.2\.", r".prenet.in_fc2."),
    (r"\.prenet\.transformer_layers\.", r".prenet.layers."),
    (r"\.prenet\.final_norm\.", r".prenet.norm."),
    (r"^audio_tokenizer\.audio_flow_matching_decoder\.conditional_decoder\.", r"flow_matching.estimator."),
    (r"\.estimator\.down_blocks\.0\.", r".estimator.down_stage."),
    (r"\.estimator\.mid_blocks\.", r".estimator.mid_stages."),
    (r"\.estimator\.up_blocks\.0\.", r".estimator.up_stage."),
    (r"(\.(?:down_stage|up_stage|mid_stages\.\d+))\.0\.", r"\1.resnet."),
    (r"(\.(?:down_stage|up_stage|mid_stages\.\d+))\.1\.", r"\1.blocks."),
    (r"(\.(?:down_stage|up_stage))\.2\.", r"\1.conv."),
    (r"\.resnet\.mlp\.1\.", r".resnet.time_proj."),
    (r"(\.(?:block1|block2|final_block))\.block\.0\.", r"\1.conv."),
    (r"(\.(?:block1|block2|final_block))\.block\.2\.", r"\1.norm."),
    (r"\.attn1\.to_(q|k|v)\.", r".attn.\1_proj."),
    (r"\.attn1\.to_out\.0\.", r".attn.out_proj."),
    (r"(\.blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(\.blocks\.\d+)\.ff\.net\.0\.proj\.", r"\1.fc1."),
    (r"(\.blocks\.\d+)\.ff\.net\.2\.", r"\1.fc2."),
    (r"^audio_head\.transformer_layers\.", r"audio_head.layers."),
    (r"^audio_head\.headnorm\.", r"audio_head.norm."),
    (r"^(audio_head\.layers\.\d+)\.self_attention\.", r"\1.self_attn."),
    (r"^(audio_head\.layers\.\d+)\.layernorm1\.", r"\1.norm1."),
    (r"^(audio_head\.layers\.\d+)\.layernorm2\.", r"\1.norm2."),
]

# Fused tensors, after the renames: (name ending, endings of the pieces, dimension to cut along). Pieces are equal,
# except those of W_pack, whose sizes follow the number of attention and key/value heads.
NUM_CODEBOOKS = 8
KEY_SPLITS: list[tuple[str, list[str], int]] = [
    ("self_attn.W_pack.weight", [f"self_attn.{x}_proj.weight" for x in "qkv"], 0),
    ("self_attn.W_pack.bias", [f"self_attn.{x}_proj.bias" for x in "qkv"], 0),
    ("self_attn.in_proj_weight", [f"self_attn.{x}_proj.weight" for x in "qkv"], 0),
    ("self_attn.in_proj_bias", [f"self_attn.{x}_proj.bias" for x in "qkv"], 0),
    # One slice of the feed-forward weights for each codebook position, stored side by side in the original.
    ("linear1.weight", [f"mlps.{i}.fc1.weight" for i in range(NUM_CODEBOOKS)], 1),
    ("linear2.weight", [f"mlps.{i}.fc2.weight" for i in range(NUM_CODEBOOKS)], 1),
]

# Original tensors that are dropped on purpose (names before renaming).
DROPPED_KEYS: dict[str, str] = {
    r"(^|\.)positional_embedding$": "fixed sinusoids, computed where they are used (the flow-matching one is never used)",
    r"\.linear[12]\.bias$": "stored by the audio head, never added by it",
}
# The vision and video parts of the sibling Omni checkpoints.
VISION_KEYS = r"(^|\.)(visual|video|vision)[^.]*\."
