"""Losses of the speech tokenizer (paper, section 3.1), clip by clip, so that no clip's loss depends on its batch."""

from collections.abc import Callable

import torch

from .modeling_common import length_mask


TextLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def check_mel_labels(name: str, labels: torch.Tensor, prediction: torch.Tensor) -> None:
    """Refuses mel targets that do not lie frame by frame on what the decoder made.

    Raises:
        ValueError: another shape.
    """
    if labels.shape != prediction.shape:
        raise ValueError(
            f"`{name}` must be {tuple(prediction.shape)} (chunks, mel frames of the decoder, mel bins), got {tuple(labels.shape)}."
        )


def mel_loss_per_clip(prediction: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """L1 + L2 over the valid frames: (batch, frames, mel_bins) twice and (batch,) lengths -> (batch,) float32."""
    inside = length_mask(lengths, prediction.shape[1])[..., None]
    difference = (prediction.float() - target.float()).masked_fill(~inside, 0.0)
    return (difference.abs() + difference.square()).sum((1, 2)) / (lengths * prediction.shape[2])


def tokenizer_losses(
    decoded,
    coarse_labels: torch.Tensor,
    mel_labels: torch.Tensor,
    codebook_commitment: torch.Tensor,
    text_loss: torch.Tensor | None,
    frames: torch.Tensor,
    weights: tuple[float, float, float],
    num_items_in_batch: int | torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    lambda1 * reconstruction + lambda2 * text + lambda3 * commitment.

    Every piece is a mean over code frames: a clip counts with its own mean as often as it has code frames, whatever the rate of the
    piece. One number, the code frames of all clips, then normalises every piece, also over several batches.

    Args:
        decoded (`BaichuanAudioDecoderOutput`): the decoder's mels and their lengths.
        coarse_labels, mel_labels: targets at 100 Hz and at 62.5 Hz, shaped as the mels.
        codebook_commitment (`(batch, num_codebooks)`): as the quantiser returns it.
        text_loss (`(batch,)`, *optional*): mean text loss of each clip.
        frames (`(batch,)`): code frames of each clip.
        weights: lambda1, lambda2, lambda3.
        num_items_in_batch (*optional*): code frames of all batches that one optimiser step accumulates; this batch's by default.

    Returns:
        `loss`; `reconstruction_loss`, the sum of `coarse_loss`, `resampled_loss` and `refined_loss`; `commitment_loss`, the sum of
        `codebook_commitment` (`(num_codebooks,)`, detached); `text_loss`. All float32, before the weights.

    Raises:
        ValueError: targets of another shape than the mels.
    """
    check_mel_labels("coarse_labels", coarse_labels, decoded.full_rate_mel)
    check_mel_labels("mel_labels", mel_labels, decoded.refined_mel)
    share = frames.float() / (frames.sum() if num_items_in_batch is None else num_items_in_batch)

    def mel_loss(prediction, target, lengths):
        return (mel_loss_per_clip(prediction, target, lengths) * share).sum()

    losses = {
        "coarse_loss": mel_loss(decoded.full_rate_mel, coarse_labels, decoded.full_rate_lengths),
        "resampled_loss": mel_loss(decoded.coarse_mel, mel_labels, decoded.mel_lengths),
        "refined_loss": mel_loss(decoded.refined_mel, mel_labels, decoded.mel_lengths),
    }
    losses["reconstruction_loss"] = sum(losses.values())
    by_codebook = (codebook_commitment * share[:, None]).sum(0)
    losses["commitment_loss"] = by_codebook.sum()
    losses["codebook_commitment"] = by_codebook.detach()
    reconstruction_weight, text_weight, commitment_weight = weights
    loss = reconstruction_weight * losses["reconstruction_loss"] + commitment_weight * losses["commitment_loss"]
    if text_loss is not None:
        losses["text_loss"] = (text_loss.float() * share).sum()
        loss = loss + text_weight * losses["text_loss"]
    return losses | {"loss": loss}
