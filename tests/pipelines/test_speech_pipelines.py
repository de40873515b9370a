"""transformers' pipelines for chats of text and speech, and for text to be spoken."""

import numpy as np
import pytest
import torch
from helpers.ecosystem import GREEDY, chat, sound
from transformers import AnyToAnyPipeline, AutoModelForCausalLM, AutoProcessor, TextToAudioPipeline, pipeline

from modeling_baichuan_audio import BaichuanAudioAnyToAnyPipeline, BaichuanAudioConfig, BaichuanAudioTextToAudioPipeline
from modeling_baichuan_audio.pipeline_speech import collate_prompts


SPOKEN = {"seed": 1, "max_new_tokens": 30}
CODES = np.random.default_rng(0).integers(0, 16, (8, 4))


def chats():
    """Speech of two lengths, one of them of two chunks; text alone; earlier speech as codes, with a question in speech."""
    earlier = [
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}, {"type": "audio", "audio_codes": CODES}]},
    ]
    return [
        chat(16000),
        chat(16000 * 31),
        [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
        earlier + chat(9000),
    ]


@pytest.fixture(scope="module")
def any_to_any(tiny_folder):
    return pipeline("any-to-any", model=str(tiny_folder))


@pytest.fixture(scope="module")
def text_to_audio(tiny_folder):
    return pipeline("text-to-audio", model=str(tiny_folder))


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def own_processor(tiny_folder):
    return AutoProcessor.from_pretrained(tiny_folder)


# -------------------- any-to-any


def test_text_of_a_chat(any_to_any, model, own_processor):
    (record,) = any_to_any(chat(16000), return_full_text=False, generate_kwargs=GREEDY)
    inputs = own_processor.apply_chat_template(chat(16000), tokenize=True, return_dict=True, add_generation_prompt=True)
    sequences = model.generate(**inputs, **GREEDY)
    new = own_processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert record["generated_text"] == new and record["input_text"][0]["role"] == "user"
    (full,) = any_to_any(chat(16000), generate_kwargs=GREEDY)
    assert full["generated_text"][-1] == {"role": "assistant", "content": new}


@pytest.mark.parametrize("batch_size", [2, 4])
def test_batches_give_what_single_chats_give(batch_size, any_to_any):
    settings = {"return_tensors": True, "generate_kwargs": GREEDY}
    batched = any_to_any(chats(), batch_size=batch_size, **settings)
    for records, one in zip(batched, chats()):
        alone = any_to_any(one, **settings)[0]["generated_token_ids"]
        together = records[0]["generated_token_ids"].flatten()
        assert torch.equal(together[-GREEDY["max_new_tokens"] :], alone.flatten()[-GREEDY["max_new_tokens"] :])


def test_speech_of_a_chat(any_to_any, model, own_processor):
    (record,) = any_to_any(chat(16000), generation_mode="audio", generate_kwargs=SPOKEN)
    inputs = own_processor.apply_chat_template(
        chat(16000), tokenize=True, return_dict=True, add_generation_prompt=True, speech=True
    )
    reply = model.generate(**inputs, generation_mode="audio", **SPOKEN)
    assert record["sampling_rate"] == 24000 and record["generated_audio"].dtype == np.float32
    assert np.array_equal(record["generated_audio"], reply.audio[0].numpy()) and record["generated_audio"].size
    assert np.array_equal(record["generated_audio_codes"], reply.audio_codes[0].numpy())
    texts = [part["token_ids"] for part in reply.segments[0] if part["type"] == "text"]
    assert record["generated_text"] == own_processor.decode(torch.cat(texts), skip_special_tokens=True)


def test_speech_in_batches(any_to_any):
    settings = {"generation_mode": "audio", "generate_kwargs": SPOKEN}
    given = dict(SPOKEN)
    for records, one in zip(any_to_any(chats(), batch_size=4, **settings), chats()):
        (alone,) = any_to_any(one, **settings)
        assert np.array_equal(records[0]["generated_audio_codes"], alone["generated_audio_codes"])
        np.testing.assert_allclose(records[0]["generated_audio"], alone["generated_audio"], atol=1e-4)
        assert records[0]["generated_text"] == alone["generated_text"]
    assert given == SPOKEN, "the caller's settings were written into"


def test_prompt_that_is_no_chat(any_to_any):
    prompt = "<audio_start_baichuan><audio_pad_baichuan><audio_end_baichuan>"
    records = any_to_any(text=prompt, audio=sound(16000), return_full_text=False, generate_kwargs=GREEDY)
    assert isinstance(records[0]["generated_text"], str)
    records = any_to_any(text=prompt, audio=sound(16000), generation_mode="audio", generate_kwargs=SPOKEN)
    assert records[0]["generated_audio"].ndim == 1


def test_codes_without_sound_are_refused(any_to_any):
    with pytest.raises(ValueError, match="output_audio=False"):
        any_to_any(chat(16000), generation_mode="audio", generate_kwargs=SPOKEN | {"output_audio": False})


def test_unknown_mode(any_to_any):
    with pytest.raises(ValueError, match="generation_mode"):
        any_to_any(chat(16000), generation_mode="image")


def test_collated_prompts_are_those_of_the_processor(own_processor):
    def process(conversation):
        return own_processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)

    together, items = process(chats()), [process(one) for one in chats()]
    collated = collate_prompts(items, own_processor.tokenizer, own_processor.audio_token_id)
    assert collated.keys() == together.keys()
    for name, value in collated.items():
        assert torch.equal(value, together[name]), name


# -------------------- text-to-audio


def test_text_is_spoken(text_to_audio, model, own_processor):
    text = "One sentence, long enough. Another one."
    record = text_to_audio(text, generate_kwargs={"seed": 1})
    reply = model.generate(**own_processor.apply_tts_request(text), generation_mode="audio", seed=1)
    assert record["sampling_rate"] == 24000
    assert record["audio"].dtype == np.float32 and np.array_equal(record["audio"], reply.audio[0].numpy())


def test_texts_in_batches(text_to_audio):
    texts = ["One sentence, long enough. Another one.", "Short."]
    for record, text in zip(text_to_audio(texts, batch_size=2, generate_kwargs={"seed": 1}), texts):
        alone = text_to_audio(text, generate_kwargs={"seed": 1})
        assert record["audio"].shape == alone["audio"].shape
        np.testing.assert_allclose(record["audio"], alone["audio"], atol=1e-4)


def test_chat_gets_a_spoken_reply(text_to_audio, any_to_any):
    one = [{"role": "user", "content": "What?"}]
    record = text_to_audio(one, generate_kwargs=SPOKEN)
    (other,) = any_to_any(one, generation_mode="audio", generate_kwargs=SPOKEN)
    assert np.array_equal(record["audio"], other["generated_audio"])


def test_text_to_speech_is_the_same(tiny_folder, text_to_audio):
    assert type(pipeline("text-to-speech", model=str(tiny_folder))) is type(text_to_audio)


# -------------------- other models, and configs


def test_other_models_keep_their_pipelines(model, own_processor, monkeypatch, any_to_any, text_to_audio):
    assert type(any_to_any) is BaichuanAudioAnyToAnyPipeline and isinstance(any_to_any, AnyToAnyPipeline)
    assert type(text_to_audio) is BaichuanAudioTextToAudioPipeline and isinstance(text_to_audio, TextToAudioPipeline)
    monkeypatch.setattr(model.config, "model_type", "another")
    monkeypatch.setattr(AnyToAnyPipeline, "__init__", lambda self, *args, **kwargs: None)  # older releases ask for librosa there
    for task, theirs in (("any-to-any", AnyToAnyPipeline), ("text-to-audio", TextToAudioPipeline)):
        assert type(pipeline(task, model=model, processor=own_processor, tokenizer=own_processor.tokenizer)) is theirs


def test_own_pipelines_need_no_trust_and_others_stay(tiny_folder):
    config = BaichuanAudioConfig.from_pretrained(tiny_folder)
    assert not hasattr(config, "custom_pipelines"), "transformers would ask for `trust_remote_code`"
    mine = {"my-task": {"impl": "mine.Mine", "pt": []}}
    settings = config.to_dict() | {"custom_pipelines": mine | {"any-to-any": {}}}
    assert BaichuanAudioConfig.from_dict(settings).custom_pipelines == mine
