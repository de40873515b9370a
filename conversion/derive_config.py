"""The config of a new speech LLM, from those of a text LLM and a Whisper encoder and what is overridden."""

from collections.abc import Mapping
from dataclasses import fields
from fractions import Fraction
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, WhisperConfig

from ..configuration_baichuan_audio import BaichuanAudioConfig, BaichuanAudioTokenizerConfig, BaichuanAudioVocoderConfig


_SECTIONS = ("audio_tokenizer_config", "audio_head_config", "flow_matching_config", "vocoder_config")
# Whisper's two convolutions are the same in every checkpoint.
_KERNEL, _STRIDE = 3, 2
_HEAD_DIM = 128


def _own_entries(config_class: type[PreTrainedConfig]) -> list[str]:
    """What a config class adds to the entries that every config has."""
    shared = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in shared]


def _of_the_llm(name: str) -> bool:
    return name == "tie_word_embeddings" or str(name).endswith("_token_id")


def _top_level_entries() -> list[str]:
    """Entries beside the sections that are free to choose."""
    own = [name for name in _own_entries(BaichuanAudioConfig) if not name.endswith("_config")]
    return [name for name in own if not _of_the_llm(name)]


def checked_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The overrides with every section as a dict; `vocoder_config` only where given.

    Raises:
        ValueError: a key that is not known or not free to choose.
    """
    top_level = _top_level_entries()
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise ValueError(f"The overrides must be a mapping of config entries, got {type(overrides).__name__}.")
    checked: dict[str, Any] = {section: {} for section in _SECTIONS if section != "vocoder_config"}
    for name, value in overrides.items():
        if name == "text_config":
            raise ValueError(
                "`text_config` cannot be overridden: the LLM folder's own config.json says what its weights compute."
            )
        if _of_the_llm(name):
            raise ValueError(f"`{name}` cannot be overridden: the LLM and its tokenizer decide it.")
        if name not in (*_SECTIONS, *top_level):
            raise ValueError(f"Unknown override `{name}`; known are {', '.join((*_SECTIONS, *top_level))}.")
        if name not in _SECTIONS:
            checked[name] = value
            continue
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"`{name}` must be a mapping of config entries, got {value!r}.")
        known = _own_entries(BaichuanAudioConfig.sub_configs[name])
        unknown = [str(key) for key in value if key not in known]
        if unknown:
            raise ValueError(f"Unknown override `{name}.{unknown[0]}`; known are {', '.join(known)}.")
        checked[name] = dict(value)
    return checked


def _num_heads(hidden_size: int) -> int:
    """The number of heads that divides the width into heads nearest to 128 wide, as the released model's are."""
    return min(
        (count for count in range(1, hidden_size + 1) if hidden_size % count == 0),
        key=lambda count: abs(count - hidden_size / _HEAD_DIM),
    )


def derive_config(
    text_config: PreTrainedConfig,
    whisper: WhisperConfig,
    token_ids: Mapping[str, int],
    overrides: Mapping[str, Any] | None = None,
    vocoder: BaichuanAudioVocoderConfig | None = None,
) -> BaichuanAudioConfig:
    """
    The config of the new model.

    Args:
        text_config: of the LLM, its vocabulary grown already.
        whisper: of the Whisper checkpoint: it fixes the sizes of the encoder; those of the mel decoder follow it (a quarter of the
            layers) unless overridden.
        token_ids: `{"audio_start": 151657, ...}`, one for each of the nine multimodal tokens.
        overrides (*optional*): nested entries of `BaichuanAudioConfig`; see `build_checkpoint`.
        vocoder (*optional*): of the vocoder that is copied; the flow-matching decoder takes its mel analysis from it.

    Raises:
        ValueError: unknown entries, entries that contradict what is copied, combinations that cannot work.
    """
    given = checked_overrides(overrides)
    fixed = {
        "num_mel_bins": whisper.num_mel_bins,
        "hidden_size": whisper.d_model,
        "encoder_layers": whisper.encoder_layers,
        "encoder_attention_heads": whisper.encoder_attention_heads,
        "encoder_ffn_dim": whisper.encoder_ffn_dim,
        "activation_function": whisper.activation_function,
        "kernel_size": _KERNEL,
        "stride_size": _STRIDE,
    }
    for name, value in given["audio_tokenizer_config"].items():
        if fixed.get(name, value) != value:
            raise ValueError(f"`audio_tokenizer_config.{name}` is {fixed[name]} in the Whisper checkpoint, got {value!r}.")
    if vocoder is not None and "vocoder_config" in given:
        raise ValueError("`vocoder_config` cannot be overridden when a vocoder is given: its weights decide it.")

    def build(config_class, **settings):
        try:
            return config_class(**settings)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"The overrides do not make a config: {' '.join(str(error).split())}") from error

    tokenizer = {
        "decoder_layers": max(1, whisper.encoder_layers // 4),
        "decoder_attention_heads": whisper.encoder_attention_heads,
        "decoder_ffn_dim": whisper.encoder_ffn_dim,
        **given["audio_tokenizer_config"],
        **fixed,
    }
    plain = build(BaichuanAudioTokenizerConfig, **tokenizer)
    longest = whisper.max_source_positions * _STRIDE  # mel frames that the encoder has seen positions for
    tokenizer.setdefault("max_audio_seconds", longest * plain.hop_length // plain.sampling_rate)
    if vocoder is None and "vocoder_config" in given:
        vocoder = build(BaichuanAudioVocoderConfig, **given["vocoder_config"])
    flow = {"input_size": whisper.d_model}
    if vocoder is not None:
        flow |= {name: getattr(vocoder, name) for name in ("num_mel_bins", "sampling_rate", "hop_length")}
    flow |= given["flow_matching_config"]
    head = {
        "hidden_size": text_config.hidden_size,
        "num_attention_heads": _num_heads(text_config.hidden_size),
        "codebook_sizes": plain.codebook_sizes,
        "rms_norm_eps": getattr(text_config, "rms_norm_eps", 1e-6),
    }
    config = build(
        BaichuanAudioConfig,
        text_config=text_config,
        audio_tokenizer_config=tokenizer,
        audio_head_config=head | given["audio_head_config"],
        flow_matching_config=flow,
        vocoder_config=None if vocoder is None else vocoder.to_dict(),
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
        **({"sampling_rate": flow["sampling_rate"]} if "sampling_rate" in flow else {})
        | {name: value for name, value in given.items() if name not in _SECTIONS}
        | {f"{name}_token_id": index for name, index in token_ids.items()},
    )
    _check_rates(config, longest)
    return config


def _check_rates(config: BaichuanAudioConfig, longest: int) -> None:
    """What only the parts together show: frames of one must be frames of the next."""
    tokenizer, flow = config.audio_tokenizer_config, config.flow_matching_config
    hidden = Fraction(tokenizer.sampling_rate, tokenizer.hop_length * tokenizer.stride_size)
    mel = Fraction(flow.sampling_rate, flow.hop_length)
    if hidden != mel:
        raise ValueError(
            f"The flow-matching mel has {float(mel):g} frames a second, but the mel decoder's hidden states, which it is made from "
            f"frame by frame, have {float(hidden):g}."
        )
    if tokenizer.decoder_stride_size != tokenizer.stride_size:
        raise ValueError(
            f"`decoder_stride_size` must be {tokenizer.stride_size}, got {tokenizer.decoder_stride_size}: the mel decoder returns to "
            "the frame rate of the encoder's input."
        )
    if tokenizer.max_mel_frames > longest:
        raise ValueError(
            f"`max_audio_seconds` of {tokenizer.max_audio_seconds} makes chunks of {tokenizer.max_mel_frames} mel frames; the Whisper "
            f"checkpoint has positions for {longest}."
        )
