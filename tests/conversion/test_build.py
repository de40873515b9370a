"""A text LLM and a Whisper encoder -> the starting point of training."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.golden import write_hift
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_baichuan_audio import BaichuanAudioConfig, BaichuanAudioForCausalLM, BaichuanAudioVocoder
from modeling_baichuan_audio.conversion.build import ADDED_TOKENS, build_checkpoint
from modeling_baichuan_audio.conversion.derive_config import derive_config
from modeling_baichuan_audio.processors.processing_baichuan_audio import SPECIAL_TOKENS


LLM_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,  # wide enough that attention is not uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
UNTIED = {"tie_word_embeddings": False, "pad_token_id": 0}
SMALL = {
    "audio_tokenizer_config": {"codebook_sizes": [16, 8, 8], "refine_channels": 16},
    "audio_head_config": {"num_hidden_layers": 2},
    "flow_matching_config": {
        "prenet_hidden_size": 32,
        "prenet_layers": 1,
        "prenet_attention_heads": 2,
        "prenet_ffn_dim": 64,
        "estimator_channels": 32,
        "estimator_blocks": 1,
        "estimator_mid_stages": 1,
        "estimator_attention_heads": 2,
        "estimator_head_dim": 16,
    },
}
TEXTS = ["Speech, 语音! \n\t 🙂", "two  spaces", "", "audio_start <c_a> <|im_end|"]
TOKEN_IDS = {name: index for index, name in enumerate(SPECIAL_TOKENS)}
EMBED = "model.language_model.embed_tokens.weight"
ENCODER = "model.audio_tokenizer.encoder."


def small_llm(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def qwen(**settings):
    settings = {"vocab_size": 300, "num_key_value_heads": 2, "tie_word_embeddings": False} | settings
    return small_llm(Qwen2Config(**(LLM_SIZES | settings)))


def llama(**settings):
    settings = {"vocab_size": 258, "num_key_value_heads": 2, "tie_word_embeddings": True} | settings
    return small_llm(LlamaConfig(**(LLM_SIZES | settings)))


def byte_vocabulary():
    return {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}


def qwen_tokenizer():
    """256 bytes and `<|endoftext|>`, the end of text."""
    return Qwen2Tokenizer(vocab=byte_vocabulary(), merges=[])


def bare_tokenizer(begin=None, **special):
    """A tokenizer of the generic class; `begin` opens every text."""
    backend = Tokenizer(BPE(vocab=byte_vocabulary(), merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    backend.add_special_tokens(list(special.values()))
    if begin:
        backend.post_processor = TemplateProcessing(f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def llama_tokenizer():
    tokenizer = bare_tokenizer(begin="<s>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = {"default": "{{ 'of the LLM' }}", "tools": "{{ 'of the LLM' }}"}
    names = ["input_ids", "token_type_ids", "attention_mask"]  # of a tokenizer that makes segment ids
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def whisper(model_class=WhisperModel, seed=1, **settings):
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 100,  # 2 s
        "max_target_positions": 8,
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "init_std": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(WhisperConfig(**(sizes | settings)))


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folders: `qwen` untied with more rows than tokens, `llama` tied with as many; `whisper80`, `whisper128`."""
    folder = tmp_path_factory.mktemp("sources")
    llm = qwen()
    with torch.no_grad():  # rows that no token has: they must not enter the mean of those that tokens have
        llm.get_input_embeddings().weight[257:] = llm.lm_head.weight[257:] = 5.0
    save(folder / "qwen", llm, qwen_tokenizer())
    save(folder / "llama", llama(), llama_tokenizer())
    save(folder / "whisper80", whisper(num_mel_bins=80))
    save(folder / "whisper128", whisper(WhisperForConditionalGeneration, num_mel_bins=128))
    return folder


CASES = {"qwen": "whisper80", "llama": "whisper128"}


@pytest.fixture(scope="session", params=CASES)
def built(request, sources, tiny_folder, tmp_path_factory):
    """LLM folder, Whisper folder, the checkpoint made from both and the report."""
    output = tmp_path_factory.mktemp("built") / request.param
    sources = (sources / request.param, sources / CASES[request.param])
    return *sources, output, build_checkpoint(*sources, output, SMALL, vocoder=tiny_folder)


@pytest.fixture(scope="session")
def model(built):
    return AutoModelForCausalLM.from_pretrained(built[2])


@pytest.fixture(scope="session")
def loaded_processor(built):
    return AutoProcessor.from_pretrained(built[2])


def tensors(folder):
    return load_file(folder / "model.safetensors")


def encoder_tensors(folder):
    """A Whisper file's tensors of the encoder, under our names, without the position table."""
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors(folder).items()}
    return {
        ENCODER + name.removeprefix("encoder."): tensor
        for name, tensor in stored.items()
        if name.startswith("encoder.") and "embed_positions" not in name
    }


# -------------------- what is copied


def test_every_copied_tensor_is_bit_equal(built, tiny_folder):
    llm, encoder, output, report = built
    ours, old = tensors(output), len(AutoTokenizer.from_pretrained(llm))
    theirs = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors(llm).items()}
    grown = {EMBED, "lm_head.weight"}
    for name, tensor in theirs.items():
        part = ours[name][:old] if name in grown else ours[name]
        assert torch.equal(part, tensor[:old] if name in grown else tensor), name
    copied = encoder_tensors(encoder)
    assert len(copied) == 6 + 2 * 15
    vocoder = {name: tensor for name, tensor in tensors(tiny_folder).items() if name.startswith("vocoder.")}
    for name, tensor in (copied | vocoder).items():
        assert torch.equal(ours[name], tensor), name
    assert (report.llm_tensors, report.encoder_tensors, report.vocoder_tensors) == (len(theirs), len(copied), len(vocoder))
    assert report.new_tensors == len(ours) - len(theirs) - len(copied) - len(vocoder)


def test_tied_stays_tied(built, model):
    llm, _, output, _ = built
    tied = "lm_head.weight" not in tensors(llm)
    assert tied == (llm.name == "llama")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in tensors(output)) != tied
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == tied


def test_head_of_its_own_in_spite_of_the_config(tmp_path, sources):
    """The weights decide: transformers ties nothing where the files hold two different tables."""
    llm = save(tmp_path / "llm", llama(tie_word_embeddings=False), llama_tokenizer())
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    build_checkpoint(llm, sources / "whisper80", tmp_path / "built", SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "built")
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight[:258], tensors(llm)["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight[:258], tensors(llm)["model.embed_tokens.weight"])


@torch.no_grad()
def test_text_logits_are_the_llms(built, model):
    llm = AutoModelForCausalLM.from_pretrained(built[0]).eval()
    old = len(AutoTokenizer.from_pretrained(built[0]))
    ids = torch.randint(old, (2, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(ids).logits[..., :old], llm(ids).logits[..., :old]
    assert float(theirs.abs().max()) > 1, "nothing to compare"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoder_states_are_whispers_on_a_full_chunk(built, model):
    theirs = WhisperModel.from_pretrained(built[1]).encoder.eval()
    features = torch.randn(2, theirs.config.num_mel_bins, 200, generator=torch.Generator().manual_seed(0))
    encoded = model.audio_tokenizer.encode(features)
    torch.testing.assert_close(encoded.last_hidden_state, theirs(features).last_hidden_state, atol=1e-4, rtol=0)
    assert encoded.audio_codes.shape == (2, 3, 25)


@torch.no_grad()
def test_encoder_states_of_a_shorter_chunk(built, model):
    """Whisper reads full chunks only: one with a shorter position table is what a chunk of 120 frames has to equal."""
    whole = WhisperModel.from_pretrained(built[1]).encoder
    config = WhisperConfig(**(whole.config.to_dict() | {"max_source_positions": 60}))
    theirs = WhisperEncoder(config).eval()
    theirs.load_state_dict(
        {name: value[:60] if name.startswith("embed_positions") else value for name, value in whole.state_dict().items()}
    )
    features = torch.randn(2, config.num_mel_bins, 200, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 120:] = 0
    encoded = model.audio_tokenizer.encode(features, mask)
    expected = theirs(features[1:, :, :120]).last_hidden_state
    torch.testing.assert_close(encoded.last_hidden_state[1:, :60], expected, atol=1e-4, rtol=0)
    assert not encoded.last_hidden_state[1, 60:].any()
    assert encoded.audio_codes_mask.sum(-1).tolist() == [25, 15]


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**LLM_SIZES, vocab_size=257, tie_word_embeddings=False),
        GemmaConfig(**LLM_SIZES, vocab_size=257, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
        LlamaConfig(**LLM_SIZES, vocab_size=320, head_dim=8, attention_bias=True, rope_theta=77.0, tie_word_embeddings=False),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_other_llms_keep_their_logits(tmp_path, sources, config):
    llm = small_llm(config).eval()
    build_checkpoint(save(tmp_path / "llm", llm, qwen_tokenizer()), sources / "whisper80", tmp_path / "built", SMALL)
    ids = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "built")(ids).logits[..., :257]
    torch.testing.assert_close(ours, llm(ids).logits[..., :257], atol=1e-5, rtol=1e-5)


def test_vocoder_file(tmp_path, sources):
    hift = write_hift(tmp_path / "hift.pt")
    report = build_checkpoint(sources / "qwen", sources / "whisper80", tmp_path / "built", SMALL, vocoder=hift)
    stored = torch.load(hift)["m_source.l_linear.weight"]
    vocoder = BaichuanAudioVocoder.from_pretrained(tmp_path / "built")
    assert torch.equal(vocoder.source.linear.weight, stored)
    assert report.vocoder_tensors == len(vocoder.state_dict())


def test_without_vocoder_there_is_none_and_a_new_one_on_request(tmp_path, sources):
    build_checkpoint(sources / "qwen", sources / "whisper80", tmp_path / "plain", SMALL)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").vocoder is None
    wanted = SMALL | {"vocoder_config": {"base_channels": 32, "f0_channels": 16}}
    report = build_checkpoint(sources / "qwen", sources / "whisper80", tmp_path / "new", wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.vocoder.config.base_channels == 32 and report.vocoder_tensors == 0
    assert len(model.decode_audio(torch.zeros(1, 3, 2, dtype=torch.long), seed=0, num_steps=1)[0]) == 7 * 480


# -------------------- what is new


def test_rows_of_new_tokens_start_at_the_mean(built):
    llm, _, output, report = built
    old = len(AutoTokenizer.from_pretrained(llm))
    assert report.vocab_size == max(old + 13, 300 if llm.name == "qwen" else 0)
    for name in (EMBED, "lm_head.weight"):
        if name in tensors(output):
            table = tensors(output)[name]
            assert len(table) == report.vocab_size
            known, new = table[:old], table[old : old + 13]
            spread = known.std()
            assert ((new - known.mean(0)).std() / spread).item() == pytest.approx(0.1, rel=0.15)
            assert len(new.unique(dim=0)) == 13, "two new tokens that nothing tells apart"
            if llm.name == "qwen":  # rows that no token has stay as they were
                assert torch.equal(table[old + 13 :], tensors(llm)[name.replace("language_model.", "")][old + 13 :])


def test_new_weights_are_the_models_own_initialisation(built):
    state = tensors(built[2])
    assert state["model.audio_embed_layers.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["audio_head.layers.1.mlps.2.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["model.audio_tokenizer.bridge.down_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["model.audio_tokenizer.quantizer.codebooks.0.embed"].std().item() == pytest.approx(1, rel=0.1)
    assert not state["audio_head.heads.0.bias"].any()
    assert bool((state["model.audio_tokenizer.mel_decoder.layer_norm.weight"] == 1).all())
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_seed_decides_all_that_is_new(tmp_path, sources):
    pair = sources / "qwen", sources / "whisper80"
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_checkpoint(*pair, tmp_path / "first", SMALL, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was used"
    torch.manual_seed(6)
    build_checkpoint(*pair, tmp_path / "second", SMALL, seed=3)
    build_checkpoint(*pair, tmp_path / "third", SMALL, seed=4)
    first, second, third = (tensors(tmp_path / name) for name in ("first", "second", "third"))
    assert first.keys() == second.keys() == third.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    same = {name for name in first if torch.equal(first[name], third[name])}
    copied = {name.replace("model.", "model.language_model.", 1) for name in tensors(pair[0])} | encoder_tensors(pair[1]).keys()
    assert copied - same == {EMBED, "lm_head.weight"}
    sums = {name for name in first if name.endswith(".embed_avg")}  # of vectors that chose an entry: none so far
    assert sums and not any(first[name].any() for name in sums)
    drawn = {name for name in first if first[name].dim() > 1 and name not in copied} - sums
    assert drawn and not drawn & same, "weights that no seed changes"
    for name in ("first", "second"):
        (tmp_path / name / "model.safetensors").unlink()
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()} for name in ("first", "second")
    ]
    assert files[0] == files[1]


# -------------------- config


def test_released_sizes_are_derived():
    """Whisper large-v3 and Qwen2.5-7B give the released model's geometry."""
    large = WhisperConfig(num_mel_bins=128, d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120)
    released = BaichuanAudioConfig()
    ours = derive_config(released.text_config, large, {name: getattr(released, f"{name}_token_id") for name in SPECIAL_TOKENS})
    assert ours.to_dict() == released.to_dict()


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (576, 4), (896, 7), (960, 8), (2048, 16), (3584, 28), (97, 1)])
def test_audio_head_width_is_divided(width, heads):
    config = derive_config(Qwen2Config(hidden_size=width, vocab_size=50), small_whisper(), TOKEN_IDS)
    assert config.audio_head_config.num_attention_heads == heads


def small_whisper():
    return whisper().config


def test_sizes_follow_the_sources(built, model):
    _, encoder, output, _ = built
    source, config = WhisperConfig.from_pretrained(encoder), model.config
    audio = config.audio_tokenizer_config
    assert audio.num_mel_bins == source.num_mel_bins == (128 if encoder.name == "whisper128" else 80)
    assert (audio.hidden_size, audio.encoder_layers, audio.encoder_attention_heads, audio.encoder_ffn_dim) == (32, 2, 2, 48)
    assert (audio.decoder_layers, audio.decoder_attention_heads, audio.decoder_ffn_dim) == (1, 2, 48)
    assert audio.max_audio_seconds == 2
    assert config.flow_matching_config.input_size == 32
    assert config.audio_head_config.hidden_size == 64 and config.audio_head_config.num_hidden_layers == 2
    assert config.audio_head_config.codebook_sizes == audio.codebook_sizes == [16, 8, 8]
    assert (config.vocoder_config.base_channels, config.sampling_rate) == (32, 24000)
    text = (output / "config.json").read_text()
    assert str(output.parent.parent) not in text and "_name_or_path" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"audio_tokeniser_config": {}}, "Unknown override `audio_tokeniser_config`; known are audio_tokenizer_config"),
        ({"audio_head_config": {"layers": 2}}, "Unknown override `audio_head_config.layers`; known are hidden_size"),
        ({"flow_matching_config": {"dtype": "float16"}}, "Unknown override `flow_matching_config.dtype`"),
        ({"text_config": {"hidden_size": 32}}, "`text_config` cannot be overridden"),
        ({"audio_pad_token_id": 5}, "`audio_pad_token_id` cannot be overridden"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` cannot be overridden"),
        ({"audio_head_config": 3}, "`audio_head_config` must be a mapping of config entries, got 3"),
        ([1], "must be a mapping of config entries, got list"),
        ({"audio_tokenizer_config": {"hidden_size": 64}}, "`audio_tokenizer_config.hidden_size` is 32 in the Whisper .*, got 64"),
        ({"audio_tokenizer_config": {"decoder_attention_heads": 5}}, r"`hidden_size` \(32\) .* `decoder_attention_heads` \(5\)"),
        ({"audio_tokenizer_config": {"decoder_layers": "many"}}, "decoder_layers.*many"),
        ({"audio_tokenizer_config": {"decoder_stride_size": 3}}, "`decoder_stride_size` must be 2, got 3"),
        ({"audio_tokenizer_config": {"max_audio_seconds": 3}}, "`max_audio_seconds` of 3 makes chunks of 300 mel frames.* 200"),
        ({"audio_head_config": {"hidden_size": 128}}, r"The audio head's `hidden_size` \(128\) must be the LLM's \(64\)"),
        ({"audio_head_config": {"codebook_sizes": [4, 4]}}, "codebook_sizes"),
        ({"flow_matching_config": {"input_size": 16}}, r"The flow-matching `input_size` \(16\)"),
        ({"flow_matching_config": {"hop_length": 240}}, "The flow-matching mel has 100 frames a second, .* have 50"),
        ({"sampling_rate": 16000}, r"`sampling_rate` \(16000\) must be the flow-matching mel's \(24000\)"),
        ({"vocoder_config": {"num_mel_bins": 100}, "flow_matching_config": {"num_mel_bins": 80}}, r"\(100, 24000, 480\) must be"),
    ],
)
def test_impossible_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        derive_config(Qwen2Config(hidden_size=64, vocab_size=50), small_whisper(), TOKEN_IDS, overrides)


def test_overrides_reach_the_config():
    overrides = {
        "initializer_range": 0.5,
        "audio_tokenizer_config": {"decoder_layers": 3, "hidden_size": 32, "max_audio_seconds": 1},
        "flow_matching_config": {"sampling_rate": 16000, "hop_length": 320, "prior_loss_weight": 0.25},
        "audio_head_config": None,
    }
    config = derive_config(Qwen2Config(hidden_size=64, vocab_size=50), small_whisper(), TOKEN_IDS, overrides)
    assert config.initializer_range == 0.5
    assert config.audio_tokenizer_config.decoder_layers == 3 and config.audio_tokenizer_config.max_audio_seconds == 1
    assert (config.sampling_rate, config.flow_matching_config.prior_loss_weight) == (16000, 0.25)
    assert config.vocoder_config is None


def test_activation_and_epsilon_follow_the_sources():
    text = Qwen2Config(hidden_size=64, vocab_size=50, rms_norm_eps=3e-5)
    config = derive_config(text, whisper(activation_function="relu").config, TOKEN_IDS)
    assert config.audio_head_config.rms_norm_eps == 3e-5
    assert config.audio_tokenizer_config.activation_function == "relu"


def test_analysis_follows_a_new_vocoder():
    vocoder = {"num_mel_bins": 100, "sampling_rate": 12000, "upsample_rates": [5, 4, 3], "upsample_kernel_sizes": [11, 8, 7]}
    overrides = {"vocoder_config": vocoder}
    config = derive_config(Qwen2Config(hidden_size=64, vocab_size=50), small_whisper(), TOKEN_IDS, overrides)
    flow = config.flow_matching_config
    assert (flow.num_mel_bins, flow.sampling_rate, flow.hop_length, config.sampling_rate) == (100, 12000, 240, 12000)


# -------------------- tokenizer, processor, generation


def test_old_texts_keep_their_tokens(built, loaded_processor):
    old, new = AutoTokenizer.from_pretrained(built[0]), loaded_processor.tokenizer
    for text in TEXTS:
        ids = old(text)["input_ids"]
        assert new(text)["input_ids"] == ids
        assert new.decode(ids) == old.decode(ids)
        assert new.decode(ids, skip_special_tokens=True) == text
    assert old.get_vocab().items() <= new.get_vocab().items()
    assert (new.bos_token, new.eos_token) == (old.bos_token, old.eos_token)
    assert new("a").keys() == {"input_ids", "attention_mask"}, "inputs that a decoder does not have"


def test_special_tokens_are_single_ids(built, model, loaded_processor):
    tokenizer = loaded_processor.tokenizer
    old = len(AutoTokenizer.from_pretrained(built[0]))
    assert len(ADDED_TOKENS) == 13
    assert built[3].added_tokens == list(ADDED_TOKENS)
    for index, token in enumerate(ADDED_TOKENS, start=old):
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"][1:-1] == [index]
        assert tokenizer.decode([index], skip_special_tokens=True) == ""
    for name, token in SPECIAL_TOKENS.items():
        assert getattr(model.config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(token)


def test_tokens_that_are_there_keep_their_rows(tmp_path, sources):
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<own>", "<C_A>"]})
    llm = qwen(vocab_size=262)
    report = build_checkpoint(save(tmp_path / "llm", llm, tokenizer), sources / "whisper80", tmp_path / "built", SMALL)
    assert report.added_tokens == [token for token in ADDED_TOKENS if token != "<C_A>"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "built")
    assert (loaded.convert_tokens_to_ids("<C_A>"), report.vocab_size) == (258, 259 + 12)
    assert loaded.decode(loaded("a<own><C_A>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert {"<own>", *ADDED_TOKENS} <= set(loaded.all_special_tokens)
    assert torch.equal(tensors(tmp_path / "built")[EMBED][:259], llm.get_input_embeddings().weight[:259])


def test_tokenizer_without_an_end_of_text_gets_one(tmp_path, sources):
    folder = save(tmp_path / "llm", llama(vocab_size=256), bare_tokenizer())
    report = build_checkpoint(folder, sources / "whisper80", tmp_path / "built", SMALL)
    processor = AutoProcessor.from_pretrained(tmp_path / "built")
    assert report.added_tokens == [*ADDED_TOKENS, "<|endoftext|>"]
    assert processor.tokenizer.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>") == 256 + 13
    assert report.vocab_size == 270
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "built").generation_config.eos_token_id == 269


def test_generation_config(built, loaded_processor):
    generation, tokenizer = GenerationConfig.from_pretrained(built[2]), loaded_processor.tokenizer
    assert generation.eos_token_id == tokenizer.eos_token_id is not None
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert (
        generation.audio_switch_token_ids
        == loaded_processor.audio_switch_token_ids()
        == tokenizer.convert_tokens_to_ids(["!", ",", "?"])
    )
    assert (generation.temperature, generation.top_k, generation.top_p, generation.repetition_penalty) == (0.8, 20, 0.85, 1.1)
    assert (generation.audio_temperature, generation.audio_repetition_penalty, generation.max_audio_frames) == (0.5, 1.3, 500)


def test_chat_template_is_ours(built, loaded_processor):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    expected = "<B_SYS>S<C_Q>U<audiotext_start_baichuan><C_A>"
    options = {"add_generation_prompt": True, "speech": True, "tokenize": False}
    assert loaded_processor.apply_chat_template(chat, **options) == expected
    assert loaded_processor.tokenizer.apply_chat_template(chat, **options) == expected
    assert [path.name for path in built[2].rglob("*.jinja")] == ["chat_template.jinja"]


def test_answers_speech_with_speech(built, model, loaded_processor):
    waveform = np.random.default_rng(0).standard_normal(40000).astype(np.float32) * 0.1  # 2.5 s: two chunks
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "audio", "audio": waveform}]}]
    inputs = loaded_processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, speech=True)
    bins = model.config.audio_tokenizer_config.num_mel_bins
    assert tuple(inputs["input_features"].shape) == (2, bins, 200)
    assert inputs.keys() == {"input_ids", "attention_mask", "input_features", "input_features_mask"} | inputs.keys() & {
        "num_frames"
    }
    reply = model.generate(**inputs, generation_mode="audio", max_new_tokens=12, seed=0)
    assert reply.sequences.shape[1] - inputs["input_ids"].shape[1] <= 12
    spoken = model.generate(
        **loaded_processor(text="Hello<audiogen_start_baichuan>"), generation_mode="audio", max_new_tokens=12, seed=0
    )
    frames = spoken.audio_codes.shape[2]
    assert 0 < frames <= 12
    assert len(spoken.audio[0]) == (4 * frames - 1) * 480 and bool(spoken.audio[0].isfinite().all())


# -------------------- dtypes


def test_half_precision_sources(tmp_path, sources):
    llm = save(tmp_path / "llm", qwen().bfloat16(), qwen_tokenizer())
    half, brain = (save(tmp_path / str(kind), whisper().to(kind)) for kind in (torch.float16, torch.bfloat16))
    report = build_checkpoint(llm, brain, tmp_path / "alike", SMALL)
    alike = tensors(tmp_path / "alike")
    assert report.dtype == torch.bfloat16
    assert alike[EMBED].dtype == alike["audio_head.heads.0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(alike[name], tensor) for name, tensor in encoder_tensors(brain).items())
    # bfloat16 and float16 hold different numbers: float32 holds both.
    assert build_checkpoint(llm, half, tmp_path / "mixed", SMALL).dtype == torch.float32
    mixed = tensors(tmp_path / "mixed")
    assert all(torch.equal(mixed[name], tensor.float()) for name, tensor in encoder_tensors(half).items())
    assert torch.equal(mixed[EMBED][:257], tensors(llm)["model.embed_tokens.weight"][:257].float())


def test_dtype_on_request(tmp_path, sources, tiny_folder):
    report = build_checkpoint(
        sources / "llama", sources / "whisper128", tmp_path / "built", SMALL, vocoder=tiny_folder, dtype=torch.bfloat16
    )
    state = tensors(tmp_path / "built")
    assert report.dtype == torch.bfloat16
    assert all(state[name].dtype == torch.bfloat16 for name in (EMBED, ENCODER + "conv1.weight", "audio_head.heads.0.weight"))
    assert state["vocoder.conv_pre.weight"].dtype == torch.float32
    assert torch.equal(state["vocoder.conv_pre.weight"], tensors(tiny_folder)["vocoder.conv_pre.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "built").dtype == torch.bfloat16
    config = json.loads((tmp_path / "built" / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"], config["vocoder_config"]["dtype"]) == (
        "bfloat16",
        "bfloat16",
        "float32",
    )


# -------------------- errors


def refused(message, sources, tmp_path, llm=None, encoder=None, **options):
    """The build is refused with `message`, and nothing is left behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        build_checkpoint(llm or sources / "qwen", encoder or sources / "whisper80", tmp_path / "built", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_not_an_llm(sources, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"empty is not a text LLM: it has no config.json", sources, tmp_path, llm=empty)
    refused(r"whisper80 is not a text LLM .* model type is whisper", sources, tmp_path, llm=sources / "whisper80")
    refused("no/where/at/all is neither a folder nor a Hub repository", sources, tmp_path, llm="no/where/at/all")
    (empty / "config.json").write_text('{"model_type": "nonsense"}')
    refused("empty cannot be loaded as a text LLM: .*nonsense", sources, tmp_path, llm=empty)
    (empty / "config.json").write_text((sources / "qwen" / "config.json").read_text())
    refused("empty cannot be loaded as a text LLM: .*model.safetensors", sources, tmp_path, llm=empty)


def test_a_speech_llm_is_no_llm(sources, tmp_path, tiny_folder):
    refused("is not a text LLM .* model type is baichuan_audio", sources, tmp_path, llm=tiny_folder)


def test_llm_without_tokenizer_or_tensors(sources, tmp_path):
    save(tmp_path / "llm", qwen())
    refused("llm lacks its tokenizer: [0-9]+ tokens are known for 300 rows", sources, tmp_path, llm=tmp_path / "llm")
    state = tensors(tmp_path / "llm")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    refused("llm is not a text LLM: it lacks 1 tensors: lm_head.weight", sources, tmp_path, llm=tmp_path / "llm")


def test_quantised_llm(sources, tmp_path):
    shutil.copytree(sources / "qwen", tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused("llm holds quantised weights", sources, tmp_path, llm=tmp_path / "llm")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GraniteConfig(**LLM_SIZES, vocab_size=257, logits_scaling=4.0), "logits of GraniteForCausalLM are more than"),
        (BertConfig(**(LLM_SIZES | UNTIED), vocab_size=257, is_decoder=True), "logits of BertLMHeadModel are more than"),
        (GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=257, bos_token_id=0, eos_token_id=0), "not named `embed_tokens`"),
    ],
    ids=["scaled logits", "head of its own", "tied under another name"],
)
def test_llm_that_our_model_cannot_hold(sources, tmp_path, config, message):
    llm = save(tmp_path / "llm", small_llm(config), qwen_tokenizer())
    refused(f"llm cannot be a backbone: .*{message}", sources, tmp_path, llm=llm)


def test_not_whisper(sources, tmp_path):
    refused("qwen is not a Whisper checkpoint: its model type is qwen2", sources, tmp_path, encoder=sources / "qwen")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty is not a Whisper checkpoint: it has no config.json", sources, tmp_path, encoder=empty)


def test_whisper_without_a_tensor(sources, tmp_path):
    shutil.copytree(sources / "whisper80", tmp_path / "whisper")
    state = tensors(tmp_path / "whisper")
    del state["encoder.layers.1.fc2.bias"]
    save_file(state, tmp_path / "whisper" / "model.safetensors", metadata={"format": "pt"})
    refused("lacks 1 tensors: encoder.layers.1.fc2.bias", sources, tmp_path, encoder=tmp_path / "whisper")


@pytest.mark.parametrize("change", [2e-3, float("nan")])
def test_other_positions_than_sinusoids(sources, tmp_path, change):
    changed = whisper()
    with torch.no_grad():
        changed.encoder.embed_positions.weight[37, 5] += change
    save(tmp_path / "whisper", changed)
    refused(
        "`embed_positions` differ from Whisper's sinusoids by up to (0.002|nan)", sources, tmp_path, encoder=tmp_path / "whisper"
    )


def test_positions_within_rounding_pass(sources, tmp_path):
    rounded = whisper()
    with torch.no_grad():
        rounded.encoder.embed_positions.weight += 5e-4
    build_checkpoint(sources / "qwen", save(tmp_path / "whisper", rounded), tmp_path / "built", SMALL)
    assert (tmp_path / "built" / "config.json").is_file()


def test_output_in_the_way(sources, tmp_path):
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "mine.txt").write_text("mine")
    refused("Output .*built exists already", sources, tmp_path)
    assert (tmp_path / "built" / "mine.txt").read_text() == "mine"
    (tmp_path / "built" / "mine.txt").unlink()
    build_checkpoint(sources / "qwen", sources / "whisper80", tmp_path / "built", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["built"], "temporary files were left"
    assert (tmp_path / "built").stat().st_mode & 0o777 == 0o755


def test_other_refusals(sources, tmp_path, tiny_folder):
    refused("`dtype` must be one of float32, float16, bfloat16, got torch.int8", sources, tmp_path, dtype=torch.int8)
    refused("Unknown override `colour`", sources, tmp_path, overrides={"colour": 1})
    wrong = {"audio_tokenizer_config": {"decoder_attention_heads": 3}}
    refused(r"must be a multiple of `decoder_attention_heads` \(3\)", sources, tmp_path, overrides=wrong)
    own = SMALL | {"vocoder_config": {"base_channels": 64}}
    refused("`vocoder_config` cannot be overridden when a vocoder", sources, tmp_path, overrides=own, vocoder=tiny_folder)
    refused("qwen cannot be loaded as a vocoder", sources, tmp_path, vocoder=sources / "qwen")


def test_interrupted_save_leaves_nothing(sources, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(BaichuanAudioForCausalLM, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        build_checkpoint(sources / "qwen", sources / "whisper80", tmp_path / "built", SMALL)
    assert list(tmp_path.iterdir()) == []
