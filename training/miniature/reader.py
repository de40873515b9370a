"""A linear reader of codes: which token of a transcript does a frame stand for, if any?

It is learnt from transcripts without any alignment (CTC, Graves et al. 2006), on codes alone, and serves two ends: audio embeddings
start near the words that it reads (`flat_start.py`), and recordings are cut between words (`splice.py`).
"""

import random

import torch
from torch import nn
from tqdm import tqdm


Pair = tuple[torch.Tensor, torch.Tensor]
EPOCHS = 6
_LEARNING_RATE = 2e-2
_BATCH = 32


class CodeReader(nn.Module):
    """
    One table of scores for each codebook, whose rows are summed over the codes of a frame.

    Args:
        codebook_sizes: entries of each codebook.
        tokens (`(n,)`, int64): ids that it tells apart, in rising order; class n is "none of them" (the blank).
    """

    def __init__(self, codebook_sizes: list[int], tokens: torch.Tensor):
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.tables = nn.ModuleList([nn.Embedding(size, len(tokens) + 1) for size in codebook_sizes])
        for table in self.tables:
            nn.init.zeros_(table.weight)
        self.bias = nn.Parameter(torch.zeros(len(tokens) + 1))

    @property
    def blank(self) -> int:
        return len(self.tokens)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """`(..., num_codebooks, frames)` int64 -> `(..., frames, n + 1)` float32, log probabilities."""
        scores = sum(table(indices) for table, indices in zip(self.tables, codes.unbind(-2)))
        return (scores + self.bias).log_softmax(-1)

    @torch.no_grad()
    def read(self, codes: torch.Tensor) -> list[tuple[int, int]]:
        """
        Best path through `(num_codebooks, frames)` codes: (token id, frame where it begins) in order, without repetitions and blanks.
        """
        best = self(codes).argmax(-1).tolist()
        starts = [(value, frame) for frame, (value, before) in enumerate(zip(best, [self.blank, *best])) if value != before]
        return [(int(self.tokens[value]), frame) for value, frame in starts if value != self.blank]


def fit_reader(pairs: list[Pair], codebook_sizes: list[int], epochs: int = EPOCHS, seed: int = 0) -> CodeReader:
    """
    Args:
        pairs: codes `(num_codebooks, frames)` and token ids `(tokens,)`, at least as many frames as tokens.
        codebook_sizes: entries of each codebook.
        epochs, seed: of training with Adam, batches of clips of similar length.
    """
    reader = CodeReader(codebook_sizes, torch.cat([ids for _, ids in pairs]).unique())
    optimizer = torch.optim.Adam(reader.parameters(), lr=_LEARNING_RATE)
    rng, steps = random.Random(seed), epochs * -(-len(pairs) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=_LEARNING_RATE / 20)
    for epoch in range(epochs):
        order = sorted(range(len(pairs)), key=lambda index: (pairs[index][0].shape[1], rng.random()))
        batches, total = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)], 0.0
        rng.shuffle(batches)
        for batch in tqdm(batches, desc=f"reader {epoch + 1}/{epochs}", leave=False):
            loss = _ctc_loss(reader, [pairs[index] for index in batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) / len(batches)
        print(f"reader, epoch {epoch + 1}: loss {total:.3f} per token")
    return reader.eval()


def _ctc_loss(reader: CodeReader, pairs: list[Pair]) -> torch.Tensor:
    frames = torch.tensor([codes.shape[1] for codes, _ in pairs])
    counts = torch.tensor([len(ids) for _, ids in pairs])
    codes = nn.utils.rnn.pad_sequence([codes.T for codes, _ in pairs], batch_first=True).transpose(1, 2)
    targets = torch.searchsorted(reader.tokens, torch.cat([ids for _, ids in pairs]))
    return nn.functional.ctc_loss(
        reader(codes).transpose(0, 1), targets, frames, counts, reader.blank, reduction="mean", zero_infinity=True
    )
