"""Batches: padding and packing change no loss, audio is tokenised on the fly, targets never cross a border."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import tiny_config, tiny_processor
from modeling_baichuan_audio.training.audio_codes import AudioCodeEncoder
from modeling_baichuan_audio.training.collators import SpeechCollator, pack
from modeling_baichuan_audio.training.layouts import LayoutBuilder, TokenIds
from modeling_baichuan_audio.training.rows import AudioReader, Row, Segment, Turn, parse_row


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]
PROCESSOR = tiny_processor()
BUILDER = LayoutBuilder(PROCESSOR.tokenizer, TokenIds.from_tokenizer(PROCESSOR.tokenizer), SIZES)
READER = AudioReader(PROCESSOR.feature_extractor, SIZES)
EOT = PROCESSOR.tokenizer.eos_token_id


def codes(count: int, seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {"audio_codes": np.stack([random.integers(0, size, count) for size in SIZES])}


def sound(samples: int, seed: int) -> dict:
    return {"audio": np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)}


def read(raw: dict) -> Row:
    row = parse_row(raw)
    turns = [Turn(turn.role, [part if part.is_text else READER.read(part) for part in turn.segments]) for turn in row.turns]
    return Row(row.task, turns, row.prompt, row.speech)


@pytest.fixture
def rows() -> list[Row]:
    """Heard, generated and no audio; text targets, audio targets, both."""
    dialogue = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"text": "yes, "}, codes(4, 3), {"text": "no"}]},
    ]
    silent = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    raws = [
        {"task": "asr", "segments": [codes(7, 0), {"text": "seven"}]},
        {"task": "tts", "segments": [{"text": "a"}, codes(3, 1)]},
        {"task": "chat", "messages": silent},
        {"task": "chat", "messages": dialogue},
        {"task": "audio", "segments": [codes(9, 2)]},
    ]
    return [read(raw) for raw in raws]


def by_item(model, batch: dict) -> list[dict]:
    """Sums of text and audio losses of each row, and its logits, with explicit indices."""
    output = model(**batch)
    results = []
    for row in range(len(batch["input_ids"])):
        labels, audio = batch["labels"][row], batch["audio_labels"][row]
        text = [-output.logits[row, t - 1].log_softmax(-1)[labels[t]].item() for t in range(1, len(labels)) if labels[t] != -100]
        places = [t for t in range(1, len(labels)) if audio[0, t] != -100]
        targets = audio[:, places].T
        tables = model.model.audio_embed_layers
        embedded = torch.stack([table(targets[:, i].clamp(min=0)) for i, table in enumerate(tables)][:-1], dim=1)
        logits = model.audio_head(output.last_hidden_state[row, [t - 1 for t in places]], embedded) if places else []
        sums = [
            torch.nn.functional.cross_entropy(part, targets[:, i], ignore_index=-100, reduction="sum").item()
            for i, part in enumerate(logits)
        ]
        results.append({"text": sum(text), "audio": sums, "logits": output.logits[row]})
    return results


def test_padding(rows):
    batch = SpeechCollator(BUILDER, EOT)(rows)
    layouts = [BUILDER.build(row) for row in rows]
    longest = max(map(len, layouts))
    assert set(batch) == {"input_ids", "labels", "audio_labels", "audio_codes", "attention_mask"}
    assert batch["input_ids"].shape == batch["labels"].shape == (5, longest) and batch["audio_labels"].shape == (5, 8, longest)
    assert batch["audio_codes"].shape == (5, 8, 9)
    for index, layout in enumerate(layouts):
        time, frames = len(layout), layout.audio_codes.shape[1]
        for name, part, value in [
            ("input_ids", layout.input_ids, EOT),
            ("labels", layout.labels, -100),
            ("audio_labels", layout.audio_labels, -100),
            ("audio_codes", layout.audio_codes, -1),
        ]:
            size = frames if name == "audio_codes" else time
            np.testing.assert_array_equal(batch[name][index, ..., :size].numpy(), part)
            assert (batch[name][index, ..., size:] == value).all()
        assert batch["attention_mask"][index].tolist() == [1] * time + [0] * (longest - time)


@torch.no_grad()
def test_padding_changes_no_loss(shared_tiny_model, rows):
    collate = SpeechCollator(BUILDER, EOT)
    together = by_item(shared_tiny_model, collate(rows))
    for row, result in zip(rows, together):
        alone = by_item(shared_tiny_model, collate([row]))[0]
        assert result["text"] == pytest.approx(alone["text"], abs=1e-4)
        assert result["audio"] == pytest.approx(alone["audio"], abs=1e-4)
        torch.testing.assert_close(result["logits"][: len(alone["logits"])], alone["logits"], atol=1e-5, rtol=0)


def test_rows_without_audio_still_have_audio_labels(shared_tiny_model, rows):
    """All of them ignored: every rank runs the audio head."""
    batch = SpeechCollator(BUILDER, EOT)([rows[2]])
    assert "audio_codes" not in batch and (batch["audio_labels"] == -100).all()
    output = shared_tiny_model(**batch)
    assert output.audio_loss.item() == 0.0 and output.loss.item() == output.text_loss.item() > 0


# Packing.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config_says_cache", [True, False])
@torch.no_grad()
def test_packed_samples_equal_themselves_alone(rows, attention, config_says_cache):
    torch.manual_seed(0)
    config = tiny_config()
    config.text_config.use_cache = config_says_cache  # a cache would hide from transformers that the row is packed
    model = BaichuanAudioForCausalLM._from_config(config, attn_implementation=attention).eval()
    assert model.model.language_model.config._attn_implementation == attention
    batch = SpeechCollator(BUILDER, EOT, pack_tokens=60)(rows)
    lengths = [len(BUILDER.build(row)) for row in rows]
    groups = pack(lengths, 60)
    assert len(groups) == 2 and max(map(len, groups)) >= 2 and "attention_mask" not in batch
    packed = model(**batch)
    total = {"text": 0.0, "audio": np.zeros(8), "texts": 0, "audios": np.zeros(8)}
    for line, group in enumerate(groups):
        start = 0
        for index in group:
            alone = SpeechCollator(BUILDER, EOT)([rows[index]])
            place = slice(start, start + lengths[index])
            start += lengths[index]
            result = by_item(model, alone)[0]
            torch.testing.assert_close(packed.logits[line, place], result["logits"], atol=1e-5, rtol=0)
            assert batch["position_ids"][line, place].tolist() == list(range(lengths[index]))
            assert (batch["labels"][line, place.start], *batch["audio_labels"][line, :, place.start]) == (-100,) * 9
            total["text"] += result["text"]
            total["texts"] += int((alone["labels"] != -100).sum())
            total["audio"] += np.array(result["audio"] or [0.0] * 8)
            total["audios"] += (alone["audio_labels"] != -100).sum((0, 2)).numpy()
        assert (batch["labels"][line, start:] == -100).all() and (batch["audio_labels"][line, :, start:] == -100).all()
    assert packed.text_loss.item() == pytest.approx(total["text"] / total["texts"], abs=1e-5)
    np.testing.assert_allclose(packed.codebook_losses.numpy(), total["audio"] / total["audios"], atol=1e-5)


@torch.no_grad()
def test_packing_would_leak_without_its_positions(shared_tiny_model, rows):
    """The check above can fail: as one sequence, the samples see one another."""
    batch = SpeechCollator(BUILDER, EOT, pack_tokens=60)(rows)
    packed = shared_tiny_model(**batch).logits
    for change in ({"use_cache": True}, {"position_ids": None}):
        assert (shared_tiny_model(**(batch | change)).logits - packed).abs().max() > 1e-2


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 40))
def test_packs_hold_every_sample_once(lengths, capacity):
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= capacity and group == sorted(group) for group in groups)
    # First fit: no group could have taken the first sample of a later one.
    for earlier, group in enumerate(groups):
        for later in groups[earlier + 1 :]:
            before = [lengths[index] for index in group if index < later[0]]
            assert sum(before) + lengths[later[0]] > capacity


def test_samples_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="does not fit into a packed row of 10"):
        SpeechCollator(BUILDER, EOT, pack_tokens=10)(rows)


@pytest.mark.parametrize("options", [{"pad_token_id": 263}, {"pad_token_id": None}, {"pad_token_id": EOT, "pack_tokens": 0}])
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="must be"):
        SpeechCollator(BUILDER, **options)


# Audio tokenised on the fly.


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_waveforms_become_the_codes_that_the_model_would_compute(tiny, batch_size):
    model = tiny
    raws = [
        {"task": "asr", "segments": [sound(16000, 0), {"text": "one"}]},
        {"task": "itts", "segments": [{"text": "a"}, sound(5000, 1), {"text": "b"}, codes(2, 0)]},
        {"task": "audio", "segments": [sound(16000 * 31, 2)]},
    ]
    rows = [read(raw) for raw in raws]
    encoder = AudioCodeEncoder(model.audio_tokenizer, PROCESSOR.feature_extractor, batch_size)
    batch = SpeechCollator(BUILDER, EOT, encoder)(rows)
    expected = []
    for raw in raws:
        row = []
        for part in raw["segments"]:
            if "audio_codes" in part:
                row.append(torch.from_numpy(part["audio_codes"]))
            elif "audio" in part:
                features = PROCESSOR.feature_extractor(part["audio"], return_tensors="pt")
                chunks = model.get_audio_codes(features["input_features"], features["input_features_mask"])
                row += [chunk[:, (chunk >= 0).all(0)] for chunk in chunks]
        expected.append(torch.cat(row, dim=1))
    for row, frames in zip(batch["audio_codes"], expected):
        assert torch.equal(row[:, : frames.shape[1]], frames) and (row[:, frames.shape[1] :] == -1).all()
    assert [frames.shape[1] for frames in expected] == [12, 6, 387]
    # A tokenizer inside a model that trains gives the same codes, and no gradient reaches it.
    model.train()
    with torch.enable_grad():
        again = SpeechCollator(BUILDER, EOT, encoder)(rows)
    assert torch.equal(again["audio_codes"], batch["audio_codes"]) and not again["audio_codes"].requires_grad
    assert not model.audio_tokenizer.training


def test_waveforms_need_an_encoder():
    with pytest.raises(ValueError, match="give the collator an `encoder`"):
        SpeechCollator(BUILDER, EOT)([read({"task": "audio", "segments": [sound(16000, 0)]})])


def test_the_encoder_refuses_what_it_cannot_do(shared_tiny_model, monkeypatch):
    with pytest.raises(ValueError, match="batch_size"):
        AudioCodeEncoder(shared_tiny_model.audio_tokenizer, PROCESSOR.feature_extractor, 0)

    class OnCuda(torch.nn.Module):
        device = torch.device("cuda")

    monkeypatch.setattr("modeling_baichuan_audio.training.audio_codes.get_worker_info", lambda: object())
    with pytest.raises(ValueError, match="0 data-loader workers"):
        AudioCodeEncoder(OnCuda(), PROCESSOR.feature_extractor)([np.zeros(16000, dtype=np.float32)])
    # Rows that are tokenised already have nothing to encode.
    codes = np.zeros((8, 3), dtype=np.int64)
    rows = [Row("audio", [Turn(None, [Segment(codes=codes)])])]
    assert AudioCodeEncoder(OnCuda(), PROCESSOR.feature_extractor).encode_rows(rows) == [[codes]]
