import json

import pytest
from helpers.golden import golden_json
from transformers import AutoConfig

from modeling_baichuan_audio import (
    BaichuanAudioConfig,
    BaichuanAudioFlowMatchingConfig,
    BaichuanAudioHeadConfig,
    BaichuanAudioTokenizerConfig,
    BaichuanAudioVocoderConfig,
)
from modeling_baichuan_audio.conversion import tiny_config


def test_defaults_are_the_released_model():
    config = BaichuanAudioConfig()
    text, tokenizer, flow = config.text_config, config.audio_tokenizer_config, config.flow_matching_config
    assert (text.model_type, text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == ("qwen2", 28, 3584, 28)
    assert (text.num_key_value_heads, text.intermediate_size, text.vocab_size) == (4, 18944, 152064)
    assert text.rope_parameters["rope_theta"] == 1e6 and not config.tie_word_embeddings
    assert tokenizer.codebook_sizes == [8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024]
    assert (tokenizer.frame_rate, tokenizer.quantizer_size, tokenizer.max_mel_frames) == (12.5, 5120, 3000)
    assert (config.audio_head_config.num_attention_heads, config.audio_head_config.num_hidden_layers) == (28, 3)
    assert (flow.num_steps, flow.guidance, flow.time_schedule, flow.attention_chunk_size) == (10, 0.7, "cosine", 100)
    assert config.vocoder_config is None and BaichuanAudioVocoderConfig().hop_length == 480
    assert config.special_token_ids == [151657, 151658, 151659, 151674, 151675, 151676, 151677, 151678, 151679]


def test_original_config_is_translated():
    config = BaichuanAudioConfig.from_dict(golden_json()["config"])
    assert config.model_type == "baichuan_audio"
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (256, 330)
    assert config.text_config.head_dim == 32
    assert config.audio_tokenizer_config.hidden_size == 64
    assert config.audio_tokenizer_config.max_audio_seconds == 4
    assert (config.audio_tokenizer_config.refine_channels, config.audio_tokenizer_config.refine_layers) == (24, 4)
    assert (config.audio_head_config.num_hidden_layers, config.audio_head_config.num_attention_heads) == (2, 2)
    assert (config.flow_matching_config.estimator_channels, config.flow_matching_config.estimator_blocks) == (32, 2)
    assert (config.audio_pad_token_id, config.audiogen_start_token_id) == (302, 321)


def test_json_round_trip(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "baichuan_audio"
    again = BaichuanAudioConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()
    part = BaichuanAudioTokenizerConfig.from_pretrained(tmp_path)
    assert part.codebook_sizes == config.audio_tokenizer_config.codebook_sizes


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (BaichuanAudioTokenizerConfig, {"hidden_size": 100, "encoder_attention_heads": 3}, "multiple of"),
        (BaichuanAudioTokenizerConfig, {"codebook_sizes": []}, "at least one codebook"),
        (BaichuanAudioTokenizerConfig, {"codebook_sizes": [8, 1]}, "at least one codebook"),
        (BaichuanAudioTokenizerConfig, {"max_audio_seconds": 0}, "must be positive"),
        (BaichuanAudioTokenizerConfig, {"kernel_size": 4}, "must be odd"),
        (BaichuanAudioTokenizerConfig, {"decoder_kernel_size": 1}, "at least `decoder_stride_size`"),
        (BaichuanAudioHeadConfig, {"num_attention_heads": 5}, "multiple of"),
        (BaichuanAudioFlowMatchingConfig, {"num_steps": 0}, "must be positive"),
        (BaichuanAudioFlowMatchingConfig, {"guidance": -0.1}, "must not be negative"),
        (BaichuanAudioFlowMatchingConfig, {"condition_dropout": 1.0}, r"\[0, 1\)"),
        (BaichuanAudioVocoderConfig, {"upsample_rates": [8, 5]}, "must have 2 entries"),
        (BaichuanAudioVocoderConfig, {"upsample_kernel_sizes": [15, 11, 7]}, "even number"),
        (BaichuanAudioVocoderConfig, {"base_channels": 100}, "divisible by"),
        (BaichuanAudioVocoderConfig, {"resblock_kernel_sizes": [3, 4]}, "must be odd"),
    ],
)
def test_impossible_parts_are_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_head_config": {"hidden_size": 128, "codebook_sizes": [64, 32, 16, 16, 16, 16, 16, 16]}}, "must be the LLM's"),
        ({"audio_head_config": {"hidden_size": 64, "codebook_sizes": [64, 32]}}, "must be the tokenizer's"),
        ({"flow_matching_config": {"input_size": 48}}, "must be the tokenizer's `hidden_size`"),
        ({"sampling_rate": 16000}, "must be the flow-matching mel's"),
        ({"vocoder_config": {"upsample_rates": [8, 5, 2], "upsample_kernel_sizes": [16, 11, 6]}}, "vocoder's mel bins"),
        ({"audio_pad_token_id": 257}, "share an id|outside"),
        ({"audio_pad_token_id": 5000}, "outside the vocabulary"),
    ],
)
def test_contradicting_parts_are_refused(settings, message):
    if settings == {"audio_pad_token_id": 257}:
        settings = {"audio_pad_token_id": tiny_config().audio_end_token_id}
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_the_audio_head_follows_the_language_model():
    settings = tiny_config().to_dict()
    for name in ("model_type", "audio_head_config"):
        settings.pop(name)
    head = BaichuanAudioConfig(**settings).audio_head_config
    assert (head.hidden_size, head.codebook_sizes) == (64, [64, 32, 16, 16, 16, 16, 16, 16])
