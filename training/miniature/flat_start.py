"""Where audio embeddings start: near the words that are said, by an alignment from a flat start.

    python -m modeling_baichuan_audio.training.miniature.flat_start CHECKPOINT ROWS FOLDER

Speech recognisers used to be started so: every recording is cut evenly among its words, a linear classifier learns from that cut which
frame is which word, a better cut is found with it (Viterbi), and so on. An entry's embedding is then its share of the linear map from a
frame to the embedding of the word it belongs to. To an LLM that has learnt to repeat a sentence, speech looks like text from the first
step on; from random embeddings it would have to discover by itself that the two go together.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

from ...conversion.files import save_checkpoint
from ...modeling_baichuan_audio import BaichuanAudioForCausalLM


ROUNDS = 4
_AXES = 192  # of the quantised vectors, for the classifier
_CONTEXT = 1  # frames on each side that it sees
_RIDGE = 1e-2


def read_pairs(path: Path, tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Codes `(num_codebooks, frames)` and token ids `(tokens,)` of the transcriptions in a file of rows; each once, and only those with
    at least one frame for each token.

    Raises:
        ValueError: no file, or none of its rows can be used.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: write the rows with codes first (training/miniature/README.md).")
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] != "asr" or line in pairs:
            continue
        codes = torch.tensor(row["segments"][0]["audio_codes"])
        ids = torch.tensor(tokenizer(row["segments"][1]["text"], add_special_tokens=False)["input_ids"])
        if 0 < len(ids) <= codes.shape[1]:
            pairs[line] = (codes, ids)
    if not pairs:
        raise ValueError(f"{path} has no transcription with as many frames as tokens.")
    return list(pairs.values())


def even_cut(frames: int, tokens: int) -> torch.Tensor:
    """(frames,) int64: which of the tokens each frame belongs to when all are equally long."""
    return torch.arange(frames) * tokens // frames


def best_cut(scores: torch.Tensor) -> torch.Tensor:
    """
    The cut with the largest sum of scores, each token at least one frame long, in order (Viterbi).

    Args:
        scores (`(frames, tokens)`): of each frame for each token of the text, frames >= tokens.

    Returns:
        `(frames,)` int64, from 0 to tokens - 1, never falling and never skipping one.
    """
    values = scores.double().numpy()
    frames, tokens = values.shape
    total, moved = np.full(tokens, -np.inf), np.zeros((frames, tokens), dtype=bool)
    total[0] = values[0, 0]
    for frame in range(1, frames):
        before = np.concatenate([[-np.inf], total[:-1]])
        moved[frame] = before > total
        total = np.maximum(before, total) + values[frame]
    cut, token = np.empty(frames, dtype=np.int64), tokens - 1
    for frame in range(frames - 1, -1, -1):
        cut[frame] = token
        token -= moved[frame, token]
    return torch.from_numpy(cut)


def with_context(vectors: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(all frames, width) of clips one after the other -> (all frames, 3 * width): beside each frame its neighbours in the clip."""
    pieces = []
    for clip in vectors.split(lengths):
        padded = nn.functional.pad(clip, (0, 0, _CONTEXT, _CONTEXT))
        pieces.append(torch.cat([padded[shift : shift + len(clip)] for shift in range(2 * _CONTEXT + 1)], dim=1))
    return torch.cat(pieces)


def fit_classifier(
    classifier: nn.Linear, features: torch.Tensor, targets: torch.Tensor, epochs: int, generator: torch.Generator
) -> float:
    """Softmax regression with Adam; returns the last epoch's mean loss."""
    optimizer, loss = torch.optim.Adam(classifier.parameters(), lr=2e-3), 0.0
    for _ in range(epochs):
        order, total = torch.randperm(len(features), generator=generator), 0.0
        for picked in order.split(2048):
            loss = nn.functional.cross_entropy(classifier(features[picked]), targets[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(picked)
        loss = total / len(features)
    return loss


@torch.no_grad()
def quantised(model: BaichuanAudioForCausalLM, codes: list[torch.Tensor]) -> torch.Tensor:
    """(all frames, quantizer_size) float32: the entries' sums of clips one after the other."""
    quantizer = model.audio_tokenizer.quantizer
    return torch.cat([quantizer.decode(clip[None])[0] for clip in codes])


@torch.no_grad()
def principal(vectors: torch.Tensor) -> torch.Tensor:
    """(frames, width) -> (frames, axes): whitened projections onto the axes of largest variance."""
    centred = vectors - vectors.mean(0)
    variances, axes = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
    count = min(_AXES, len(variances))
    scale = variances[-count:].clamp(min=1e-8).rsqrt()
    return centred @ (axes[:, -count:] * scale).float()


def align(
    vectors: torch.Tensor, texts: list[torch.Tensor], lengths: list[int], size: int, seed: int = 0, rounds: int = ROUNDS
) -> torch.Tensor:
    """
    Args:
        vectors (`(all frames, width)`): of clips one after the other, with `lengths` frames each. texts: token ids of each clip.
        size: of the vocabulary.

    Returns:
        `(all frames,)` int64: the token that each frame is said to belong to.
    """
    features = with_context(principal(vectors), lengths)
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(features.shape[1], size)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    cuts = [even_cut(length, len(ids)) for length, ids in zip(lengths, texts)]
    for number in range(rounds):
        targets = torch.cat([ids[cut] for ids, cut in zip(texts, cuts)])
        loss = fit_classifier(classifier, features, targets, epochs=2, generator=generator)
        with torch.no_grad():
            clips = zip(features.split(lengths), texts)
            said = [
                classifier(clip).log_softmax(-1)[:, ids] for clip, ids in tqdm(clips, total=len(texts), desc="align", leave=False)
            ]
        cuts = [best_cut(scores) for scores in said]
        print(f"round {number + 1}: loss {loss:.3f} per frame")
    return torch.cat([ids[cut] for ids, cut in zip(texts, cuts)])


@torch.no_grad()
def embed_codebooks(model: BaichuanAudioForCausalLM, vectors: torch.Tensor, tokens: torch.Tensor) -> None:
    """
    Sets the audio embeddings so that a frame's sum over the codebooks is the ridge regression of its token's embedding on its
    quantised vector. The end of audio keeps its row.

    Args:
        vectors (`(frames, quantizer_size)`), tokens (`(frames,)`, int64): frames and the tokens they belong to.
    """
    words, codebooks = model.get_input_embeddings().weight.float(), model.audio_tokenizer.quantizer.codebooks
    mean, target = vectors.mean(0), words[tokens]
    centred = (vectors - mean).double()
    gram = centred.T @ centred
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram + ridge, centred.T @ (target - target.mean(0)).double()).float()
    # As long as words on average: a regression alone is shorter the less it can tell.
    scale = words[tokens].norm(dim=-1).mean() / (centred.float() @ weight + target.mean(0)).norm(dim=-1).mean()
    offset = (target.mean(0) - mean @ weight) / len(codebooks)
    for table, codebook in zip(model.model.audio_embed_layers, codebooks):
        table.weight[: codebook.size] = ((codebook.embed @ weight + offset) * scale).to(table.weight.dtype)


def flat_start(checkpoint: str | Path, rows: str | Path, folder: str | Path, seed: int = 0) -> Path:
    """
    Args:
        checkpoint: with a text LLM and a trained tokenizer. rows: training rows with codes, for their transcriptions.
        folder: gets the checkpoint with its audio embeddings set.

    Raises:
        ValueError: rows that cannot be used.
    """
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    pairs = read_pairs(Path(rows), processor.tokenizer)
    lengths = [codes.shape[1] for codes, _ in pairs]
    vectors = quantised(model, [codes for codes, _ in pairs])
    tokens = align(vectors, [ids for _, ids in pairs], lengths, len(processor.tokenizer), seed)
    embed_codebooks(model, vectors, tokens)
    save_checkpoint(model, processor, Path(folder).absolute(), replace=True)
    return Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, meaning in (("checkpoint", "text LLM and tokenizer"), ("rows", "rows/speech.jsonl"), ("folder", "result")):
        parser.add_argument(name, type=Path, help=meaning)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        print(flat_start(options.checkpoint, options.rows, options.folder, options.seed))
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
