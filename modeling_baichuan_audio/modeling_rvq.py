"""Residual vector quantiser of the speech tokenizer (paper, section 3.1; RVQ as in arXiv 2107.03312)."""

import torch
from torch import nn


class EuclideanCodebook(nn.Module):
    """One codebook: its entries, and the running sums that training updates them from (EMA).

    Everything is float32, whatever dtype the model is loaded in: distances decide between neighbours.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size = size
        self.register_buffer("embed", torch.empty(size, width, dtype=torch.float32))
        self.register_buffer("embed_avg", torch.empty(size, width, dtype=torch.float32))
        self.register_buffer("cluster_size", torch.empty(size, dtype=torch.float32))

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (...) int64: index of the entry at the smallest Euclidean distance, in float32."""
        entries = self.embed.float()
        # |v - e|^2 without |v|^2, which is the same for every entry.
        distances = entries.square().sum(-1) - 2 * vectors.float() @ entries.t()
        return distances.argmin(-1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., width) float32."""
        return nn.functional.embedding(codes, self.embed.float())


class ResidualVectorQuantizer(nn.Module):
    """Codebooks applied in turn, each to what the ones before left over."""

    def __init__(self, codebook_sizes: list[int], width: int):
        super().__init__()
        self.codebooks = nn.ModuleList([EuclideanCodebook(size, width) for size in codebook_sizes])

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(batch, frames, width) -> (batch, num_codebooks, frames) int64."""
        residual, codes = vectors, []
        for codebook in self.codebooks:
            indices = codebook.nearest(residual)
            residual = (residual.float() - codebook.lookup(indices)).to(vectors.dtype)
            codes.append(indices)
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(batch, n, frames) int64, n <= num_codebooks -> (batch, frames, width) float32: the sum of the first n entries."""
        return sum(codebook.lookup(indices) for codebook, indices in zip(self.codebooks, codes.unbind(1)))
