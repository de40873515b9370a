"""Training the mel decoder on codes that stay as they are, so that whatever was trained on those codes stays valid."""

import torch
from torch import nn

from ..modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from ..modeling_common import frame_lengths
from ..modeling_tokenizer_losses import tokenizer_losses


class MelDecoderForTraining(nn.Module):
    """
    The mel decoder of a speech tokenizer whose encoder, bridge and codebooks are frozen: codes -> mels, with the reconstruction loss.

    As in the tokenizer's own training, some clips are decoded from their first codebooks alone (`config.codebook_dropout`).

    Args:
        tokenizer: its mel decoder is trained in place.
    """

    def __init__(self, tokenizer: BaichuanAudioTokenizerModel):
        super().__init__()
        self.config = tokenizer.config
        self.mel_decoder = tokenizer.mel_decoder
        self._quantizer = [tokenizer.quantizer]  # in a list: its buffers are neither this module's nor its checkpoint's

    def draw_codebooks(self, clips: int) -> torch.Tensor:
        """`(clips,)` int64: how many codebooks each clip is decoded from, drawn from torch's global generator."""
        count = self.config.num_codebooks
        dropped = torch.rand(clips) < self.config.codebook_dropout
        return torch.where(dropped, torch.randint(1, count + 1, (clips,)), count)

    def forward(
        self,
        audio_codes: torch.Tensor,
        codebooks: torch.Tensor,
        coarse_labels: torch.Tensor,
        mel_labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            audio_codes (`(batch, num_codebooks, frames)`, int64): -1 past the end of a clip.
            codebooks (`(batch,)`, int64): each clip is decoded from this many of its first codebooks.
            coarse_labels, mel_labels, num_items_in_batch: as in `BaichuanAudioTokenizerModel.forward`.

        Returns:
            `loss` (the reconstruction loss) and its three parts, float32 scalars.

        Raises:
            ValueError: mel labels of the wrong shape.
        """
        frames = frame_lengths(audio_codes)
        vectors = self._quantizer[0].decode(audio_codes.clamp(min=0), codebooks)
        losses = tokenizer_losses(
            self.mel_decoder(vectors, frames),
            coarse_labels,
            mel_labels,
            vectors.new_zeros(len(frames), 1),  # nothing is assigned, so nothing is committed to
            None,
            frames,
            (1.0, 0.0, 0.0),
            num_items_in_batch,
        )
        return {name: losses[name] for name in ("loss", "coarse_loss", "resampled_loss", "refined_loss")}


__all__ = ["MelDecoderForTraining"]
