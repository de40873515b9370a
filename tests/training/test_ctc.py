"""CTC on what the LLM says while it listens."""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_baichuan_audio.processors.processing_baichuan_audio import TRANSCRIPTION_PROMPT
from modeling_baichuan_audio.training.collators import SpeechCollator
from modeling_baichuan_audio.training.ctc import TranscriptionCTC
from modeling_baichuan_audio.training.layouts import LayoutBuilder, TokenIds
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import parse_row
from modeling_baichuan_audio.training.tasks import LanguageTask


def collapsed(path, blank):
    return [token for token, before in zip(path, (blank, *path)) if token not in (before, blank)]


def make(processor, tiny, rows):
    builder = LayoutBuilder(
        processor.tokenizer, TokenIds.from_tokenizer(processor.tokenizer), tiny.config.audio_tokenizer_config.codebook_sizes
    )
    prompt = processor.tokenizer(TRANSCRIPTION_PROMPT, add_special_tokens=False)["input_ids"]
    collator = SpeechCollator(builder, pad_token_id=processor.tokenizer.pad_token_id)
    return TranscriptionCTC(builder.tokens, prompt), collator(rows)


def row(text, frames, task="asr"):
    audio, said = {"audio_codes": [[1] * frames] * 8}, {"text": text}
    parsed = parse_row({"task": task, "segments": [audio, said] if task == "asr" else [said, audio]})
    for segment in parsed.audio_segments():
        segment.codes, segment.num_frames = np.ones((8, frames), dtype=np.int64), frames
    return parsed


def test_only_transcriptions_with_room_for_their_text(processor, tiny):
    rows = [row("ab", 4), row("ab", 4, "tts"), row("abcdef", 4), row("aab", 3), row("aab", 2)]
    ctc, batch = make(processor, tiny, rows)
    pairs = ctc.pairs(batch["input_ids"], batch["labels"])
    assert [number for number, _, _ in pairs] == [0, 3], "a token said twice needs a frame between"
    number, positions, text = pairs[0]
    assert text.tolist() == processor.tokenizer("ab")["input_ids"]
    ids = batch["input_ids"][number, positions].tolist()
    assert ids == [ctc.tokens.audio_pad] * 4 + [ctc.tokens.audio_end]


def test_loss_is_the_sum_over_all_paths(processor, tiny):
    """Three frames and the end of audio, three classes that matter: all 81 paths by hand."""
    ctc, batch = make(processor, tiny, [row("ab", 3)])
    ((number, positions, text),) = pairs = ctc.pairs(batch["input_ids"], batch["labels"])
    classes = [ctc.tokens.audio_pad, *text.tolist()]
    logits = torch.full((*batch["input_ids"].shape, tiny.vocab_size), -1e4)
    chosen = torch.randn(len(positions), 3, generator=torch.Generator().manual_seed(0))
    logits[number, positions[:, None], torch.tensor(classes)] = chosen
    probabilities = chosen.softmax(-1)
    total = sum(
        math.prod(float(probabilities[step, choice]) for step, choice in enumerate(path))
        for path in itertools.product(range(3), repeat=len(positions))
        if collapsed([classes[choice] for choice in path], classes[0]) == text.tolist()
    )
    assert float(ctc.loss(logits, pairs, 1)) == pytest.approx(-math.log(total), rel=1e-4)
    assert float(ctc.loss(logits, pairs, 4)) == pytest.approx(-math.log(total) / 4, rel=1e-4)
    assert float(ctc.loss(logits, [], 4)) == 0


def language_task(tiny, processor, **loss):
    return LanguageTask(tiny, processor, read_recipe("tiny/stage2", [f"loss={loss}", "data.train=nowhere.jsonl"]))


def test_the_task_adds_it(tiny, processor):
    rows = [row("hello there", 20), row("ab", 6, "tts")]
    plain, aided = language_task(tiny, processor), language_task(tiny, processor, ctc_weight=0.5)
    batch = plain.collate(rows)
    before, outputs = tiny(**plain.model_inputs(batch, None)), tiny(**aided.model_inputs(batch, None))
    loss = aided.loss(outputs)
    assert float(plain.loss(before)) == pytest.approx(float(outputs["loss"]), rel=1e-5)
    assert float(loss) == pytest.approx(float(outputs["loss"]) + 0.5 * float(outputs["ctc_loss"]), rel=1e-5)
    assert float(aided.metrics(outputs)["ctc_loss"]) > 0
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=3e-3)
    first = float(outputs["ctc_loss"])
    for _ in range(20):
        outputs = tiny(**aided.model_inputs(batch, None))
        optimizer.zero_grad()
        aided.loss(outputs).backward()
        optimizer.step()
    assert float(outputs["ctc_loss"]) < 0.5 * first


@pytest.mark.parametrize(("changes", "message"), [({"ctc_weight": -1}, "got -1"), ({"ctc_weight": True}, "got True")])
def test_weights_that_are_none(tiny, processor, changes, message):
    with pytest.raises(ValueError, match=message):
        language_task(tiny, processor, **changes)


def test_packed_rows_are_refused(tiny, processor):
    recipe = read_recipe("tiny/stage2", ["loss={ctc_weight: 1}", "data.train=nowhere.jsonl", "data.pack=true"])
    with pytest.raises(ValueError, match="data.pack"):
        LanguageTask(tiny, processor, recipe)
