"""Residual vector quantiser of the speech tokenizer (paper, section 3.1; RVQ as in arXiv 2107.03312)."""

from dataclasses import dataclass

import torch
from torch import nn

from .modeling_common import length_mask, seeded_generator
from .modeling_rvq_training import gather_integers, process_rank, sum_over_processes


@dataclass
class QuantizerOutput:
    """
    What `ResidualVectorQuantizer.forward` computes.

    Args:
        vectors (`(batch, frames, width)`, float32): the quantised vectors with straight-through gradients, or the continuous ones
            for the clips that are not replaced; unspecified past the end of a clip.
        codes (`(batch, num_codebooks, frames)`, int64): -1 past the end of a clip and in codebooks that the clip did not use.
        commitment (`(batch, num_codebooks)`, float32): mean over a clip's frames and the width of the squared difference between a
            codebook's input and its entry; 0 for codebooks that the clip did not use.
        replaced (`(batch,)`, bool): which clips are quantised in `vectors`.
        perplexity (`(num_codebooks,)`, float32, detached): exp of the entropy of the chosen entries, over all processes in training.
        usage (`(num_codebooks,)`, float32, detached): share of the entries that were chosen at least once.
    """

    vectors: torch.Tensor
    codes: torch.Tensor
    commitment: torch.Tensor
    replaced: torch.Tensor
    perplexity: torch.Tensor
    usage: torch.Tensor


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

    def sample(self, vectors: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
        """
        Draws entries with probability softmax(-(d / d_min) / temperature), d the squared distances of a vector to the entries.

        Adding Gumbel noise and taking the maximum is such a draw (arXiv 1611.01144). Distances are relative to the nearest entry's,
        because residuals shrink from codebook to codebook.

        Args:
            vectors (`(frames, width)`), temperature (above 0), generator (on the vectors' device).

        Returns:
            `(frames,)` int64.
        """
        vectors, entries = vectors.float(), self.embed.float()
        distances = entries.square().sum(-1) - 2 * vectors @ entries.t() + vectors.square().sum(-1, keepdim=True)
        distances = distances.clamp(min=0)
        relative = distances / distances.amin(-1, keepdim=True).clamp(min=1e-20)
        gumbel = -torch.empty_like(relative).exponential_(generator=generator).log()
        return (gumbel - relative / temperature).argmax(-1)

    @torch.no_grad()
    def update(self, counts: torch.Tensor, sums: torch.Tensor, decay: float, shrinkage: float) -> None:
        """
        One step of the running averages and of the entries.

        With alpha the decay, beta the shrinkage, n the number of vectors that chose an entry and m their mean:

            cluster_size N <- alpha N + (1 - alpha) n
            entry        c <- (1 - beta) c',   c' = (1 - g) c + g m,   g = (1 - alpha) n / N
            embed_avg      <- N c

        which is the usual quotient of running sums, c' = (alpha N_old c + (1 - alpha) n m) / N, written as a step from c. It is the
        paper's c' = alpha c + mean with weights that add to one: g is 1 - alpha for an entry of steady use, and 0 where nothing
        was assigned. beta acts on the sum that is kept, hence on every step anew, as weight decay does: entries in
        steady use settle at (1 - beta) (1 - alpha) / (1 - alpha (1 - beta)) of the mean, unused ones fade by 1 - beta a step.
        Starting from c rather than from embed_avg leaves the entries of a checkpoint in place whose sums follow another convention.

        Args:
            counts (`(size,)`), sums (`(size, width)`): number and sum of the vectors that chose each entry, over all processes.
        """
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        step = (1 - decay) / self.cluster_size.clamp(min=1e-20)
        self.embed.add_((sums - counts[:, None] * self.embed) * step[:, None]).mul_(1 - shrinkage)
        self.embed_avg.copy_(self.embed * self.cluster_size[:, None])

    @torch.no_grad()
    def restart(self, threshold: float, vectors: torch.Tensor, available: list[int], generator: torch.Generator) -> None:
        """
        Moves entries whose `cluster_size` is below `threshold` to vectors drawn from the batch, without repetition.

        If there are more such entries than vectors, the rest wait for a later batch. A moved entry starts with the cluster size
        max(1, threshold), so it is not moved again at once.

        Args:
            vectors (`(n, width)`, float32): this process's candidates.
            available: how many candidates each process has.
            generator: on the CPU and in the same state in every process, so that all draw the same vectors.
        """
        dead = (self.cluster_size < threshold).nonzero()[:, 0]
        if not len(dead) or not sum(available):
            return
        picks = torch.randperm(sum(available), generator=generator)[: len(dead)].to(vectors.device)
        dead = dead[: len(picks)]
        rank = process_rank()
        local = picks - sum(available[:rank])
        mine = (local >= 0) & (local < available[rank])
        fresh = vectors.new_zeros(len(picks), vectors.shape[1])
        fresh[mine] = vectors[local[mine]]
        fresh = sum_over_processes(fresh)  # every row comes from one process: the sum is exact
        weight = max(1.0, threshold)
        self.embed[dead] = fresh
        self.embed_avg[dead] = fresh * weight
        self.cluster_size[dead] = weight


class ResidualVectorQuantizer(nn.Module):
    """Codebooks applied in turn, each to what the ones before left over.

    Args:
        codebook_sizes: entries of each codebook.
        width: of a vector.
        decay, shrinkage, restart_threshold, gumbel_temperature, dropout: of training; see `BaichuanAudioTokenizerConfig`.
    """

    def __init__(
        self,
        codebook_sizes: list[int],
        width: int,
        decay: float = 0.99,
        shrinkage: float = 1e-4,
        restart_threshold: float = 0.05,
        gumbel_temperature: float = 0.01,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.codebooks = nn.ModuleList([EuclideanCodebook(size, width) for size in codebook_sizes])
        self.decay = decay
        self.shrinkage = shrinkage
        self.restart_threshold = restart_threshold
        self.gumbel_temperature = gumbel_temperature
        self.dropout = dropout

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(batch, frames, width) -> (batch, num_codebooks, frames) int64."""
        residual, codes = vectors, []
        for codebook in self.codebooks:
            indices = codebook.nearest(residual)
            residual = (residual.float() - codebook.lookup(indices)).to(vectors.dtype)
            codes.append(indices)
        return torch.stack(codes, dim=1)

    def decode(self, codes: torch.Tensor, used: torch.Tensor | None = None) -> torch.Tensor:
        """
        (batch, n, frames) int64, n <= num_codebooks -> (batch, frames, width) float32: the sum of the first n entries, or of each
        clip's first `used` (`(batch,)`, int64) ones.
        """
        entries = (codebook.lookup(indices) for codebook, indices in zip(self.codebooks, codes.unbind(1)))
        if used is None:
            return sum(entries)
        return sum(part * (used > level)[:, None, None] for level, part in enumerate(entries))

    def forward(
        self,
        vectors: torch.Tensor,
        frames: torch.Tensor,
        replacement_share: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """
        Quantises with gradients and losses. In training mode, and only there, assignments are sampled, clips drop codebooks, clips
        may keep their continuous vectors, and the codebooks learn from the batch: the next call sees the updated entries, this one
        does not. `quantizer.eval()` inside a model in training mode freezes them, as it does a batch norm.

        Call it in every process of a data-parallel group at once: sums are taken over all of them. One number is drawn from
        `generator`, and the first process's is used by all; the rest follows from it and from a clip's place in the whole batch. How
        the batch is split over processes therefore changes nothing.

        Args:
            vectors (`(batch, frames, width)`): from the bridge.
            frames (`(batch,)`, int64): valid frames of each clip; the others touch neither losses nor codebooks.
            replacement_share (`float`, defaults to 1): probability that a clip, as a whole, gets its quantised vectors.
            generator (*optional*): torch's global generator by default.

        Raises:
            ValueError: a clip without frames, or a share outside [0, 1].
        """
        if not 0 <= replacement_share <= 1:
            raise ValueError(f"`replacement_share` must be in [0, 1], got {replacement_share}.")
        if len(frames) == 0 or int(frames.min()) < 1 or int(frames.max()) > vectors.shape[1]:
            raise ValueError(f"`frames` must be 1 to {vectors.shape[1]} for every clip, got {frames.tolist()}.")
        # Half-precision distances would pick other neighbours than inference does.
        with torch.autocast(vectors.device.type, enabled=False):
            return self._quantize(vectors, frames, replacement_share, generator)

    def _draw(self, batch: int, share: float, generator: torch.Generator | None) -> tuple[int, int, list[int], list[bool]]:
        """Seed of this call, index of the first clip in the whole batch, codebooks each clip uses, whether it is replaced."""
        count = len(self.codebooks)
        if not self.training:
            return 0, 0, [count] * batch, [True] * batch
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
        gathered = gather_integers([seed, batch], self.codebooks[0].embed.device)
        seed, first = gathered[0][0], sum(row[1] for row in gathered[: process_rank()])
        used, replaced = [], []
        for clip in range(first, first + batch):
            stream = seeded_generator(seed, "clip", clip)
            drop, replace = torch.rand(2, generator=stream).tolist()
            used.append(int(torch.randint(1, count + 1, (1,), generator=stream)) if drop < self.dropout else count)
            replaced.append(replace < share)
        return seed, first, used, replaced

    @torch.no_grad()
    def _assign(self, level: int, residual: torch.Tensor, frames: torch.Tensor, seed: int, first: int) -> torch.Tensor:
        """(batch, frames, width) -> (batch, frames) int64, by sampling in training mode."""
        codebook = self.codebooks[level]
        if not self.training or self.gumbel_temperature == 0:
            return codebook.nearest(residual)
        indices = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
        for row, length in enumerate(frames.tolist()):
            stream = torch.Generator(residual.device)
            stream.manual_seed(seeded_generator(seed, "assign", level, first + row).initial_seed())
            indices[row, :length] = codebook.sample(residual[row, :length], self.gumbel_temperature, stream)
        return indices

    def _quantize(self, vectors, frames, replacement_share, generator) -> QuantizerOutput:
        batch, longest = vectors.shape[:2]
        seed, first, used, replaced = self._draw(batch, replacement_share, generator)
        used = torch.tensor(used, device=vectors.device)
        replaced = torch.tensor(replaced, device=vectors.device)
        levels = torch.arange(len(self.codebooks), device=vectors.device)
        taking_part = frames[:, None] * (used[:, None] > levels)  # (batch, num_codebooks) frames that reach each codebook
        available = gather_integers(taking_part.sum(0).tolist(), vectors.device) if self.training else None
        residual, quantized = vectors, torch.zeros_like(vectors, dtype=torch.float32)
        codes, commitment, perplexity, usage = [], [], [], []
        for level, codebook in enumerate(self.codebooks):
            active = length_mask(taking_part[:, level], longest)
            indices = self._assign(level, residual, frames, seed, first)
            entries = codebook.lookup(indices)
            difference = (residual.float() - entries).square().mean(-1).masked_fill(~active, 0.0)
            commitment.append(difference.sum(1) / frames)
            quantized = quantized + entries.masked_fill(~active[..., None], 0.0)
            codes.append(indices.masked_fill(~active, -1))
            counts = torch.bincount(indices[active], minlength=codebook.size).float()
            if self.training:
                chosen = residual.detach()[active].float()
                sums = torch.zeros_like(codebook.embed).index_add_(0, indices[active], chosen)
                counts, sums = sum_over_processes(counts), sum_over_processes(sums)
                codebook.update(counts, sums, self.decay, self.shrinkage)
                stream = seeded_generator(seed, "restart", level)
                codebook.restart(self.restart_threshold, chosen, [row[level] for row in available], stream)
            share = counts / counts.sum().clamp(min=1)
            perplexity.append(torch.exp(-torch.xlogy(share, share).sum()))
            usage.append((counts > 0).float().mean())
            residual = (residual.float() - entries).to(vectors.dtype)
        continuous = vectors.float()
        # The value is exactly the entries' sum, the gradient that of the identity.
        straight_through = quantized + (continuous - continuous.detach())
        return QuantizerOutput(
            vectors=torch.where(replaced[:, None, None], straight_through, continuous),
            codes=torch.stack(codes, dim=1),
            commitment=torch.stack(commitment, dim=1),
            replaced=replaced,
            perplexity=torch.stack(perplexity),
            usage=torch.stack(usage),
        )
