"""Training the mel decoder, alone or with flow matching, on codes that stay as they are: what was trained on them stays valid."""

import torch
from torch import nn

from ..modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from ..modeling_common import frame_lengths
from ..modeling_flow_matching import BaichuanAudioFlowMatchingDecoder
from ..modeling_mel_decoder import BaichuanAudioDecoderOutput
from ..modeling_tokenizer_losses import check_mel_labels, tokenizer_losses


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
        decoded, frames = self.decode(audio_codes, codebooks)
        return self.losses(decoded, frames, coarse_labels, mel_labels, num_items_in_batch)

    def decode(self, audio_codes: torch.Tensor, codebooks: torch.Tensor) -> tuple[BaichuanAudioDecoderOutput, torch.Tensor]:
        """Codes and codebooks as of `forward` -> what the mel decoder makes of them, and the code frames of each clip, `(batch,)`."""
        frames = frame_lengths(audio_codes)
        return self.mel_decoder(self._quantizer[0].decode(audio_codes.clamp(min=0), codebooks), frames), frames

    def losses(
        self,
        decoded: BaichuanAudioDecoderOutput,
        frames: torch.Tensor,
        coarse_labels: torch.Tensor,
        mel_labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What `forward` returns, of what `decode` returned."""
        losses = tokenizer_losses(
            decoded,
            coarse_labels,
            mel_labels,
            decoded.hidden_states.new_zeros(len(frames), 1),  # nothing is assigned, so nothing is committed to
            None,
            frames,
            (1.0, 0.0, 0.0),
            num_items_in_batch,
        )
        return {name: losses[name] for name in ("loss", "coarse_loss", "resampled_loss", "refined_loss")}


class MelAndFlowForTraining(nn.Module):
    """
    The mel decoder and the flow-matching decoder together, on codes that stay: codes -> mels, with the losses of both.

    Flow matching by itself learns from the states of a mel decoder that was made for another mel. Here what it lacks in them reaches
    the mel decoder too. The velocity's gradient is noisy, though, for it depends on a random time and noise: with a frozen estimator
    the flow loss is left out, and mel decoder and pre-net learn from what mu lacks alone.

    Args:
        tokenizer: its mel decoder is trained in place.
        flow_matching: is trained in place, from the states of clips that may have fewer codebooks, as the mel decoder is. Whether its
            estimator is frozen is asked for at every call.
    """

    def __init__(self, tokenizer: BaichuanAudioTokenizerModel, flow_matching: BaichuanAudioFlowMatchingDecoder):
        super().__init__()
        self.tokenizer_side = MelDecoderForTraining(tokenizer)
        self.flow_matching = flow_matching

    def _flow_losses(self, hidden_states, lengths, labels, num_items, seed) -> dict[str, torch.Tensor]:
        """Flow matching's loss and its parts."""
        flow = self.flow_matching
        if any(parameter.requires_grad for parameter in flow.estimator.parameters()):
            output = flow(hidden_states, lengths, seed=seed, labels=labels, num_items_in_batch=num_items)
            return {"loss": output.loss, "flow_loss": output.flow_loss, "prior_loss": output.prior_loss}
        check_mel_labels("labels", labels, hidden_states.new_empty(*hidden_states.shape[:2], flow.config.num_mel_bins))
        condition = flow.prenet(hidden_states.to(flow.prenet.in_fc1.weight.dtype))
        prior = flow.prior_loss(condition, labels, lengths, lengths.sum() if num_items is None else num_items)
        return {"loss": flow.config.prior_loss_weight * prior, "prior_loss": prior}

    def forward(
        self,
        audio_codes: torch.Tensor,
        codebooks: torch.Tensor,
        coarse_labels: torch.Tensor,
        mel_labels: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_mel_items_in_batch: int | torch.Tensor | None = None,
        seed: int | list[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            audio_codes, codebooks, coarse_labels, mel_labels, num_items_in_batch: as of `MelDecoderForTraining.forward`.
            labels, seed, num_mel_items_in_batch: `labels`, `seed` and `num_items_in_batch` of
                `BaichuanAudioFlowMatchingDecoder.forward`.

        Returns:
            `loss`, the sum of the reconstruction loss and of flow matching's, and their parts, float32 scalars: three of the mel
            decoder, `prior_loss`, and `flow_loss` unless the estimator is frozen.

        Raises:
            ValueError: labels of the wrong shape.
        """
        decoded, frames = self.tokenizer_side.decode(audio_codes, codebooks)
        losses = self.tokenizer_side.losses(decoded, frames, coarse_labels, mel_labels, num_items_in_batch)
        flow = self._flow_losses(decoded.hidden_states, decoded.hidden_lengths, labels, num_mel_items_in_batch, seed)
        return losses | flow | {"loss": losses["loss"] + flow["loss"]}


__all__ = ["MelAndFlowForTraining", "MelDecoderForTraining"]
