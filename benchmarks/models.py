"""The models that are measured: a checkpoint, or random weights of a named size."""

from pathlib import Path

import torch

from modeling_baichuan_audio import (
    BaichuanAudioConfig,
    BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioForCausalLM,
    BaichuanAudioVocoder,
)
from modeling_baichuan_audio.conversion import find_checkpoint, tiny_config


SIZES = ("tiny", "mid", "released")
# Departures from the released geometry.
_MID = {
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 5376,
        "vocab_size": 32768,
    },
    "audio_head_config": {"hidden_size": 1024, "num_attention_heads": 8},
    "audio_tokenizer_config": {"encoder_layers": 4, "decoder_layers": 4},
    "flow_matching_config": {"prenet_layers": 3, "estimator_mid_stages": 2, "estimator_blocks": 2},
    "vocoder_config": {"base_channels": 128, "f0_channels": 128},
}


def make_config(size: str) -> BaichuanAudioConfig:
    """
    The whole model's: "tiny", "mid" (an LLM of 12 layers of width 1024; layers of the audio head and codebooks as released) or
    "released".
    """
    if size == "tiny":
        return tiny_config()
    if size == "released":
        return BaichuanAudioConfig(vocoder_config={})
    tokens = {name: value for name, value in tiny_config().to_dict().items() if name.endswith("_token_id")}
    return BaichuanAudioConfig(**_MID, **tokens)


def make_model(
    size: str = "tiny", checkpoint: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> BaichuanAudioForCausalLM:
    """
    A checkpoint (folder, Hub id, "miniature" or "untrained"), or random weights of a size: their values do not matter here.

    On the device "meta" nothing is allocated: for arithmetic.
    """
    if checkpoint is not None:
        return BaichuanAudioForCausalLM.from_pretrained(find_checkpoint(checkpoint), dtype=dtype).eval().to(device)
    with torch.device(device):
        torch.manual_seed(0)
        model = BaichuanAudioForCausalLM._from_config(make_config(size), dtype=dtype)
    return model.eval()


def make_flow(size: str = "tiny", checkpoint: str | Path | None = None, dtype=torch.float32) -> BaichuanAudioFlowMatchingDecoder:
    if checkpoint is not None:
        return BaichuanAudioFlowMatchingDecoder.from_pretrained(find_checkpoint(checkpoint), dtype=dtype).eval()
    torch.manual_seed(0)
    config = make_config(size).flow_matching_config
    return BaichuanAudioFlowMatchingDecoder._from_config(config, attn_implementation="sdpa").eval().to(dtype)


def make_vocoder(size: str = "tiny", checkpoint: str | Path | None = None) -> BaichuanAudioVocoder:
    if checkpoint is not None:
        return BaichuanAudioVocoder.from_pretrained(find_checkpoint(checkpoint)).eval()
    torch.manual_seed(0)
    return BaichuanAudioVocoder(make_config(size).vocoder_config).eval()
