"""What codes say, read by a linear reader; the audio embeddings and the spliced recordings that follow from it."""

import json

import pytest
import torch

from modeling_baichuan_audio.training.miniature.flat_start import embed_codebooks, fit_tables, flat_start, read_pairs
from modeling_baichuan_audio.training.miniature.reader import CodeReader, fit_reader
from modeling_baichuan_audio.training.miniature.splice import Word, cut_into_words, splice


SIZES = [24, 8]
WORDS = torch.tensor([3, 5, 40, 41, 42, 43])  # token ids


def speech(clips: int = 400, seed: int = 0):
    """Pairs of codes and ids. The first codebook's entries 2 k and 2 k + 1 say word k, the others nothing; the second is noise."""
    generator, pairs = torch.Generator().manual_seed(seed), []
    for _ in range(clips):
        said = torch.randint(len(WORDS), (4,), generator=generator)
        frames: list[int] = []
        for word in said.tolist():
            frames += torch.randint(12, 24, (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator).tolist()
            frames += (
                2 * word + torch.randint(2, (int(torch.randint(1, 3, (1,), generator=generator)),), generator=generator)
            ).tolist()
        first = torch.tensor(frames)
        pairs.append((torch.stack([first, torch.randint(8, first.shape, generator=generator)]), WORDS[said]))
    return pairs


@pytest.fixture(scope="module")
def reader() -> CodeReader:
    return fit_reader(speech(), SIZES, epochs=40)


def test_the_reader_reads_what_it_never_saw(reader):
    unseen = speech(50, seed=1)
    assert all([token for token, _ in reader.read(codes)] == ids.tolist() for codes, ids in unseen)
    codes, _ = unseen[0]
    for token, frame in reader.read(codes):
        assert WORDS[codes[0, frame] // 2] == token  # where it begins


def test_its_probabilities_are_those_of_one_frame(reader):
    codes = torch.tensor([[0, 13, 4], [1, 2, 3]])
    together, alone = reader(codes), torch.stack([reader(codes[:, [frame]])[0] for frame in range(3)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(3))
    assert together.shape == (3, len(WORDS) + 1) and int(together[1].argmax()) == reader.blank


class Speller:
    """Stands for a tokenizer: odd ids continue a word, even ones begin one."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"x{token}" if token % 2 else f" w{token}" for token in ids)


def test_words_are_cut_between_their_tokens(reader):
    for codes, ids in speech(50, seed=2):
        words = cut_into_words(reader, codes, ids, Speller())
        assert torch.equal(torch.cat([word.codes for word in words], dim=1), codes)
        assert "".join(f" {word.text}" for word in words).strip() == Speller().decode(ids.tolist()).strip()
        for word in words:
            read = [token for token, _ in reader.read(word.codes)]
            assert Speller().decode(read).strip() == word.text
    assert cut_into_words(reader, codes, ids.flip(0) + 1, Speller()) == []


def test_splices_are_made_of_the_clips_words():
    clips = [[Word(f"{clip}-{place}", torch.full((2, 1 + place), 10 * clip + place)) for place in range(5)] for clip in range(6)]
    rows = list(splice(clips, "asr", 40, seed=1))
    assert rows == list(splice(clips, "asr", 40, seed=1)) and rows != list(splice(clips, "asr", 40, seed=2))
    for row in rows:
        audio, text = row["segments"]
        words = [tuple(map(int, word.split("-"))) for word in text["text"].split()]
        assert 3 <= len(words) <= 15
        frames = [10 * clip + place for clip, place in words for _ in range(1 + place)]
        assert audio["audio_codes"] == [frames, frames]
    assert len({row["segments"][1]["text"] for row in rows}) > 35
    spoken = list(splice(clips, "tts", 2))
    assert [list(part) for part in spoken[0]["segments"]] == [["text"], ["audio_codes"]]
    assert [row["task"] for row in rows[:2] + spoken] == ["asr", "asr", "tts", "tts"]
    assert list(splice([], "asr", 3)) == []


def test_tables_are_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(size, (4000,), generator=generator) for size in SIZES])
    true = [torch.randn(size, 5, generator=generator) for size in SIZES]
    targets = sum(table[row] for table, row in zip(true, codes)) + 3
    tables = fit_tables(codes, targets, SIZES)
    fitted = sum(table[row] for table, row in zip(tables, codes))
    torch.testing.assert_close(fitted, targets, atol=0.05, rtol=0)


def test_frames_look_like_the_words_that_are_read(tiny):
    sizes = [codebook.size for codebook in tiny.audio_tokenizer.quantizer.codebooks]
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for codes, ids in speech():
        others = [torch.randint(size, codes.shape[1:], generator=generator) for size in sizes[1:]]
        pairs.append((torch.stack([codes[0], *others]), ids))
    reader = fit_reader(pairs, sizes, epochs=40)
    ends = [table.weight[-1].clone() for table in tiny.model.audio_embed_layers]
    embed_codebooks(tiny, reader, pairs, filler=9)
    assert all(torch.equal(end, table.weight[-1]) for end, table in zip(ends, tiny.model.audio_embed_layers))
    codes = torch.cat([codes for codes, _ in pairs], dim=1)
    frames = sum(table(row) for table, row in zip(tiny.model.audio_embed_layers, codes)).detach()
    words = tiny.get_input_embeddings().weight.detach()
    classes = torch.cat([WORDS, torch.tensor([9])])
    nearest = classes[torch.cdist(frames, words[classes]).argmin(-1)]
    said = torch.where(codes[0] < 12, WORDS[(codes[0] // 2).clamp(max=5)], 9)
    assert float((nearest == said).float().mean()) > 0.95


def row(text, frames, task="asr"):
    return json.dumps({"task": task, "segments": [{"audio_codes": [[1] * frames] * 8}, {"text": text}]})


def test_rows_that_cannot_be_aligned_are_left_out(tmp_path, processor):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([row("ab", 5), row("ab", 5), row("abcdef", 5), row("ab", 5, "tts")]))
    assert [(codes.shape, ids.tolist()) for codes, ids in read_pairs(path, processor.tokenizer)] == [
        ((8, 5), processor.tokenizer("ab")["input_ids"])
    ]
    path.write_text(row("abcdef", 5))
    with pytest.raises(ValueError, match="as many frames as tokens"):
        read_pairs(path, processor.tokenizer)
    with pytest.raises(ValueError, match="does not exist"):
        read_pairs(tmp_path / "nowhere.jsonl", processor.tokenizer)


def test_the_command_writes_a_checkpoint_and_rows(tmp_path, tiny_folder):
    path = tmp_path / "speech.jsonl"
    path.write_text("\n".join(row(text, 9) for text in ("ab", "cd")))
    folder = flat_start(tiny_folder, path, tmp_path / "flat", spliced=3)
    assert (folder / "config.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "spliced.jsonl").read_text().splitlines()]
    assert len(rows) == 0  # two clips of the same codes cannot be read as different words
