"""From a manifest to training rows, and from trained parts to the released folder; speech is replaced by short noise."""

import json
import lzma
import random
import re
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_baichuan_audio.conversion import make_tiny_checkpoint
from modeling_baichuan_audio.processors import BaichuanAudioFeatureExtractor
from modeling_baichuan_audio.training.miniature.assemble import assemble
from modeling_baichuan_audio.training.miniature.corpus import REFERENCE, agreement, read_manifest, write_manifest
from modeling_baichuan_audio.training.miniature.curves import draw, read_curves
from modeling_baichuan_audio.training.miniature.plan import Plan, make_plan
from modeling_baichuan_audio.training.miniature.rows import FILLER, LONGER, _changed, copy_rows, longer_transcriptions, write_rows
from modeling_baichuan_audio.training.miniature.sentences import questions
from modeling_baichuan_audio.training.miniature.start import train_tokenizer
from modeling_baichuan_audio.training.rows import parse_row


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some clips of every kind and split, as noise of half a second; the others are still missing."""
    folder, rng, seen = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), {}
    clips = make_plan(
        Plan(
            test=4,
            valid=2,
            own=30,
            varied=4,
            voices=3,
            prompts=6,
            prompt_voices=0,
            again=6,
            sums=3,
            more=3,
            phrases=3,
            balanced=3,
            frames=3,
            takes=2,
        )
    )
    asked = {clip.answer for clip in clips if clip.kind == "question"}
    for clip in clips:
        key = (clip.split, clip.kind)
        seen[key] = seen.get(key, 0) + 1
        if clip.kind in ("sentence", "prompt", "piece") or clip.kind == "question" or clip.text in asked:
            path = folder / clip.path
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, rng.normal(size=12_000).astype(np.float32) * 0.1, 24_000)
    write_manifest([clip.entry() for clip in clips], folder)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_manifest_describes_what_is_there(corpus):
    entries = read_manifest(corpus)
    assert {path.relative_to(corpus).as_posix() for path in corpus.rglob("*.wav")} == {entry["path"] for entry in entries}
    assert all(entry["duration"] == 0.5 and len(entry["sha256"]) == 64 for entry in entries)
    assert len({entry["sha256"] for entry in entries}) == len(entries)
    before = (corpus / "manifest.jsonl").read_bytes()
    write_manifest([{k: v for k, v in entry.items() if k not in ("duration", "sha256")} for entry in entries], corpus)
    assert (corpus / "manifest.jsonl").read_bytes() == before


def test_a_corpus_is_compared_with_the_reference(corpus, tmp_path):
    entries = read_manifest(corpus)
    reference = tmp_path / "manifest.jsonl.xz"
    other = [entries[0], entries[1] | {"sha256": "0" * 64}, entries[2] | {"path": "elsewhere.wav"}]
    reference.write_bytes(lzma.compress("".join(json.dumps(entry) + "\n" for entry in other).encode()))
    assert "Of the 3 clips of the shipped miniature 2 are here, 1 of them" in agreement(entries, reference)
    assert agreement(entries, tmp_path / "missing.xz") == ""


def test_the_shipped_manifest_describes_every_clip():
    with lzma.open(REFERENCE, "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    assert sum(entry["duration"] for entry in entries) > 8 * 3600
    assert all(entry["text"] and entry["voice"] and len(entry["sha256"]) == 64 for entry in entries)
    train = [entry for entry in entries if entry["split"] == "train"]
    heard = {entry["text"] for entry in train}
    for split in ("test_voice", "test_sentence", "test_operands", "valid", "human"):
        members = [entry for entry in entries if entry["split"] == split]
        assert members and not {entry["text"] for entry in members if entry["kind"] == "sentence"} & heard
    assert not {entry["voice"] for entry in train} & {entry["voice"] for entry in entries if entry["split"] == "test_voice"}


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no manifest.jsonl"):
        write_rows(tmp_path)


def test_written_rows_need_no_codes_and_hold_nothing_back(corpus):
    target = write_rows(corpus)
    audio, texts = lines(target / "audio.jsonl"), lines(target / "text.jsonl")
    held_out = {entry["path"] for entry in read_manifest(corpus) if entry["split"].startswith("test")}
    named = {row["segments"][0]["audio"].removeprefix("../") for row in audio + lines(target / "audio-valid.jsonl")}
    assert held_out and named and not named & held_out
    asked = {row["messages"][0]["content"] for row in texts}
    assert "What is the capital of France?" in asked
    assert not asked & {line.text for line in questions() if line.held_out}
    assert all((target / row["segments"][0]["audio"]).resolve().is_file() for row in audio)
    times = Counter(row["segments"][0]["audio"].removeprefix("../") for row in audio)
    often: dict[str, set[int]] = {}
    for entry in read_manifest(corpus):
        small = entry["kind"] == "answer" and entry["category"] not in ("arithmetic", "comparison")
        often.setdefault("small answer" if small else entry["engine"], set()).add(times.get(entry["path"], 0))
    assert often == {"small answer": {4}, "kokoro": {0, 5}, "hibari": {0, 1}}, "tests are in no row"


def test_words_to_be_repeated(corpus):
    """The answer is the words without the fillers, in their order; held-out sentences give none."""
    rows = list(copy_rows(read_manifest(corpus), 200, random.Random(0)))
    told = {word for entry in read_manifest(corpus) if entry["split"] == "train" for word in entry["text"].split()}
    filled = 0
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        spoken = asked.removeprefix("Repeat after me: ")
        assert spoken.replace(FILLER, "").split() == answer.split() and set(answer.split()) <= told
        filled += FILLER in spoken
    assert 60 < filled < 140 and not any(FILLER in row["messages"][1]["content"] for row in rows)
    assert len({row["messages"][1]["content"] for row in rows}) > 190


def test_spoken_rows_parse_and_end_in_speech(corpus, tiny_folder):
    target = write_rows(corpus, str(tiny_folder))
    speech, chat = lines(target / "speech.jsonl"), lines(target / "chat.jsonl")
    for row in speech + chat:
        parse_row(row)
    assert {"asr", "tts", "itts", "chat"} <= {row["task"] for row in speech}
    spoken = [row for row in chat if row.get("speech")]
    assert spoken and all([part["type"] for part in row["messages"][-1]["content"]] == ["text", "audio"] for row in spoken)
    assert len(lines(target / "longer.jsonl")) == LONGER
    heard = [row for row in chat if row["task"] == "chat" and not isinstance(row["messages"][-2]["content"], str)]
    assert heard and all(len(row["messages"][-2]["content"][0]["audio_codes"]) == 8 for row in heard)


def test_what_is_hard_to_say_comes_more_often(corpus, tiny_folder):
    """Rare words and frames three times, spoken answers to small facts four times and to sums twice; an eighth of the easy is heard."""
    target = write_rows(corpus, str(tiny_folder))
    entries = {entry["text"]: entry for entry in read_manifest(corpus) if entry["split"] == "train" and entry["voice"] == "heart"}
    for name in ("speech.jsonl", "chat.jsonl"):
        spoken = Counter(
            "".join(part.get("text", "") for part in row["segments"])
            for row in lines(target / name)
            if row["task"] in ("tts", "itts")
        )
        times = {text: spoken[text] for text, entry in entries.items() if entry["kind"] == "sentence"}
        assert all(count == (3 if entries[text]["category"] in ("balanced", "frame") else 1) for text, count in times.items())
        assert {1, 3} == set(times.values())
    small = {line.answer for line in questions() if line.category not in ("arithmetic", "comparison")}
    answers = Counter(json.dumps(row) for row in lines(target / "chat.jsonl") if row.get("speech"))
    copies = {(json.loads(row)["messages"][-1]["content"][0]["text"] in small, count) for row, count in answers.items()}
    assert copies == {(True, 4), (False, 2)}
    said = Counter(row["segments"][0]["text"] for row in lines(target / "speech.jsonl") if row["task"] == "tts")
    assert {said[text] for text in small} == {0, 1}, "of several takes one is learnt"
    heard = Counter(row["segments"][1]["text"] for row in lines(target / "chat.jsonl") if row["task"] == "asr")
    everything = Counter(row["segments"][1]["text"] for row in lines(target / "speech.jsonl") if row["task"] == "asr")
    assert all(text in heard for text in everything if text not in entries)
    assert 0.05 < sum(text in heard for text in entries) / len(entries) < 0.3


def test_true_voices_are_heard_at_three_speeds_and_through_two_rooms(corpus, tiny_folder):
    rows = [row for row in lines(write_rows(corpus, str(tiny_folder)) / "speech.jsonl") if row["task"] == "asr"]
    entries = [entry for entry in read_manifest(corpus) if entry["split"] == "train" and entry["kind"] != "piece"]
    true = {entry["text"] for entry in entries if entry["engine"] == "kokoro" and entry["kind"] == "sentence"}
    assert true
    for text in true:  # 0.5 s, and 0.56 and 0.45 s: 6 frames, or one more or less
        heard = [row["segments"][0]["audio_codes"] for row in rows if row["segments"][1]["text"] == text]
        assert len(heard) == 5 and sorted(len(codes[0]) for codes in heard) == [5, 6, 6, 6, 7]
    own = {entry["text"] for entry in entries if entry["voice"] == "heart" and entry["kind"] == "sentence"}
    assert all(sum(row["segments"][1]["text"] == text for row in rows) == 1 for text in own)


def test_longer_transcriptions_are_clips_in_a_row():
    rows = [{"task": "asr", "segments": [{"audio_codes": [[n] * n] * 8}, {"text": f"Word {n}."}]} for n in range(1, 6)]
    longer = list(longer_transcriptions(rows, 50, random.Random(0)))
    assert len(longer) == 50 and not list(longer_transcriptions([], 5, random.Random(0)))
    sizes = set()
    for row in longer:
        heard, said = row["segments"]
        numbers = [int(number) for number in re.findall(r"Word (\d)\.", said["text"])]
        assert heard["audio_codes"] == [[number for number in numbers for _ in range(number)]] * 8
        parse_row(row)
        sizes.add(len(numbers))
    assert sizes == {2, 3, 4, 5, 6}


def test_a_room_is_the_same_every_time_and_another_one_for_every_clip():
    samples = np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1
    extractor = BaichuanAudioFeatureExtractor()
    first, again, other = (_changed(extractor, samples, name) for name in ("a.wav@room0", "a.wav@room0", "b.wav@room0"))
    assert np.array_equal(first, again) and not np.allclose(first, other, atol=0.01) and len(first) == len(other) == 8000
    assert (
        np.array_equal(_changed(extractor, samples, "a.wav"), samples) and len(_changed(extractor, samples, "a.wav@0.9")) == 8889
    )


def test_rows_are_reproducible(corpus):
    first = (write_rows(corpus) / "text.jsonl").read_bytes()
    assert (write_rows(corpus) / "text.jsonl").read_bytes() == first
    assert (write_rows(corpus, seed=1) / "text.jsonl").read_bytes() != first


def test_tokenizer_reads_the_domain_back():
    tokenizer = train_tokenizer()
    text = "What is the capital of Mexico? It is a quarter past seven, C, A, T."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("The capital of France is Paris.")["input_ids"]) <= 10
    assert len(tokenizer("将语音转录为文本:")["input_ids"]) <= 3


def test_release_holds_the_parts_in_two_bytes_a_weight(tmp_path):
    sources = {
        name: make_tiny_checkpoint(tmp_path / name, seed=seed) for seed, name in enumerate(("llm", "codec", "flow", "sound"))
    }
    folder = assemble(
        tmp_path / "release",
        sources["llm"],
        release=True,
        audio_tokenizer=sources["codec"],
        flow_matching=sources["flow"],
        vocoder=sources["sound"],
    )
    kinds = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert set(kinds.values()) == {"BF16", "F16"} and not any(name.endswith("embed_avg") for name in kinds)
    assert all((kind == "F16") == name.startswith("vocoder.") for name, kind in kinds.items())
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json"))  # nor where the parts came from
    assert not list(folder.glob("*.py")) and not any("auto_map" in path.read_text() for path in folder.glob("*.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.generation_config.audio_switch_token_ids == []
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
    parts = {"model.audio_tokenizer.": "codec", "flow_matching.": "flow", "vocoder.": "sound"}
    for name, tensor in model.state_dict().items():
        if name.endswith("embed_avg"):
            continue
        source = next((part for prefix, part in parts.items() if name.startswith(prefix)), "llm")
        sources[source] = sources[source] if isinstance(sources[source], dict) else state_of(sources[source])
        torch.testing.assert_close(tensor, sources[source][name], rtol=0.01, atol=1e-6)
    # Released again it is bit for bit the same: nothing is rounded twice.
    again = assemble(tmp_path / "again", folder, release=True)
    theirs = AutoModelForCausalLM.from_pretrained(again).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items() if "embed_avg" not in name)


def state_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_parts_of_another_size_are_refused(tmp_path, tiny):
    llm = make_tiny_checkpoint(tmp_path / "llm")
    tiny.config.audio_tokenizer_config.codebook_sizes = [8] * 8
    other = type(tiny)(tiny.config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="audio_tokenizer of .* does not fit"):
        assemble(tmp_path / "out", llm, audio_tokenizer=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        read_curves(tmp_path)
    run.mkdir()
    entries = [{"step": 1, "loss": 3.0, "text_loss": 0}, {"step": 2, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read_curves(run) == {"loss": [(1, 3.0), (2, 2.0)]}, "an interrupted step counts once, zero is no loss"
    draw(tmp_path / "picture.png", [run])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
