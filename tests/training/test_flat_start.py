"""Alignment from a flat start, and the audio embeddings that follow from it."""

import json

import pytest
import torch
from torch import nn

from modeling_baichuan_audio.training.miniature.flat_start import (
    align,
    best_cut,
    embed_codebooks,
    even_cut,
    quantised,
    read_pairs,
    with_context,
)


def all_cuts(frames: int, tokens: int):
    """Every cut of so many frames into so many parts, none of them empty."""
    if tokens == 1:
        yield [0] * frames
        return
    for first in range(1, frames - tokens + 2):
        for rest in all_cuts(frames - first, tokens - 1):
            yield [0] * first + [1 + token for token in rest]


def test_even_cut():
    assert even_cut(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert even_cut(4, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (4, 4), (7, 3), (8, 5), (9, 1)])
def test_best_cut_is_the_best_of_all(frames, tokens):
    for seed in range(5):
        scores = torch.randn(frames, tokens, generator=torch.Generator().manual_seed(seed))
        cut = best_cut(scores)
        best = max(float(scores[range(frames), other].sum()) for other in all_cuts(frames, tokens))
        assert float(scores[range(frames), cut].sum()) == pytest.approx(best, abs=1e-5)
        assert cut[0] == 0 and cut[-1] == tokens - 1 and set(cut.diff().tolist()) <= {0, 1}


def test_context_ends_at_the_clip():
    frames = torch.arange(1.0, 6)[:, None]
    expected = [[0, 1, 2], [1, 2, 3], [2, 3, 0], [0, 4, 5], [4, 5, 0]]
    assert with_context(frames, [3, 2]).tolist() == expected


def speech(clips: int = 200, width: int = 24, size: int = 12):
    """Frames that are noisy copies of their token's own vector, tokens of uneven lengths."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(size, width, generator=generator) * 3
    vectors, texts, truth, lengths = [], [], [], []
    for _ in range(clips):
        ids = torch.randint(size, (5,), generator=generator)
        spans = torch.randint(1, 8, (5,), generator=generator)
        said = ids.repeat_interleave(spans)
        vectors.append(words[said] + torch.randn(len(said), width, generator=generator))
        texts.append(ids)
        truth.append(said)
        lengths.append(len(said))
    return torch.cat(vectors), texts, torch.cat(truth), lengths


def test_alignment_finds_the_words():
    vectors, texts, truth, lengths = speech()
    flat = torch.cat([ids[even_cut(length, len(ids))] for ids, length in zip(texts, lengths)])
    found = align(vectors, texts, lengths, size=12, rounds=12)
    assert float((flat == truth).float().mean()) < 0.75
    assert float((found == truth).float().mean()) > 0.95


def test_embeddings_are_near_the_words(tiny):
    sizes = tiny.config.audio_tokenizer_config.codebook_sizes
    generator = torch.Generator().manual_seed(0)
    codes = [torch.stack([torch.randint(size, (40,), generator=generator) for size in sizes]) for _ in range(50)]
    vectors = quantised(tiny, codes)
    tokens = torch.cat([clip[0] for clip in codes])  # the first codebook alone says which word it is
    ends = [table.weight[-1].clone() for table in tiny.model.audio_embed_layers]
    embed_codebooks(tiny, vectors, tokens)
    assert all(torch.equal(end, table.weight[-1]) for end, table in zip(ends, tiny.model.audio_embed_layers))
    sums = torch.cat([sum(table(row) for table, row in zip(tiny.model.audio_embed_layers, clip)) for clip in codes]).detach()
    words = tiny.get_input_embeddings().weight.detach()
    assert float(sums.norm(dim=-1).mean() / words[tokens].norm(dim=-1).mean()) == pytest.approx(1, rel=0.2)
    similar = nn.functional.cosine_similarity(sums[:, None], words[None, : sizes[0]], dim=-1)
    assert float((similar.argmax(-1) == tokens).float().mean()) > 0.5  # by chance 1/64


def test_rows_that_cannot_be_aligned_are_left_out(tmp_path, processor):
    def row(text, frames, task="asr"):
        return json.dumps({"task": task, "segments": [{"audio_codes": [[1] * frames] * 8}, {"text": text}]})

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
