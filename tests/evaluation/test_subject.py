import numpy as np
import pytest
import soundfile
import torch

from modeling_baichuan_audio.evaluation import subject as module
from modeling_baichuan_audio.evaluation.subject import clip_seed


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("LONGEST_TRANSCRIPT", "LONGEST_ANSWER", "LONGEST_PIECE"):
        monkeypatch.setattr(module, name, 6)
    monkeypatch.setattr(module, "_LONGEST_REPLY", 30)


def alone(subject, inputs):
    ids = subject.model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=6)
    return subject.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_transcripts(subject, sets):
    texts = subject.transcribe("t", [*sets.voices, *sets.human])
    assert len(texts) == 4 and len(set(texts)) > 1
    for clip, text in zip(sets.voices, texts):
        assert text == alone(subject, subject.processor.apply_transcription_request(str(clip.path)))


def test_answers(subject, sets):
    question = sets.questions[0]
    for speech, task, content in (
        (False, subject.answer, [{"type": "audio", "path": str(question.path)}]),
        (False, subject.answer_written, question.text),
    ):
        inputs = subject.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True, speech=speech
        )
        assert task(task.__name__, sets.questions)[0] == alone(subject, inputs)


def test_written_questions_need_no_recording(subject, sets):
    from dataclasses import replace

    clips = [replace(clip, path=None) for clip in sets.questions]
    assert subject.answer_written("w", clips) == subject.answer_written("v", sets.questions)


def check_sound(subject, task, clip, item):
    samples, rate = soundfile.read(subject.outputs.wav(task, clip.id))
    frames = item["frames"]
    expected = sum((4 * count - 1) * 480 for count in frames) - 240 * (len(frames) - 1) if frames else rate // 2
    assert rate == 24000 and len(samples) == expected and bool(frames) == bool(np.abs(samples).max() > 0)


def test_spoken_answers(subject, sets):
    items = subject.answer_aloud("aloud", sets.questions)
    for clip, item in zip(sets.questions, items):
        check_sound(subject, "aloud", clip, item)
    # A reply depends on its question and its seed, not on its batch; its text is the most likely one.
    clip, item = sets.questions[1], items[1]
    reply = subject.reply(subject.ask_aloud([clip]), [clip_seed(0, clip.id)])
    words = [part["token_ids"] for part in reply.segments[0] if part["type"] == "text"]
    assert item["text"] == subject.processor.decode(torch.cat(words), skip_special_tokens=True)
    assert item["frames"] == [part["audio_codes"].shape[1] for part in reply.segments[0] if part["type"] == "audio"]
    other = subject.reply(subject.ask_aloud([clip]), [1])
    first = [next(part["token_ids"] for part in found.segments[0] if part["type"] == "text") for found in (reply, other)]
    assert torch.equal(*first)


def test_spoken_sentences(subject, sets):
    from dataclasses import replace

    clips = [replace(sets.sentences[0], text="A first long piece, and then a second one."), sets.sentences[1]]
    items = subject.speak("speak", clips)
    for clip, item in zip(clips, items):
        check_sound(subject, "speak", clip, item)
    assert len(items[0]["frames"]) <= 2 and all(count <= 6 for item in items for count in item["frames"])


def test_a_reply_without_sound_is_half_a_second_of_silence(subject, sets):
    class Reply:
        audio, segments = [torch.empty(0)], [[]]

    clip = sets.questions[0]
    assert subject._spoken("none", [clip], Reply) == [{"id": clip.id, "text": "", "frames": []}]
    check_sound(subject, "none", clip, {"frames": []})


def test_seeds():
    assert clip_seed(0, "a") == clip_seed(0, "a") != clip_seed(0, "b") != clip_seed(1, "b")
