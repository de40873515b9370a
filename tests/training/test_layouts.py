"""Token layouts and labels of every task, written out by hand; agreement with the processor, with generation and with the losses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_baichuan_audio.conversion import tiny_model, tiny_processor, tiny_tokenizer
from modeling_baichuan_audio.processors.processing_baichuan_audio import TRANSCRIPTION_PROMPT, split_speech_text
from modeling_baichuan_audio.training.layouts import IGNORED, LayoutBuilder, TokenIds
from modeling_baichuan_audio.training.rows import PROMPTED_TASKS, TASKS, AudioReader, BrokenRow, Row, Turn, parse_row
from modeling_baichuan_audio.training.segmentation import cut_row, cut_times


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]
END = 64  # the end-of-audio class of the first codebook
NO = IGNORED
# The tiny tokenizer: printable ASCII is its code point less 33, the special tokens follow 256 bytes.
EOT, SYS, USYS, Q, A, A0, A1, PAD, DELIM, T0, T1, TPAD, G0, G1 = range(256, 270)
PROCESSOR, TOKENIZER = tiny_processor(), tiny_tokenizer()
READER = AudioReader(PROCESSOR.feature_extractor, SIZES)
BUILDER = LayoutBuilder(TOKENIZER, TokenIds.from_tokenizer(TOKENIZER), SIZES)


def frames(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, size, count) for size in SIZES])


def read(raw: dict) -> Row:
    row = parse_row(raw)
    turns = [Turn(turn.role, [part if part.is_text else READER.read(part) for part in turn.segments]) for turn in row.turns]
    return cut_row(Row(row.task, turns, row.prompt, row.speech), READER)


def text(value: str) -> dict:
    return {"text": value}


def audio(codes: np.ndarray, **more) -> dict:
    return {"audio_codes": codes.tolist(), **more}


X, Y = frames(2), frames(1, seed=1)
a, b, c, d, p = (ord(letter) - 33 for letter in "abcdp")

# Task -> (row, input_ids, labels, audio in the order of the layout, positions of learnt frames, of learnt ends).
CASES = {
    "asr": (
        {"prompt": "p", "segments": [audio(X), text("ab")]},
        [p, A0, PAD, PAD, A1, a, b, EOT],
        [NO, NO, NO, NO, NO, a, b, EOT],
        [X],
        [],
        [],
    ),
    "intlv": (
        {"segments": [audio(X), text("ab"), audio(Y), text("c")]},
        [A0, PAD, PAD, A1, a, b, A0, PAD, A1, c, EOT],
        [NO, NO, NO, NO, a, b, NO, NO, NO, c, EOT],
        [X, Y],
        [],
        [],
    ),
    "intlv that ends in audio": (
        {"task": "intlv", "segments": [audio(X), text("ab"), audio(Y)]},
        [A0, PAD, PAD, A1, a, b, A0, PAD, A1],
        [NO, NO, NO, NO, a, b, NO, NO, NO],
        [X, Y],
        [],
        [],
    ),
    "tts": (
        {"segments": [text("ab"), audio(X)]},
        [a, b, G0, PAD, PAD, G1],
        [NO, NO, G0, NO, NO, NO],
        [X],
        [3, 4],
        [5],
    ),
    "itts": (
        {"segments": [text("ab"), audio(X), text("cd"), audio(Y)]},
        [a, b, G0, PAD, PAD, G1, c, d, G0, PAD, G1, EOT],
        [NO, NO, G0, NO, NO, NO, c, d, G0, NO, NO, EOT],
        [X, Y],
        [3, 4, 9],
        [5, 10],
    ),
    "audio": (
        {"segments": [audio(X)]},
        [G0, PAD, PAD, G1],
        [NO, NO, NO, NO],
        [X],
        [1, 2],
        [3],
    ),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "p"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio", **audio(X)}]},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
        [SYS, p, Q, a, A0, PAD, PAD, A1, A, b, Q, c, A, d, EOT],
        # What ends the first reply is predicted where the next turn begins: the prompt of a dialogue holds no end-of-text.
        [NO, NO, NO, NO, NO, NO, NO, NO, NO, b, EOT, NO, NO, d, EOT],
        [X],
        [],
        [],
    ),
    "spoken chat": (
        {
            "task": "chat",
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [text("b"), audio(X)]},
                {"role": "user", "content": [audio(Y)]},
                {"role": "assistant", "content": [text("c"), audio(Y), text("d")]},
            ],
        },
        [Q, a, T0, A, b, G0, PAD, PAD, G1, Q, A0, PAD, A1, T0, A, c, G0, PAD, G1, d, EOT],
        [NO, NO, NO, NO, b, G0, NO, NO, NO, EOT, NO, NO, NO, NO, NO, c, G0, NO, NO, d, EOT],
        [X, Y, Y],
        [6, 7, 17],
        [8, 18],
    ),
}
for name in ("aqa", "s2tt"):
    CASES[name] = CASES["asr"]


def test_every_task_is_written_out():
    assert set(TASKS) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_layouts_by_hand(name):
    raw, ids, labels, clips, learnt, ends = CASES[name]
    row = read({"task": name, **raw})
    layout = BUILDER.build(row)
    assert layout.input_ids.tolist() == ids
    assert layout.labels.tolist() == labels
    joined = np.concatenate(clips, axis=1)
    np.testing.assert_array_equal(layout.audio_codes, joined)
    expected = np.full((8, len(ids)), NO)
    order = [position for position, token in enumerate(ids) if token == PAD]
    for position in learnt:
        expected[:, position] = joined[:, order.index(position)]
    for position in ends:
        expected[0, position] = END
    np.testing.assert_array_equal(layout.audio_labels, expected)
    assert BUILDER.length(row) == len(layout) == len(ids)
    assert {part.dtype for part in (layout.input_ids, layout.labels, layout.audio_codes, layout.audio_labels)} == {
        np.dtype("int64")
    }


def test_the_default_transcription_prompt():
    layout = BUILDER.build(read({"task": "asr", "segments": [audio(X), text("ab")]}))
    inputs = PROCESSOR.apply_transcription_request({"audio_codes": X})
    prompt = inputs["input_ids"][0].tolist()
    assert layout.input_ids.tolist() == [*prompt, a, b, EOT]
    assert prompt[:3] == TOKENIZER(TRANSCRIPTION_PROMPT)["input_ids"][:3]


def test_text_without_audio_has_no_codes():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    layout = BUILDER.build(read({"task": "chat", "messages": messages}))
    assert layout.audio_codes.shape == (8, 0) and (layout.audio_labels == NO).all()


@pytest.mark.parametrize("word", ["<|endoftext|>", "<audio_pad_baichuan>", "<audiotext_pad_baichuan>", "<C_A>", "<B_USYS>"])
def test_special_tokens_in_text_are_refused(word):
    with pytest.raises(BrokenRow) as caught:
        BUILDER.length(read({"task": "tts", "segments": [text(f"say {word}"), audio(X)]}))
    assert caught.value.reason == "special_token"


def test_audio_needs_its_codes():
    row = parse_row({"task": "audio", "segments": [{"audio": np.zeros(16000, dtype=np.float32)}]})
    row.segments[0] = READER.read(row.segments[0])
    assert BUILDER.length(row) == 14
    for codes in (None, [frames(11)]):
        with pytest.raises(ValueError, match="12 frames"):
            BUILDER.build(row, codes)
    np.testing.assert_array_equal(BUILDER.build(row, [frames(12)]).audio_codes, frames(12))


def test_token_ids_come_from_the_tokenizer():
    tokens = TokenIds.from_tokenizer(TOKENIZER)
    assert (tokens.end_of_text, tokens.assistant, tokens.audio_pad, tokens.audiogen_end) == (EOT, A, PAD, G1)
    assert TokenIds.from_tokenizer(TOKENIZER, end_of_text=7).end_of_text == 7
    other = tiny_tokenizer().__class__(vocab={"a": 0}, merges=[])
    with pytest.raises(ValueError, match="audiogen_start_baichuan"):
        TokenIds.from_tokenizer(other)


# Agreement with what the model sees and makes.


def printable_only(model) -> list[int]:
    """Text tokens to suppress, so that a reply survives being decoded and tokenised again."""
    kept = {ord(letter) - 33 for letter in "abcdefghijklmnopqrstuvwxyz"} | {EOT, G0}
    return [token for token in range(model.vocab_size) if token not in kept]


@torch.no_grad()
@pytest.mark.parametrize(("earlier", "seed"), [(False, 0), (False, 1), (True, 3), (True, 4)])
def test_a_generated_reply_as_a_row_has_the_ids_it_was_generated_with(shared_tiny_model, earlier, seed):
    """Prompt by the chat template, reply by the model; the same dialogue as a training row is the same sequence."""
    model = shared_tiny_model
    messages = [{"role": "user", "content": [{"type": "text", "text": "go on"}, {"type": "audio", **audio(X)}]}]
    if earlier:
        first = [{"type": "text", "text": "one, "}, {"type": "audio", **audio(Y)}, {"type": "text", "text": "two"}]
        messages = [
            {"role": "system", "content": "be kind"},
            *messages,
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and then?"},
        ]
    inputs = PROCESSOR.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True, speech=True)
    prompt = inputs["input_ids"][0].tolist()
    options = {"max_text_tokens": 4, "max_audio_frames": 3, "eos_token_id": EOT, "suppress_tokens": printable_only(model)}
    reply = model.generate(**inputs, generation_mode="audio", output_audio=False, seed=seed, max_new_tokens=24, **options)
    ids, content = reply.sequences[0].tolist(), []
    segments = list(reply.segments[0])
    if ids[-1] == PAD:  # cut off by the limit: not a whole piece
        ids = ids[: len(ids) - segments.pop()["audio_codes"].shape[1]]
    if ids[-1] == G0:
        ids.pop()
    for segment in segments:
        if segment["type"] == "text":
            content.append({"type": "text", "text": TOKENIZER.decode(segment["token_ids"])})
        else:
            content.append({"type": "audio", "audio_codes": segment["audio_codes"].tolist()})
    assert len(content) >= 2, "the reply must hold text and audio for this test to say anything"
    row = read({"task": "chat", "messages": [*messages, {"role": "assistant", "content": content}]})
    layout = BUILDER.build(row)
    expected = ids if ids[-1] == EOT else [*ids, EOT]
    assert layout.input_ids.tolist() == expected
    # Everything of the reply is learnt, and before it only earlier replies.
    own = layout.labels[len(prompt) :]
    learnt = np.array([token not in (PAD, G1) for token in expected[len(prompt) :]])
    np.testing.assert_array_equal(own[learnt], np.array(expected[len(prompt) :])[learnt])
    assert (own[~learnt] == NO).all()
    known = 2 + (1 if earlier else 0)
    np.testing.assert_array_equal(
        layout.audio_codes[:, known:],
        np.concatenate([np.array(part["audio_codes"]) for part in content if "audio_codes" in part], 1),
    )


@torch.no_grad()
def test_forced_speech_is_the_layout_of_itts(shared_tiny_model):
    inputs = PROCESSOR.apply_tts_request("the first piece, and the second piece.")
    reply = shared_tiny_model.generate(
        **inputs, generation_mode="audio", output_audio=False, seed=0, max_audio_frames=3, max_new_tokens=200, eos_token_id=EOT
    )
    pieces = split_speech_text("the first piece, and the second piece.")
    clips = [part["audio_codes"].numpy() for part in reply.segments[0] if part["type"] == "audio"]
    assert len(pieces) == len(clips) == 2
    segments = [part for piece, clip in zip(pieces, clips) for part in (text(piece), audio(clip))]
    layout = BUILDER.build(read({"task": "itts", "segments": segments}))
    assert layout.input_ids.tolist() == [*reply.sequences[0].tolist(), EOT]


@torch.no_grad()
def test_losses_are_taken_where_the_layout_says(shared_tiny_model):
    """Text and audio cross-entropy recomputed position by position, from the hidden state before each target."""
    model, (raw, *_) = shared_tiny_model, CASES["spoken chat"]
    layout = BUILDER.build(read({"task": "chat", **raw}))
    batch = {
        name: torch.from_numpy(getattr(layout, name))[None] for name in ("input_ids", "labels", "audio_codes", "audio_labels")
    }
    output = model(**batch, output_audio_logits=True)
    text_losses, audio_losses, slot = [], [[] for _ in SIZES], 0
    tables, hidden = model.model.audio_embed_layers, output.last_hidden_state[0]
    for position, token in enumerate(layout.input_ids.tolist()):
        if layout.labels[position] != NO:
            text_losses.append(-output.logits[0, position - 1].log_softmax(-1)[layout.labels[position]])
        targets = layout.audio_labels[:, position]
        if token == PAD:
            for book, target in enumerate(targets):
                if target != NO:
                    audio_losses[book].append(-output.audio_logits[book][0, slot].log_softmax(-1)[target])
            slot += 1
        elif targets[0] != NO:  # the end: what the head says after the frame before it
            embedded = torch.stack([table.weight[0] for table in list(tables)[:-1]])[None]
            audio_losses[0].append(-model.audio_head(hidden[position - 1][None], embedded)[0][0].log_softmax(-1)[END])
    assert [len(text_losses), *map(len, audio_losses)] == [7, 5, *[3] * 7]
    torch.testing.assert_close(output.text_loss, torch.stack(text_losses).mean(), atol=1e-5, rtol=0)
    by_book = torch.stack([torch.stack(losses).mean() for losses in audio_losses])
    torch.testing.assert_close(output.codebook_losses, by_book, atol=1e-5, rtol=0)


# Properties of every layout.

words = st.text("abc defg,.!", min_size=1, max_size=30).filter(str.strip)
clips = st.integers(1, 6).flatmap(lambda count: st.integers(0, 99).map(lambda seed: frames(count, seed)))


@st.composite
def raw_rows(draw):
    task = draw(st.sampled_from(TASKS))
    count = draw(st.integers(1, 3))
    if task == "chat":
        messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
        for _ in range(count):
            heard = [audio(draw(clips)) for _ in range(draw(st.integers(0, 2)))]
            answer = [text(draw(words))]
            for _ in range(draw(st.integers(0, 2))):
                answer += [audio(draw(clips)), text(draw(words))]
            messages += [
                {"role": "user", "content": [text(draw(words)), *heard]},
                {"role": "assistant", "content": answer[: len(answer) - draw(st.integers(0, 1))] or answer},
            ]
        return {"task": task, "messages": messages}
    kinds = {"intlv": "at" * count, "itts": "ta" * count, "tts": "ta", "audio": "a"}.get(task, "at")
    segments = [text(draw(words)) if kind == "t" else audio(draw(clips)) for kind in kinds]
    return {"task": task, "segments": segments} | ({"prompt": draw(words)} if task in PROMPTED_TASKS else {})


@settings(deadline=None, max_examples=150)
@given(raw_rows())
def test_layouts_are_consistent(raw):
    row = read(raw)
    layout = BUILDER.build(row)
    ids, labels, audio_labels = layout.input_ids, layout.labels, layout.audio_labels
    is_frame = ids == PAD
    assert int(is_frame.sum()) == layout.audio_codes.shape[1] and BUILDER.length(row) == len(ids)
    assert labels.shape == ids.shape and audio_labels.shape == (8, len(ids))
    assert labels[0] == NO and (audio_labels[:, 0] == NO).all()
    # Text labels are the ids; only what ends an earlier reply stands at the turn after it.
    other = (labels != NO) & (labels != ids)
    assert (labels[other] == EOT).all() and (ids[other] == Q).all()
    assert not np.isin(labels, [PAD, A0, A1, G1, T0, Q, A, SYS]).any()
    # A frame is learnt as a whole or not at all.
    learnt = audio_labels[0] != NO
    codes = np.full_like(audio_labels, NO)
    codes[:, is_frame] = layout.audio_codes
    np.testing.assert_array_equal(audio_labels[:, is_frame & learnt], codes[:, is_frame & learnt])
    assert (audio_labels[:, ~learnt] == NO).all()
    # The end of audio exactly where generated audio ends.
    np.testing.assert_array_equal(audio_labels[0] == END, ids == G1)
    assert (audio_labels[1:, ids == G1] == NO).all()
    np.testing.assert_array_equal(np.flatnonzero(learnt & ~is_frame), np.flatnonzero(ids == G1))
    # Generated audio is learnt, heard audio is not.
    inside = np.cumsum(ids == G0) - np.cumsum(ids == G1)
    np.testing.assert_array_equal(learnt & is_frame, is_frame & (inside > 0))
    learns_audio = row.task in ("tts", "itts", "audio", "chat")
    assert learns_audio or not learnt.any()


# Cutting at timestamps.

SPEECH = "Hello there, my friend! How are you?"
STAMPS = [("Hello", 0.0, 0.3), ("there", 0.3, 0.7), ("my", 0.9, 1.0), ("friend!", 1.0, 1.5), ("How", 1.9, 2.1), ("are", 2.1, 2.2)]
STAMPS += [("you?", 2.2, 2.5)]


def stamps(values) -> list[dict]:
    return [{"text": word, "start": start, "end": end} for word, start, end in values]


def test_cuts_lie_in_the_pauses_at_punctuation():
    cuts = cut_times(SPEECH, STAMPS)
    assert [SPEECH[:characters] for characters, _ in cuts] == ["Hello there,", "Hello there, my friend!"]
    assert [seconds for _, seconds in cuts] == pytest.approx([0.8, 1.7])
    phrases = [("Hello there, my friend!", 0.0, 1.5), ("How are you?", 1.9, 2.5)]
    assert cut_times(SPEECH, phrases) == [(23, 1.7)], "inside a phrase nothing is known"
    assert cut_times("Short", [("Short", 0.0, 0.3)]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        STAMPS[:-1],
        STAMPS[1:],
        [STAMPS[0], ("their", 0.3, 0.7), *STAMPS[2:]],
        [STAMPS[0], ("there", 0.7, 0.3), *STAMPS[2:]],
        [("Hello", 0.5, 0.6), ("there", 0.3, 0.7), *STAMPS[2:]],
        [("", 0.0, 0.0), *STAMPS],
    ],
)
def test_timestamps_that_do_not_fit(wrong):
    row = {"task": "itts", "segments": [text(SPEECH), audio(frames(32), timestamps=stamps(wrong))]}
    with pytest.raises(BrokenRow) as caught:
        read(row)
    assert caught.value.reason == "bad_timestamps"


def test_audio_shorter_than_its_timestamps():
    with pytest.raises(BrokenRow, match="2.5 s, the audio at 2.24 s"):
        read({"task": "itts", "segments": [text(SPEECH), audio(frames(28), timestamps=stamps(STAMPS))]})


@pytest.mark.parametrize("task", ["itts", "chat"])
def test_speech_is_cut_with_its_text(task):
    """32 frames of 80 ms: the cuts at 0.8 and 1.7 s are frames 10 and 21."""
    clip = frames(32)
    segments = [text(SPEECH), audio(clip, timestamps=stamps(STAMPS))]
    raw = {"task": "itts", "segments": segments}
    if task == "chat":
        raw = {"task": "chat", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": segments}]}
    pieces = read(raw).turns[-1].segments
    assert [piece.text for piece in pieces[::2]] == ["Hello there,", " my friend!", " How are you?"]
    for piece, expected in zip(pieces[1::2], [clip[:, :10], clip[:, 10:21], clip[:, 21:]]):
        np.testing.assert_array_equal(piece.codes, expected)
        assert piece.num_frames == expected.shape[1]


def test_waveforms_are_cut_at_the_sample():
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 41000).astype(np.float32)
    raw = {"task": "itts", "segments": [text(SPEECH), {"audio": samples, "timestamps": stamps(STAMPS)}]}
    pieces = read(raw).segments
    for piece, expected in zip(pieces[1::2], np.split(samples, [12800, 27200])):
        np.testing.assert_array_equal(piece.waveform, expected)
        assert piece.num_frames == READER.count_frames(len(expected))


def test_pieces_too_short_for_a_frame_stay_with_their_neighbours():
    early = [(word, start / 100, end / 100) for word, start, end in STAMPS[:4]] + STAMPS[4:]
    pieces = read({"task": "itts", "segments": [text(SPEECH), audio(frames(32), timestamps=stamps(early))]}).segments
    assert [piece.text for piece in pieces[::2]] == ["Hello there, my friend!", " How are you?"]
    last = [(word, 2.55, 2.56) for word, *_ in STAMPS[4:]]
    middle = [*STAMPS[:3], ("friend!", 2.5, 2.55), *last]
    pieces = read({"task": "itts", "segments": [text(SPEECH), audio(frames(32), timestamps=stamps(middle))]}).segments
    assert [piece.text for piece in pieces[::2]] == ["Hello there,", " my friend! How are you?"]


def test_without_timestamps_speech_is_one_piece():
    pieces = read({"task": "itts", "segments": [text(SPEECH), audio(frames(32))]}).segments
    assert [piece.text for piece in pieces[::2]] == [SPEECH]


def test_heard_speech_is_never_cut():
    segments = [audio(frames(32), timestamps=stamps(STAMPS)), text(SPEECH)]
    assert len(read({"task": "asr", "segments": segments}).segments) == 2


def test_a_new_model_of_another_seed_agrees_on_ids():
    """Ids come from the tokenizer; a model's config must name the same ones."""
    config, tokens = tiny_model(1).config, BUILDER.tokens
    for name in ("audio_start", "audio_end", "audio_pad", "audiotext_start", "audiogen_start", "audiogen_end"):
        assert getattr(config, f"{name}_token_id") == getattr(tokens, name)
