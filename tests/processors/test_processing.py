"""The processor: placeholders, the chat template, transcription and speech requests, what comes back from `generate`."""

import base64
import copy
import inspect
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers.golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoProcessor, AutoTokenizer, Qwen2Tokenizer, pipeline
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pipelines.any_to_any import AnyToAnyPipeline
from transformers.utils import is_librosa_available

from modeling_baichuan_audio import BaichuanAudioGenerateOutput
from modeling_baichuan_audio.conversion import tiny_tokenizer
from modeling_baichuan_audio.processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from modeling_baichuan_audio.processors.processing_baichuan_audio import split_speech_text


PAD = "<audio_pad_baichuan>"
START, END = "<audio_start_baichuan>", "<audio_end_baichuan>"
GEN_START, GEN_END = "<audiogen_start_baichuan>", "<audiogen_end_baichuan>"
TEXT_START = "<audiotext_start_baichuan>"
SYSTEM, USER, ASSISTANT = "<B_SYS>", "<C_Q>", "<C_A>"


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that 16-bit samples hold exactly; 16000 samples have 12 code frames, 960 have one."""
    return np.random.default_rng(seed).integers(-8000, 8000, samples).astype(np.int16) / np.float32(32768)


def codes(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 15, (8, frames))


def wav_bytes(waveform: np.ndarray, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, (waveform * 32768).astype(np.int16), rate, format="WAV")
    return buffer.getvalue()


def ids(processor, *parts: str) -> list[int]:
    """Token ids, each part being one special token or plain text of one token for each byte."""
    vocabulary, symbols = processor.tokenizer.get_vocab(), bytes_to_unicode()
    expected = []
    for part in parts:
        special = part.startswith("<") and part in vocabulary
        expected += [vocabulary[part]] if special else [vocabulary[symbols[byte]] for byte in part.encode()]
    return expected


def rows(inputs) -> list[list[int]]:
    """Ids of each prompt without its padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def audio(value) -> dict:
    return {"type": "audio", "audio": value}


# Placeholders.


@pytest.mark.parametrize("samples, frames", [(960, 1), (16000, 12), (16000 * 31, 375 + 12), (16000 * 30 + 959, 375)])
def test_a_placeholder_becomes_one_token_for_each_frame(processor, samples, frames):
    inputs = processor(text=f"a{START}{PAD}{END}b", audio=noise(samples))
    assert inputs["input_ids"].tolist() == [ids(processor, "a", START, *[PAD] * frames, END, "b")]
    assert inputs["attention_mask"].tolist() == [[1] * (frames + 4)]
    assert processor.feature_extractor(noise(samples))["num_frames"] == [frames]


def test_several_prompts_with_several_audios(processor):
    waveforms = [noise(16000), noise(960, seed=1), noise(3200, seed=2)]
    inputs = processor(text=[f"one{PAD}two{PAD}", "none", f"{PAD}!"], audio=waveforms)
    expected = [ids(processor, "one", *[PAD] * 12, "two", PAD), ids(processor, "none"), ids(processor, PAD, PAD, "!")]
    assert rows(inputs) == expected
    # Padded on the left.
    longest = len(expected[0])
    assert inputs["attention_mask"].tolist() == [[0] * (longest - len(row)) + [1] * len(row) for row in expected]
    padding = inputs["input_ids"][~inputs["attention_mask"].bool()]
    assert set(padding.tolist()) == {processor.tokenizer.pad_token_id}
    # The audios stay in the order of the placeholders.
    alone = processor.feature_extractor(waveforms, return_tensors="pt")
    torch.testing.assert_close(inputs["input_features"], alone["input_features"], rtol=0, atol=0)
    torch.testing.assert_close(inputs["input_features_mask"], alone["input_features_mask"], rtol=0, atol=0)
    assert set(inputs) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}


def test_text_alone(processor):
    inputs = processor(text=["ab", "abc"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert rows(inputs) == [ids(processor, "ab"), ids(processor, "abc")]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    "one",
    [
        noise(3200),
        torch.from_numpy(noise(3200)),
        noise(3200).tolist(),
        wav_bytes(noise(3200)),
        base64.b64encode(wav_bytes(noise(3200))).decode(),
        {"array": noise(3200), "sampling_rate": 16000},
        np.stack([noise(3200), noise(3200)]),
    ],
    ids=["array", "tensor", "list", "bytes", "base64", "dict", "stereo"],
)
def test_one_audio_needs_no_list(processor, one):
    expected = processor(text=PAD, audio=[noise(3200)])
    for inputs in (processor(text=PAD, audio=one), processor(text=[PAD], audio=(one,))):
        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist() == [ids(processor, PAD, PAD)]
        torch.testing.assert_close(inputs["input_features"], expected["input_features"], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}])
def test_the_sampling_rate_of_raw_samples(processor, options):
    inputs = processor(text=PAD, audio=noise(8000), **options)
    expected = processor.feature_extractor(noise(8000), sampling_rate=8000, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 12)
    torch.testing.assert_close(inputs["input_features"], expected["input_features"], rtol=0, atol=0)


# Audio given as codes.


def test_codes_among_waveforms(processor):
    first, second = codes(5), codes(3, seed=1)
    inputs = processor(
        text=[f"a{PAD}b{PAD}", PAD, "c", f"{PAD}{PAD}"],
        audio=[
            {"audio_codes": first},
            noise(16000),
            {"audio_codes": second.tolist()},
            noise(960),
            {"audio_codes": torch.tensor(second)},
        ],
    )
    assert rows(inputs)[0] == ids(processor, "a", *[PAD] * 5, "b", *[PAD] * 12)
    assert rows(inputs)[1:] == [ids(processor, PAD, PAD, PAD), ids(processor, "c"), ids(processor, *[PAD] * 4)]
    expected = np.full((4, 8, 17), -1)
    expected[0, :, :5] = first
    expected[1, :, :3] = second
    expected[3, :, 1:4] = second
    assert inputs["audio_codes"].dtype == torch.int64
    assert inputs["audio_codes"].tolist() == expected.tolist()
    alone = processor.feature_extractor([noise(16000), noise(960)], return_tensors="pt")
    torch.testing.assert_close(inputs["input_features"], alone["input_features"], rtol=0, atol=0)


def test_codes_alone_need_no_features(processor):
    inputs = processor(text=PAD, audio={"audio_codes": codes(4)})
    assert set(inputs) == {"input_ids", "attention_mask", "audio_codes"}
    assert inputs["audio_codes"].tolist() == [codes(4).tolist()]
    assert inputs["input_ids"].tolist() == [ids(processor, *[PAD] * 4)]


@pytest.mark.parametrize("return_tensors, kind", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_return_tensors(processor, return_tensors, kind):
    inputs = processor(text=[f"a{PAD}", "b"], audio={"audio_codes": codes(2)}, return_tensors=return_tensors)
    assert {type(value) for value in inputs.values()} == {kind}
    assert np.asarray(inputs["audio_codes"]).tolist() == [codes(2).tolist(), [[-1, -1]] * 8]
    assert np.asarray(inputs["attention_mask"]).tolist() == [[1, 1, 1], [0, 0, 1]]
    features = processor(text=PAD, audio=noise(960), return_tensors=return_tensors)["input_features"]
    assert isinstance(features, torch.Tensor if return_tensors == "pt" else np.ndarray)
    np.testing.assert_array_equal(features, processor.feature_extractor(noise(960))["input_features"])


# Refusals.


@pytest.mark.parametrize(
    "prompts, audios, message",
    [
        (PAD + PAD, [noise(960)], "number of .* got 2 and 1"),
        (PAD, [noise(960)] * 2, "number of .* got 1 and 2"),
        ([PAD, "a"], [noise(960), {"audio_codes": codes(1)}], "number of .* got 1 and 2"),
        ("a", noise(960), "number of .* got 0 and 1"),
        (PAD, None, "Found 1 .* but no audio inputs were passed"),
        (PAD, [], "Audio is empty"),
        (None, None, "`text` is needed"),
        (None, noise(960), "`text` is needed"),
        (5, None, "must be a string or a list of strings, got int"),
        (["a", 5], None, "must be a string or a list of strings, got list"),
        ({"a": 1}, None, "must be a string or a list of strings, got dict"),
        ([["a", "b"]], None, "must be a string or a list of strings, got list"),
        (PAD, noise(959), "shorter than one code frame"),
        (PAD, ["no/such/file.wav"], "is no file"),
        (PAD, {"audio_codes": codes(3)[0]}, r"shape \(num_codebooks, frames\), got int64 of shape \(3,\)"),
        (PAD, {"audio_codes": codes(3)[None]}, r"got int64 of shape \(1, 8, 3\)"),
        (PAD, {"audio_codes": codes(0)}, r"got int64 of shape \(8, 0\)"),
        (PAD, {"audio_codes": np.zeros((0, 3), dtype=int)}, r"got int64 of shape \(0, 3\)"),
        (PAD, {"audio_codes": codes(3) - 16}, "must be non-negative integers"),
        (PAD, {"audio_codes": codes(3).astype(float)}, "got float64"),
        (PAD, {"audio_codes": [["a"]]}, "got <U1"),
        (PAD, {"audio_codes": [[1], [1, 2]]}, "rows have different lengths"),
        (PAD, {"audio_codes": None}, 'needs "array", "bytes" or "path"'),
        (PAD + PAD, [{"audio_codes": codes(3)}, {"audio_codes": codes(3)[:7]}], r"same number of codebooks, got \[7, 8\]"),
    ],
)
def test_bad_calls_are_refused(processor, prompts, audios, message):
    with pytest.raises(ValueError, match=message):
        processor(text=prompts, audio=audios)


def test_truncation_must_not_cut_audio(processor):
    with pytest.raises(ValueError, match="truncation"):
        processor(text=PAD, audio=noise(16000), truncation=True, max_length=5)


def test_a_tokenizer_without_the_special_tokens_is_refused():
    plain = Qwen2Tokenizer(vocab={symbol: index for index, symbol in enumerate(bytes_to_unicode().values())}, merges=[])
    with pytest.raises(ValueError, match="lacks the special tokens") as error:
        BaichuanAudioProcessor(BaichuanAudioFeatureExtractor(), plain)
    for token in (START, END, PAD, GEN_START, GEN_END, TEXT_START, SYSTEM, USER, ASSISTANT):
        assert token in str(error.value)
    needed = [token for token in tiny_tokenizer().get_added_vocab() if token not in ("<|endoftext|>", "<B_USYS>", ASSISTANT)]
    plain.add_special_tokens({"additional_special_tokens": needed})
    with pytest.raises(ValueError, match="lacks the special tokens <C_A>[.]$"):
        BaichuanAudioProcessor(BaichuanAudioFeatureExtractor(), plain)


# The chat template.

TALK = [
    {"role": "system", "content": "Be brief."},
    user(text("Listen: "), audio(noise(16000)), text(" Well?")),
    {
        "role": "assistant",
        "content": [
            text("Yes,"),
            {"type": "audio", "audio_codes": codes(4)},
            text(" sure."),
            {"type": "audio", "audio_codes": codes(2, seed=1)},
        ],
    },
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    "options, reply, ending",
    [
        ({}, ASSISTANT, ""),
        ({"add_generation_prompt": True}, ASSISTANT, ASSISTANT),
        ({"speech": True}, TEXT_START + ASSISTANT, ""),
        ({"speech": True, "add_generation_prompt": True}, TEXT_START + ASSISTANT, TEXT_START + ASSISTANT),
        ({"speech": False, "add_generation_prompt": True}, ASSISTANT, ASSISTANT),
    ],
)
def test_rendered_conversations(processor, options, reply, ending):
    assert processor.apply_chat_template(TALK, **options) == (
        f"<B_SYS>Be brief.<C_Q>Listen: {START}{PAD}{END} Well?"
        f"{reply}Yes,{GEN_START}{PAD}{GEN_END} sure.{GEN_START}{PAD}{GEN_END}<C_Q>Bye{ending}"
    )


@pytest.mark.parametrize(
    "conversation, expected",
    [
        ([{"role": "user", "content": "Hi"}], "<C_Q>Hi"),
        ([user(text("Hi"))], "<C_Q>Hi"),
        ([{"role": "user", "content": (text("H"), text("i"))}], "<C_Q>Hi"),
        ([user({"type": "audio"})], f"<C_Q>{START}{PAD}{END}"),
        ([{"role": "system", "content": [text("As "), audio(noise(960))]}], f"<B_SYS>As {START}{PAD}{END}"),
        ([{"role": "assistant", "content": "Hi"}], "<C_A>Hi"),
        ([user(text("  {{ x }}\n"))], "<C_Q>  {{ x }}\n"),
    ],
)
def test_rendered_messages(processor, conversation, expected):
    assert processor.apply_chat_template(conversation) == expected
    assert processor.apply_chat_template([conversation, conversation[:1]]) == [expected, expected]


@pytest.mark.parametrize("speech", [True, False])
def test_encoded_conversation(processor, speech):
    inputs = processor.apply_chat_template(TALK, speech=speech, add_generation_prompt=True, tokenize=True, return_dict=True)
    reply = [TEXT_START, ASSISTANT] if speech else [ASSISTANT]
    question = [SYSTEM, "Be brief.", USER, "Listen: ", START, *[PAD] * 12, END, " Well?"]
    answer = ["Yes,", GEN_START, *[PAD] * 4, GEN_END, " sure.", GEN_START, *[PAD] * 2, GEN_END]
    assert inputs["input_ids"].tolist() == [ids(processor, *question, *reply, *answer, USER, "Bye", *reply)]
    assert inputs["attention_mask"].all()
    np.testing.assert_array_equal(inputs["input_features"], processor.feature_extractor(noise(16000))["input_features"])
    expected = np.concatenate([np.full((8, 12), -1), codes(4), codes(2, seed=1)], axis=1)
    assert inputs["audio_codes"].tolist() == [expected.tolist()]
    only_ids = processor.apply_chat_template(TALK, speech=speech, add_generation_prompt=True, tokenize=True)
    assert only_ids.tolist() == inputs["input_ids"].tolist()


def test_encoded_batch_of_conversations(processor):
    talks = [
        [user(text("Hi"))],
        [user(audio(noise(960))), {"role": "assistant", "content": "Oh"}, user(audio(noise(3200, seed=1)))],
        TALK,
    ]
    inputs = processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    alone = [processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True) for talk in talks]
    assert rows(inputs) == [one["input_ids"][0].tolist() for one in alone]
    assert rows(inputs)[1] == ids(processor, USER, START, PAD, END, ASSISTANT, "Oh", USER, START, PAD, PAD, END, ASSISTANT)
    assert inputs["attention_mask"][0].tolist() == [0] * (inputs["input_ids"].shape[1] - 4) + [1] * 4
    # Features of all conversations in order; codes only where the third has them.
    expected = processor.feature_extractor([noise(960), noise(3200, seed=1), noise(16000)])
    np.testing.assert_array_equal(inputs["input_features"], expected["input_features"])
    assert (inputs["audio_codes"][:2] == -1).all()
    assert inputs["audio_codes"][2].tolist() == alone[2]["audio_codes"][0].tolist()


@pytest.mark.parametrize("key", ["audio", "path", "url", "base64", "audio_codes"])
def test_sources_of_audio(processor, tmp_path, key):
    path = tmp_path / "speech.wav"
    path.write_bytes(wav_bytes(noise(3200)))
    source = {"audio": noise(3200), "base64": base64.b64encode(path.read_bytes()).decode(), "audio_codes": codes(2)}.get(
        key, str(path)
    )
    inputs = processor.apply_chat_template([user({"type": "audio", key: source})], tokenize=True, return_dict=True)
    assert inputs["input_ids"].tolist() == [ids(processor, USER, START, PAD, PAD, END)]
    if key == "audio_codes":
        assert inputs["audio_codes"].tolist() == [codes(2).tolist()] and "input_features" not in inputs
    else:
        np.testing.assert_array_equal(inputs["input_features"], processor.feature_extractor(noise(3200))["input_features"])


@pytest.mark.parametrize(
    "value", [{"bytes": wav_bytes(noise(3200))}, {"audio_codes": codes(2)}, wav_bytes(noise(3200)), torch.from_numpy(noise(3200))]
)
def test_packagings_in_a_conversation(processor, value):
    inputs = processor.apply_chat_template([user(audio(value))], tokenize=True, return_dict=True)
    assert inputs["input_ids"].tolist() == [ids(processor, USER, START, PAD, PAD, END)]


@pytest.mark.parametrize(
    "options",
    [
        {"processor_kwargs": {"sampling_rate": 8000}},
        {"processor_kwargs": {"audio_kwargs": {"sampling_rate": 8000}}},
        {"sampling_rate": 8000},
        {"audio_kwargs": {"sampling_rate": 8000}},
    ],
)
def test_the_sampling_rate_in_a_conversation_is_that_of_raw_samples(processor, options):
    conversation = [user(audio(noise(8000)), audio(wav_bytes(noise(3200, seed=1))))]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
    waveforms = [processor.feature_extractor.read_audio(noise(8000), 8000), noise(3200, seed=1)]
    np.testing.assert_array_equal(inputs["input_features"], processor.feature_extractor(waveforms)["input_features"])


def test_nothing_that_is_passed_is_changed(processor, tmp_path):
    path = tmp_path / "speech.wav"
    path.write_bytes(wav_bytes(noise(960)))
    conversation = [
        user(text("a"), {"type": "audio", "path": str(path)}),
        {"role": "assistant", "content": [{"type": "audio", "audio_codes": codes(2).tolist()}]},
        user({"type": "audio", "audio": noise(960).tolist()}),
    ]
    options = {"padding": True, "audio_kwargs": {"sampling_rate": 16000}}
    before = copy.deepcopy((conversation, options))
    processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, processor_kwargs=options, return_assistant_tokens_mask=True
    )
    processor.apply_chat_template([conversation, conversation], tokenize=True, processor_kwargs=options)
    assert (conversation, options) == before


@pytest.mark.parametrize(
    "conversation, error, message",
    [
        ([{"role": "tool", "content": "x"}], TemplateError, 'Roles are "system", "user" and "assistant", got "tool"'),
        ([{"content": "x"}], TemplateError, "Roles are"),
        ([user({"type": "image"})], TemplateError, 'parts are of type "text" or "audio", got "image"'),
        ([user({"text": "x"})], ValueError, r"""must be a dict with a "type", got the keys \['text'\]"""),
        ([user({"type": "text"})], ValueError, 'needs a string under "text", got None'),
        ([user({"type": "text", "text": 5})], ValueError, 'needs a string under "text", got 5'),
        ([user("x")], ValueError, "part of a message must be a dict"),
        (["x"], ValueError, "message must be a dict"),
        ("x", ValueError, "message must be a dict"),
        ([], ValueError, "at least one message"),
        ([[user(text("x"))], []], ValueError, "at least one message"),
    ],
)
@pytest.mark.parametrize("tokenize", [True, False])
def test_bad_conversations_are_refused(processor, conversation, error, message, tokenize):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(conversation, tokenize=tokenize)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "audio"}, r"exactly one of .*, got \['type'\]"),
        ({"type": "audio", "audio": None}, r"exactly one of .*, got \['audio', 'type'\]"),
        ({"type": "audio", "audio": noise(960), "path": "a.wav"}, r"exactly one of .*, got \['audio', 'path'\]"),
        ({"type": "audio", "url": "a.wav", "audio_codes": codes(2)}, r"exactly one of .*, got \['url', 'audio_codes'\]"),
        ({"type": "audio", "path": "no/such/file.wav"}, "is no file"),
        ({"type": "audio", "audio": noise(959)}, "shorter than one code frame"),
        ({"type": "audio", "audio_codes": codes(2) - 16}, "non-negative integers"),
    ],
)
def test_bad_audio_parts_are_refused(processor, part, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([user(part)], tokenize=True, return_dict=True)


def test_a_placeholder_written_by_a_user_is_refused(processor):
    with pytest.raises(ValueError, match="number of .* got 2 and 1"):
        processor.apply_chat_template([user(text(PAD), audio(noise(960)))], tokenize=True)


@pytest.mark.parametrize("speech", [True, False])
def test_assistant_tokens_are_marked(processor, speech):
    talks = [
        TALK,
        [
            user(audio(noise(3200))),
            {"role": "assistant", "content": "Oh"},
            user(text("?")),
            {"role": "assistant", "content": "No"},
        ],
        [user(text("Hi"))],
    ]
    inputs = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=True, speech=speech
    )
    mask = torch.tensor(inputs["assistant_masks"]).bool()
    assert mask.shape == inputs["input_ids"].shape
    marked = [row[chosen].tolist() for row, chosen in zip(inputs["input_ids"], mask)]
    assert marked == [
        ids(processor, "Yes,", GEN_START, *[PAD] * 4, GEN_END, " sure.", GEN_START, *[PAD] * 2, GEN_END),
        ids(processor, "Oh", "No"),
        [],
    ]
    # In the right place, not only the right tokens: the user's audio and question come before.
    before = len(ids(processor, USER, START, PAD, PAD, END, *([TEXT_START] if speech else []), ASSISTANT))
    first = int((~inputs["attention_mask"][1].bool()).sum()) + before
    assert mask[1].nonzero()[:2].flatten().tolist() == [first, first + 1]
    assert "offset_mapping" not in inputs and "text_replacement_offsets" not in inputs


@torch.no_grad()
def test_a_conversation_with_spoken_history_goes_through_the_model(processor, shared_tiny_model):
    options = {"speech": True, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
    logits = shared_tiny_model(**processor.apply_chat_template(TALK, **options)).logits
    assert logits.shape[0] == 1 and torch.isfinite(logits).all()
    changed = copy.deepcopy(TALK)
    changed[2]["content"][3]["audio_codes"][:, 1] += 1
    others = shared_tiny_model(**processor.apply_chat_template(changed, **options)).logits
    # The last frame of the history, its end, <C_Q>, "Bye" and the generation prompt come after it.
    place = 1 + 1 + 1 + 3 + 2
    torch.testing.assert_close(logits[:, :-place], others[:, :-place], rtol=0, atol=1e-6)
    assert (logits[:, -place:] - others[:, -place:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_codes_and_their_waveform_are_the_same_to_the_model(processor, shared_tiny_model):
    features = processor.feature_extractor(noise(16000), return_tensors="pt")
    known = shared_tiny_model.get_audio_codes(features["input_features"], features["input_features_mask"])[0]
    prompts = [f"a{PAD}b{PAD}", f"{PAD}c"]
    heard = processor(text=prompts, audio=[noise(960, seed=1), noise(16000), noise(16000)])
    mixed = processor(text=prompts, audio=[noise(960, seed=1), {"audio_codes": known}, noise(16000)])
    torch.testing.assert_close(shared_tiny_model(**mixed).logits, shared_tiny_model(**heard).logits, rtol=0, atol=1e-5)


# Transcription and speech requests.


def test_transcription_request(processor):
    prompt = "将语音转录为文本:"
    inputs = processor.apply_transcription_request(noise(16000))
    assert inputs["input_ids"].tolist() == [ids(processor, prompt, START, *[PAD] * 12, END)]
    np.testing.assert_array_equal(inputs["input_features"], processor.feature_extractor(noise(16000))["input_features"])
    batch = processor.apply_transcription_request([noise(16000), wav_bytes(noise(960))], prompt="Text?")
    assert rows(batch) == [ids(processor, "Text?", START, *[PAD] * 12, END), ids(processor, "Text?", START, PAD, END)]
    slow = processor.apply_transcription_request(noise(8000), sampling_rate=8000)
    assert slow["input_ids"].tolist() == inputs["input_ids"].tolist()


@pytest.mark.parametrize(
    "audios, message", [([], "Audio is empty"), (noise(100), "shorter than one"), ([noise(960), None], "object")]
)
def test_bad_transcription_requests_are_refused(processor, audios, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_transcription_request(audios)


SPLITS = [
    ("Hello there, my friends! How are you? Fine", ["Hello there,", " my friends!", " How are you?", " Fine"]),
    ("Oh, yes, I do. Well", ["Oh, yes, I do. Well"]),
    ("Oh, yes, I do; well: no", ["Oh, yes, I do;", " well: no"]),
    ("0123456789,a", ["0123456789,", "a"]),
    ("012345678,a,", ["012345678,a,"]),
    ("012345678,a", ["012345678,a"]),
    ("你好，今天天气真不错，我们去公园吧！好", ["你好，今天天气真不错，", "我们去公园吧！好"]),
    (
        "一二三四五六七八九十。一二三四五六七八九十；一二三四五六七八九十：",
        ["一二三四五六七八九十。", "一二三四五六七八九十；", "一二三四五六七八九十："],
    ),
    ("Hello there!\n", ["Hello there!"]),
    ("Hi", ["Hi"]),
    ("", []),
    (" \n", []),
]


@pytest.mark.parametrize("value, pieces", SPLITS)
def test_text_is_split_after_punctuation(value, pieces):
    assert split_speech_text(value) == pieces


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("ab语 \n:,;!?，。；：！？."), st.characters()), max_size=80))
def test_the_pieces_of_a_text_give_the_text_back(value):
    pieces, ends = split_speech_text(value), ":,;!?，。；：！？"
    joined = "".join(pieces)
    # Nothing is lost but white space that stands alone at the end.
    assert value.startswith(joined) and not value[len(joined) :].strip()
    assert bool(pieces) == bool(value.strip())
    for piece in pieces[:-1]:
        assert len(piece) > 10 and piece[-1] in ends
    for piece in pieces:  # cut at the first place allowed
        assert not any(character in ends for character in piece[10:-1])


def test_speech_request(processor):
    inputs = processor.apply_tts_request("Hello there, my friends! Fine")
    assert inputs["input_ids"].tolist() == [ids(processor, "Hello there,", GEN_START)]
    assert inputs["attention_mask"].tolist() == [[1] * 13]
    assert inputs["forced_text_ids"] == [[ids(processor, " my friends!"), ids(processor, " Fine")]]
    assert set(inputs) == {"input_ids", "attention_mask", "forced_text_ids"}


def test_batch_of_speech_requests(processor):
    inputs = processor.apply_tts_request(["你好，今天天气真不错，我们去公园吧！好", "Hi", "Hello there! Bye"])
    assert rows(inputs) == [
        ids(processor, "你好，今天天气真不错，", GEN_START),
        ids(processor, "Hi", GEN_START),
        ids(processor, "Hello there!", GEN_START),
    ]
    assert inputs["attention_mask"][1].tolist() == [0] * 31 + [1] * 3
    assert inputs["forced_text_ids"] == [[ids(processor, "我们去公园吧！好")], [], [ids(processor, " Bye")]]


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "nothing to speak in ''"),
        (" \n", r"nothing to speak in ' \\n'"),
        (["Hi", " "], "nothing to speak in ' '"),
        ([], "must be a string or a list of strings"),
        (None, "must be a string or a list of strings, got None"),
        (["Hi", 5], "must be a string or a list of strings"),
    ],
)
def test_bad_speech_requests_are_refused(processor, value, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_tts_request(value)


def test_a_speech_request_can_be_moved_and_spoken(processor, shared_tiny_model):
    inputs = processor.apply_tts_request(["Hello there, my friends!", "Hi"])
    scripts = copy.deepcopy(inputs["forced_text_ids"])
    moved = inputs.to("cpu").to(torch.float32)
    assert moved["forced_text_ids"] == scripts
    output = shared_tiny_model.generate(**moved, generation_mode="audio", max_new_tokens=8, seed=0)
    assert output.sequences.shape[1] <= inputs["input_ids"].shape[1] + 8
    assert [segments[0]["type"] for segments in output.segments] == ["audio", "audio"]
    assert all(waveform.ndim == 1 and len(waveform) and torch.isfinite(waveform).all() for waveform in output.audio)


def test_the_pieces_of_a_speech_request_are_spoken_in_order(processor, shared_tiny_model):
    inputs = processor.apply_tts_request("Hello there, my friends! Fine")
    output = shared_tiny_model.generate(**inputs, generation_mode="audio", max_audio_frames=2, max_new_tokens=100, seed=0)
    spoken = [PAD, PAD, GEN_END]
    expected = ["Hello there,", GEN_START, *spoken, " my friends!", GEN_START, *spoken, " Fine", GEN_START, *spoken]
    assert output.sequences.tolist() == [ids(processor, *expected)]
    assert output.audio_codes.shape == (1, 8, 6)


@pytest.mark.parametrize("speech", [True, False])
def test_inputs_of_every_kind_can_be_moved(processor, speech):
    inputs = processor.apply_chat_template(TALK, speech=speech, tokenize=True, return_dict=True).to("cpu", torch.bfloat16)
    assert inputs["input_features"].dtype == torch.bfloat16
    assert {inputs[name].dtype for name in ("input_ids", "attention_mask", "input_features_mask", "audio_codes")} == {torch.int64}


# The way back.


def test_audio_switch_tokens_are_the_punctuation_bytes(processor):
    # Only these endings are a byte of their own: the tiny tokenizer has no token for the others.
    assert processor.audio_switch_token_ids() == sorted(ids(processor, ",!?"))


def test_texts_from_a_generation(processor):
    first, second = ids(processor, "Hi", GEN_START, PAD, GEN_END, "!"), ids(processor, "<|endoftext|>", "ab", USER, "cd")
    sequences = torch.tensor([first, second])
    output = BaichuanAudioGenerateOutput(sequences=sequences)
    for generated in (sequences, output, sequences.tolist()):
        assert processor.post_process_multimodal_output(generated) == ["Hi!", "abcd"]
        assert processor.post_process_multimodal_output(generated, generation_mode="text") == ["Hi!", "abcd"]
    kept = processor.post_process_multimodal_output(output, skip_special_tokens=False)
    assert kept == [f"Hi{GEN_START}{PAD}{GEN_END}!", "<|endoftext|>ab<C_Q>cd"]
    assert processor.batch_decode(sequences, skip_special_tokens=True) == ["Hi!", "abcd"]


def test_waveforms_from_a_generation(processor):
    output = BaichuanAudioGenerateOutput(audio=[torch.tensor([0.5, -0.25], dtype=torch.bfloat16), torch.empty(0)])
    waveforms = processor.post_process_multimodal_output(output, generation_mode="audio")
    assert [(type(waveform), waveform.dtype) for waveform in waveforms] == [(np.ndarray, np.float32)] * 2
    assert [waveform.tolist() for waveform in waveforms] == [[0.5, -0.25], []]


@pytest.mark.parametrize("generated", [torch.tensor([[1]]), BaichuanAudioGenerateOutput(sequences=torch.tensor([[1]]))])
def test_missing_waveforms_are_an_error(processor, generated):
    with pytest.raises(ValueError, match="There are no waveforms"):
        processor.post_process_multimodal_output(generated, generation_mode="audio")


def test_an_unknown_mode_is_an_error(processor):
    with pytest.raises(ValueError, match='must be "text" or "audio", got \'image\''):
        processor.post_process_multimodal_output(torch.tensor([[1]]), generation_mode="image")


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        torch.from_numpy,
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: x.astype(np.float64),
        lambda x: [x],
    ],
)
@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_saved_audio_holds_the_same_samples(processor, tmp_path, convert, ending):
    path = tmp_path / f"reply.{ending}"
    path.write_bytes(b"an older reply")
    processor.save_audio(convert(noise(2400)), path)
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == 24000
    np.testing.assert_allclose(samples, noise(2400), atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_audio_of_several_replies(processor, tmp_path):
    paths = [tmp_path / "a.wav", str(tmp_path / "b.wav"), tmp_path / "c.wav"]
    sixteen = (noise(100) * 32768).astype(np.int16)
    processor.save_audio([torch.from_numpy(noise(10)).half(), sixteen, torch.from_numpy(sixteen)], paths, sampling_rate=16000)
    contents = [soundfile.read(path, dtype="float32") for path in paths]
    assert [rate for _, rate in contents] == [16000] * 3
    for (samples, _), expected in zip(contents, (noise(10), noise(100), noise(100))):
        np.testing.assert_allclose(samples, expected, atol=2e-4)


@pytest.mark.parametrize(
    "waveform, name, options, message",
    [
        (noise(10)[None], "a.wav", {}, r"got shape \(1, 10\)"),
        (noise(0), "a.wav", {}, r"got shape \(0,\)"),
        ([noise(10), noise(10)], "a.wav", {}, "2 waveforms but 1 paths"),
        (np.arange(10), "a.wav", {}, "must be float, int16 or int32, got int64"),
        (np.append(noise(10), np.float32("nan")), "a.wav", {}, "NaN or infinite"),
        (noise(10), "a", {}, "a cannot be written: No format"),
        (noise(10), "a.xyz", {}, "a.xyz cannot be written: No format"),
        (noise(10), "no/a.wav", {}, "no/a.wav cannot be written"),
        (noise(10), "a.flac", {"sampling_rate": -1}, "a.flac cannot be written"),
    ],
)
def test_audio_that_cannot_be_saved_leaves_no_file(processor, tmp_path, waveform, name, options, message):
    with pytest.raises(ValueError, match=message):
        processor.save_audio(waveform, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_saved_when_one_of_several_is_bad(processor, tmp_path):
    with pytest.raises(ValueError, match="got shape"):
        processor.save_audio([noise(10), noise(0)], [tmp_path / "a.wav", tmp_path / "b.wav"])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_keeps_the_older_file(processor, tmp_path, monkeypatch):
    def interrupted(path, *args, **kwargs):
        Path(path).write_bytes(b"RIFF")
        raise OSError("no space left on device")

    (tmp_path / "a.wav").write_bytes(b"older")
    monkeypatch.setattr(soundfile, "write", interrupted)
    with pytest.raises(OSError, match="no space left"):
        processor.save_audio(noise(10), tmp_path / "a.wav")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.wav", b"older")]


# Saving and sending to workers.


def assert_same_inputs(ours, theirs):
    for options in ({"speech": True}, {"add_generation_prompt": True}):
        first = ours.apply_chat_template(TALK, tokenize=True, return_dict=True, **options)
        second = theirs.apply_chat_template(TALK, tokenize=True, return_dict=True, **options)
        assert set(first) == set(second)
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    assert rows(ours(text=["ab", "c"])) == rows(theirs(text=["ab", "c"]))
    assert ours.audio_switch_token_ids() == theirs.audio_switch_token_ids()


def test_a_saved_processor_gives_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is BaichuanAudioProcessor
    assert_same_inputs(processor, loaded)
    assert_same_inputs(processor, BaichuanAudioProcessor.from_pretrained(tmp_path))


def test_the_processor_of_a_checkpoint(processor, tiny_folder):
    loaded = AutoProcessor.from_pretrained(tiny_folder)
    assert type(loaded) is BaichuanAudioProcessor
    assert_same_inputs(processor, loaded)


def test_the_padding_side_is_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == processor.feature_extractor.padding_side == "left"


def test_a_batch_in_a_pipeline_equals_one_at_a_time(tiny_folder):
    if '"librosa"' in inspect.getsource(AnyToAnyPipeline) and not is_librosa_available():
        pytest.skip("the pipeline of this release of transformers needs librosa")
    pipe = pipeline("any-to-any", model=str(tiny_folder))
    talks = [[user(text("Hello there"))], [user(text("Hi"))]]
    together, alone = (
        pipe(talks, batch_size=size, return_full_text=False, max_new_tokens=6, generate_kwargs={"do_sample": False})
        for size in (2, 1)
    )
    assert [one[0]["generated_text"] for one in together] == [one[0]["generated_text"] for one in alone]
    assert all(one[0]["generated_text"] for one in alone)


def test_own_settings_and_template_are_saved(tmp_path):
    saved = BaichuanAudioProcessor(
        BaichuanAudioFeatureExtractor(max_audio_seconds=4), tiny_tokenizer(), chat_template="{{ messages[0].content }}"
    )
    saved.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"
    wave = golden()["wave.2"]  # 5 seconds: two chunks of this extractor
    assert loaded(text=PAD, audio=wave)["input_features"].shape == (2, 128, 400)
    assert rows(loaded(text=PAD, audio=wave)) == [ids(saved, *[PAD] * 62)]


def test_a_pickled_processor_gives_the_same_inputs(processor):
    assert_same_inputs(processor, pickle.loads(pickle.dumps(processor)))


def test_inputs_can_be_pickled(processor):
    inputs = processor.apply_chat_template(TALK, tokenize=True, return_dict=True)
    copied = pickle.loads(pickle.dumps(inputs))
    for name in inputs:
        torch.testing.assert_close(copied[name], inputs[name], rtol=0, atol=0)
