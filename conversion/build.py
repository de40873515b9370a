"""A text LLM and a Whisper encoder -> an untrained speech LLM: the starting point of training (paper, section 3).

What the two checkpoints know is copied bit by bit; all that makes them one model is new and drawn from a seed.
"""

import copy
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..configuration_baichuan_audio import BaichuanAudioConfig, BaichuanAudioVocoderConfig
from ..generation_baichuan_audio import set_generation_defaults
from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..modeling_common import BaichuanAudioPreTrainedModel, sinusoidal_embedding
from ..modeling_vocoder import BaichuanAudioVocoder
from ..processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from ..processors.processing_baichuan_audio import ASSISTANT_TOKEN, SPECIAL_TOKENS, SYSTEM_TOKEN, USER_TOKEN
from .convert import DTYPES, find_checkpoint
from .derive_config import checked_overrides, derive_config
from .files import save_checkpoint
from .tiny import END_OF_TEXT
from .vocoder import convert_vocoder, read_vocoder_file


ADDED_TOKENS = (SYSTEM_TOKEN, "<B_USYS>", USER_TOKEN, ASSISTANT_TOKEN, *SPECIAL_TOKENS.values())
# Rows of new tokens: the mean of the known ones, told apart by noise of this share of their standard deviation.
_ROW_NOISE = 0.1


@dataclass
class BuildReport:
    """What a build did: tensors copied from each source, tensors that are new, parameters in all, the vocabulary and the dtype."""

    llm_tensors: int
    encoder_tensors: int
    vocoder_tensors: int
    new_tensors: int
    parameters: int
    vocab_size: int
    added_tokens: list[str]
    dtype: torch.dtype


@contextmanager
def _errors_name(folder: Path, kind: str):
    """Turns whatever loading raises into a ValueError that names the folder."""
    try:
        yield
    except Exception as error:  # transformers, safetensors and json raise many kinds
        raise ValueError(f"{folder} cannot be loaded as {kind}: {' '.join(str(error).split())}") from error


@contextmanager
def _quiet():
    """Missing tensors are what a build is about: transformers need not warn of them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_config(folder: Path, kind: str) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not {kind}: it has no config.json.")
    with _errors_name(folder, kind):
        return AutoConfig.from_pretrained(folder)


def _load(auto_class, folder: Path, kind: str, part: str = "") -> PreTrainedModel:
    """A model in its checkpoint's own dtype; every tensor whose name starts with `part` must be there."""
    with _errors_name(folder, kind), _quiet():
        model, info = auto_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if name.startswith(part))
    if missing:
        raise ValueError(f"{folder} is not {kind}: it lacks {len(missing)} tensors: {', '.join(missing)}.")
    return model.eval()


def _load_llm(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    The causal LM, and the part of it that becomes our backbone.

    Raises:
        ValueError: not an LLM, a quantised one, or one whose logits are not its word head times its backbone's output.
    """
    kind = "a text LLM"
    config = _read_config(folder, kind)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise ValueError(f"{folder} is not {kind} that AutoModelForCausalLM loads: its model type is {config.model_type}.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} holds quantised weights, which cannot be copied: name the checkpoint in full precision.")
    llm = _load(AutoModelForCausalLM, folder, kind)
    with torch.device("meta"):
        wanted = type(AutoModel.from_config(llm.config.get_text_config()))
    body = next((part for part in (llm.base_model, llm.get_decoder()) if type(part) is wanted), None)
    if body is None:
        raise ValueError(f"{folder} cannot be a backbone: {type(llm).__name__} has no part that is a {wanted.__name__}.")
    words, head = body.get_input_embeddings(), llm.get_output_embeddings()
    hidden_size = llm.config.get_text_config().hidden_size
    if head is None or words.weight.shape[1] != hidden_size or head.weight.shape[1] != hidden_size:
        raise ValueError(f"{folder} cannot be a backbone: its word embeddings are not as wide as its layers ({hidden_size}).")
    if head.weight is words.weight and words is not getattr(body, "embed_tokens", None):
        raise ValueError(f"{folder} cannot be a backbone: its tied word embeddings are not named `embed_tokens`.")
    # Biases, scales and caps of logits have no place in our model: one forward pass shows whether there are any.
    with torch.no_grad(), _errors_name(folder, "a backbone"):
        ids = torch.arange(min(16, len(words.weight)))[None]
        theirs = llm(ids, use_cache=False).logits.float()
        ours = nn.functional.linear(body(inputs_embeds=words(ids), use_cache=False).last_hidden_state, head.weight).float()
    if not torch.allclose(ours, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max())):
        raise ValueError(
            f"{folder} cannot be a backbone: the logits of {type(llm).__name__} are more than its word head times its last states."
        )
    return llm, body


def _load_encoder(folder: Path) -> tuple[WhisperConfig, nn.Module]:
    """Config and encoder of a Whisper checkpoint.

    Raises:
        ValueError: not Whisper, or positions other than the sinusoids that our encoder computes.
    """
    kind = "a Whisper checkpoint"
    config = _read_config(folder, kind)
    if not isinstance(config, WhisperConfig):
        raise ValueError(f"{folder} is not {kind}: its model type is {config.model_type}.")
    encoder = _load(WhisperModel, folder, kind, part="encoder.").encoder
    table = encoder.embed_positions.weight.detach()
    ours = sinusoidal_embedding(torch.arange(len(table)), table.shape[1])
    difference = float((table.float() - ours).abs().max())
    # A table stored in half precision is off by up to a quarter of its dtype's epsilon.
    if not difference <= 1e-3 + torch.finfo(table.dtype).eps / 4:
        raise ValueError(
            f"{folder} cannot be the encoder: its `embed_positions` differ from Whisper's sinusoids by up to {difference:.3g}, "
            "and only the sinusoids are supported."
        )
    return config, encoder


def _load_vocoder(vocoder: str | Path) -> tuple[BaichuanAudioVocoderConfig, dict[str, torch.Tensor]]:
    """Config and float32 tensors, of a `hift.pt` or of a checkpoint with a vocoder."""
    if Path(vocoder).is_file():
        config, state = convert_vocoder(read_vocoder_file(vocoder))
    else:
        folder = find_checkpoint(vocoder)
        with _errors_name(folder, "a vocoder"):
            model = BaichuanAudioVocoder.from_pretrained(folder, dtype=torch.float32)
        config, state = model.config, model.state_dict()
    return BaichuanAudioVocoderConfig(**_settings(config)), state


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's entries without those that say where and as what it was loaded."""
    transient = ("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in transient}


def _add_tokens(tokenizer) -> list[str]:
    """Adds what Baichuan-Audio needs to an LLM's tokenizer, at the end of its vocabulary. Returns the tokens it lacked."""
    known = tokenizer.get_vocab()
    tokens = [AddedToken(token, special=True, normalized=False) for token in ADDED_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": AddedToken(END_OF_TEXT, special=True, normalized=False)})
    tokenizer.chat_template = None  # the LLM's own; the processor brings ours
    # Segment ids, which some tokenizers make, mean nothing to a decoder.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return [token for token in (*ADDED_TOKENS, tokenizer.eos_token) if token not in known]


def _grow(
    table: torch.Tensor, rows: int, new_ids: Iterable[int], known_ids: Iterable[int], generator: torch.Generator
) -> torch.Tensor:
    """(old_rows, width) -> (rows, width): rows of new tokens and rows that were not there start at the mean of the known ones."""
    table = table.detach()
    grown = table.new_empty(rows, table.shape[1])
    grown[: len(table)] = table
    fresh = sorted({*new_ids, *range(len(table), rows)})
    known = table[sorted(index for index in known_ids if index < len(table))].float()
    noise = torch.randn(len(fresh), table.shape[1], generator=generator) * known.std() * _ROW_NOISE
    grown[fresh] = (known.mean(0) + noise).to(table.dtype)
    return grown


def _build_model(config: BaichuanAudioConfig, state: dict[str, torch.Tensor], seed: int, dtype: torch.dtype):
    """The model with `state` as it is and every other tensor from `_init_weights`; returns it and the names of the latter."""
    with torch.device("meta"):
        expected = BaichuanAudioForCausalLM(config).state_dict()
    problems = [f"{name} has no place in the model" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the derived config: {'; '.join(problems)}")
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        # transformers' own way to complete a checkpoint. Past our classes, which refuse incomplete ones.
        load = super(BaichuanAudioPreTrainedModel, BaichuanAudioForCausalLM).from_pretrained
        model, info = load(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    sums = {name for name in expected if name.endswith(".embed_avg") and name not in state}  # loading does not miss them
    return model.eval(), set(info["missing_keys"]) | sums


def _make_processor(config: BaichuanAudioConfig, tokenizer) -> BaichuanAudioProcessor:
    audio = config.audio_tokenizer_config
    feature_extractor = BaichuanAudioFeatureExtractor(
        feature_size=audio.num_mel_bins,
        sampling_rate=audio.sampling_rate,
        hop_length=audio.hop_length,
        n_fft=audio.n_fft,
        max_audio_seconds=audio.max_audio_seconds,
        stride_size=audio.stride_size,
        downsample_factor=audio.downsample_factor,
    )
    return BaichuanAudioProcessor(feature_extractor, tokenizer)


def build_checkpoint(
    llm: str | Path,
    encoder: str | Path,
    output: str | Path,
    overrides: Mapping[str, Any] | None = None,
    vocoder: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> BuildReport:
    """
    Writes a speech LLM that reads and answers as the LLM does and has yet to learn to hear and speak.

    The LLM's weights and those of Whisper's encoder are copied exactly. The special tokens of Baichuan-Audio go to the end of the
    LLM's vocabulary; their embeddings start at the mean of the others. Everything else is initialised.

    Args:
        llm: folder or Hub id of a causal LM with its tokenizer.
        encoder: folder or Hub id of a Whisper checkpoint.
        output: folder to make; it must not exist, or be empty.
        overrides (*optional*): entries of `BaichuanAudioConfig` that are free to choose, nested as in config.json, such as
            `{"audio_tokenizer_config": {"decoder_layers": 4}}`. `{"vocoder_config": {}}` asks for a new vocoder.
        vocoder (*optional*): a `hift.pt`, or a checkpoint (folder or Hub id) with a vocoder, to be copied.
        seed (`int`): of everything that is initialised.
        dtype (*optional*): of all but the vocoder. By default the smallest one that holds both checkpoints exactly: their own where
            they agree, else float32.

    Raises:
        ValueError: sources that cannot be used, unknown or impossible overrides, an output in the way. Nothing is written then.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {output} exists already. Name a new or an empty folder.")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype}.")
    checked_overrides(overrides)  # before minutes of loading
    llm_folder, encoder_folder = find_checkpoint(llm), find_checkpoint(encoder)
    whisper_config, whisper_encoder = _load_encoder(encoder_folder)
    vocoder_config, vocoder_state = (None, {}) if vocoder is None else _load_vocoder(vocoder)
    language_model, body = _load_llm(llm_folder)
    with _errors_name(llm_folder, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    known_ids = set(tokenizer.get_vocab().values())
    words, head = body.get_input_embeddings().weight, language_model.get_output_embeddings().weight
    tied = words is head
    if 2 * len(known_ids) < len(words):  # transformers makes up what is missing
        raise ValueError(
            f"{llm_folder} lacks its tokenizer: {len(known_ids)} tokens are known for {len(words)} rows of word embeddings."
        )
    added = _add_tokens(tokenizer)
    vocabulary = tokenizer.get_vocab()
    rows = max(len(words), max(vocabulary.values()) + 1)

    text_config = copy.deepcopy(language_model.config.get_text_config())
    text_settings = _settings(text_config) | {"vocab_size": rows, "tie_word_embeddings": tied}
    text_config = AutoConfig.for_model(text_config.model_type, **text_settings)
    token_ids = {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}
    config = derive_config(text_config, whisper_config, token_ids, overrides, vocoder_config)

    generator = torch.Generator().manual_seed(seed)
    new_ids = [vocabulary[token] for token in added]
    words_name = next(name for name, module in body.named_modules() if module is body.get_input_embeddings())
    llm_state = {f"model.language_model.{name}": tensor for name, tensor in body.state_dict().items()}
    llm_state[f"model.language_model.{words_name}.weight"] = _grow(words, rows, new_ids, known_ids, generator)
    if not tied:
        llm_state["lm_head.weight"] = _grow(head, rows, new_ids, known_ids, generator)
    encoder_state = {
        f"model.audio_tokenizer.encoder.{name}": tensor
        for name, tensor in whisper_encoder.state_dict().items()
        if not name.startswith("embed_positions.")
    }
    vocoder_state = {f"vocoder.{name}": tensor for name, tensor in vocoder_state.items()}
    dtype = dtype or torch.promote_types(language_model.dtype, whisper_encoder.dtype)
    model, new = _build_model(config, llm_state | encoder_state | vocoder_state, seed, dtype)
    if model.config.vocoder_config is not None:
        model.config.vocoder_config.dtype = torch.float32  # also when it is loaded alone

    processor = _make_processor(config, tokenizer)
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    set_generation_defaults(generation)
    generation.audio_switch_token_ids = processor.audio_switch_token_ids()
    model.generation_config = generation

    save_checkpoint(model, processor, output)
    return BuildReport(
        llm_tensors=len(llm_state),
        encoder_tensors=len(encoder_state),
        vocoder_tensors=len(vocoder_state),
        new_tensors=len(new),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=rows,
        added_tokens=added,
        dtype=dtype,
    )
