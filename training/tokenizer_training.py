"""Training the speech tokenizer: the schedule of progressive replacement, the frozen LLM's text loss, and both around the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_audio_tokenizer import BaichuanAudioTokenizerModel, BaichuanAudioTokenizerOutput
from ..modeling_common import length_mask


@dataclass(frozen=True)
class ReplacementSchedule:
    """
    Progressive replacement (paper, section 3.1): whole clips pass through the quantiser, ever more of them.

    Everything is a function of the step alone, so a resumed run continues where it was.

    Args:
        ramp_steps: optimiser steps over which the share rises linearly; afterwards it stays at `end_share`.
        start_share, end_share: share of the clips at step 0 and from `ramp_steps` on.
        commitment_weight (*optional*): of the commitment loss once the share is `end_share`, the tokenizer config's by default; before,
            it is lower in proportion to the share.

    Raises:
        ValueError: values that do not make a rising share in [0, 1].
    """

    ramp_steps: int
    start_share: float = 0.1
    end_share: float = 1.0
    commitment_weight: float | None = None

    def __post_init__(self):
        if self.ramp_steps < 1:
            raise ValueError(f"`ramp_steps` must be at least 1, got {self.ramp_steps}.")
        if not 0 <= self.start_share <= self.end_share <= 1 or self.end_share == 0:
            raise ValueError(
                "`start_share` and `end_share` must satisfy 0 <= start <= end <= 1 and end > 0, "
                f"got {self.start_share} and {self.end_share}."
            )
        if self.commitment_weight is not None and self.commitment_weight < 0:
            raise ValueError(f"`commitment_weight` must not be negative, got {self.commitment_weight}.")

    def share(self, step: int) -> float:
        """Share of the clips that are replaced at optimiser step `step` (from 0)."""
        progress = min(max(step, 0) / self.ramp_steps, 1.0)
        return self.start_share + (self.end_share - self.start_share) * progress

    def commitment(self, step: int, default_weight: float) -> float:
        """Weight of the commitment loss at optimiser step `step`; `default_weight` stands for a `commitment_weight` of None."""
        final = default_weight if self.commitment_weight is None else self.commitment_weight
        return final * self.share(step) / self.end_share


class FrozenLLMTextLoss(nn.Module):
    """
    Semantic supervision (paper, section 3.1): a frozen LLM reads the quantised frames and has to say the transcript.

    Codes carry no gradient, so the LLM sees the straight-through vectors through a small trained projection (LayerNorm, Linear).
    The LLM is never trained, stays in evaluation mode, and is not part of the state dict.

    Args:
        llm: any causal LM of transformers.
        input_size: width of the vectors (`BaichuanAudioTokenizerConfig.quantizer_size`).
        prompt_ids: tokens before the audio, for example the transcription prompt.
    """

    def __init__(self, llm: PreTrainedModel, input_size: int, prompt_ids: Sequence[int] = ()):
        super().__init__()
        self.llm = llm.requires_grad_(False).eval()
        self.projection = nn.Sequential(nn.LayerNorm(input_size), nn.Linear(input_size, llm.get_input_embeddings().embedding_dim))
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids, dtype=torch.int64), persistent=False)
        self.register_state_dict_post_hook(_drop_llm)
        self.register_load_state_dict_pre_hook(_keep_llm)

    def train(self, mode: bool = True):
        super().train(mode)
        self.llm.eval()
        return self

    def forward(self, vectors: torch.Tensor, frames: torch.Tensor, text_labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            vectors (`(batch, frames, input_size)`), frames (`(batch,)`): quantised frames and how many are valid.
            text_labels (`(batch, tokens)`, int64): transcripts, with the end-of-text token where it should be learnt; padded on the
                right with -100. A clip without tokens has loss 0.

        Returns:
            `(batch,)` float32: each clip's mean cross-entropy over its tokens.

        Raises:
            ValueError: labels of another batch, padded elsewhere than on the right, or no token id of the LLM.
        """
        tokens = self._token_counts(vectors, text_labels)
        embeddings = self.llm.get_input_embeddings()
        audio = self.projection(vectors.to(self.projection[1].weight.dtype)).to(embeddings.weight.dtype)
        prompt, text = embeddings(self.prompt_ids), embeddings(text_labels.clamp(min=0))
        # Each row is prompt, audio, text without a gap, padded on the right: positions and attention are those of the clip alone.
        rows = [
            torch.cat([prompt, audio[row, :length], text[row, :count]])
            for row, (length, count) in enumerate(zip(frames.tolist(), tokens.tolist()))
        ]
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        starts = len(prompt) + frames
        mask = length_mask(starts + tokens, inputs.shape[1])
        hidden = self.llm.get_decoder()(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).last_hidden_state
        # Token k of the text is predicted one position before it; logits elsewhere are never made.
        said = length_mask(tokens, text_labels.shape[1])
        row, token = said.nonzero(as_tuple=True)
        logits = self.llm.get_output_embeddings()(hidden[row, starts[row] + token - 1])
        losses = nn.functional.cross_entropy(logits.float(), text_labels[said], reduction="none")
        return losses.new_zeros(len(frames)).index_add(0, row, losses) / tokens.clamp(min=1)

    def _token_counts(self, vectors: torch.Tensor, text_labels: torch.Tensor) -> torch.Tensor:
        if text_labels.dim() != 2 or text_labels.shape[0] != vectors.shape[0]:
            raise ValueError(f"`text_labels` must be ({vectors.shape[0]}, tokens), got {tuple(text_labels.shape)}.")
        said = text_labels != -100
        tokens = said.sum(1)
        if not torch.equal(said, length_mask(tokens, text_labels.shape[1])):
            raise ValueError("`text_labels` must be padded with -100 on the right only.")
        size = self.llm.get_input_embeddings().num_embeddings
        if bool(((text_labels < 0) & said).any()) or bool((text_labels >= size).any()):
            raise ValueError(f"`text_labels` must be token ids below {size}, or -100.")
        return tokens


class CTCTextLoss(nn.Module):
    """
    Semantic supervision without an LLM: from a quantised frame alone, a linear layer has to tell which token of the transcript it is,
    or that it is none (CTC, Graves et al. 2006). What is said must be in the codes for all to read. Not in the paper; for models too
    small to dig it out of codes that were made for sound alone.

    Args:
        input_size: width of the vectors (`BaichuanAudioTokenizerConfig.quantizer_size`).
        vocab_size: tokens of the transcripts. blank: a token that is in none of them.
    """

    def __init__(self, input_size: int, vocab_size: int, blank: int):
        super().__init__()
        self.blank = blank
        self.projection = nn.Sequential(nn.LayerNorm(input_size), nn.Linear(input_size, vocab_size))

    def forward(self, vectors: torch.Tensor, frames: torch.Tensor, text_labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            vectors (`(batch, frames, input_size)`), frames (`(batch,)`): quantised frames and how many are valid.
            text_labels (`(batch, tokens)`, int64): transcripts, padded on the right with -100; the blank is left out of them.

        Returns:
            `(batch,)` float32: minus each clip's log probability, per token; 0 for a clip with too few frames for its text.
        """
        texts = [row[(row != -100) & (row != self.blank)] for row in text_labels]
        counts = torch.tensor([len(text) for text in texts])
        steps = self.projection(vectors.to(self.projection[1].weight.dtype)).float().log_softmax(-1).transpose(0, 1)
        losses = nn.functional.ctc_loss(
            steps, torch.cat(texts), frames.cpu(), counts, self.blank, reduction="none", zero_infinity=True
        )
        return losses / counts.clamp(min=1).to(losses.device)


def _drop_llm(module, state_dict, prefix, local_metadata):
    for key in [key for key in state_dict if key.startswith(f"{prefix}llm.")]:
        del state_dict[key]


def _keep_llm(module, state_dict, prefix, *args):
    for name, tensor in module.llm.state_dict().items():
        state_dict.setdefault(f"{prefix}llm.{name}", tensor)


class TokenizerForTraining(nn.Module):
    """
    The tokenizer with what training it needs beside it, as one module to wrap, optimise and checkpoint.

    Args:
        tokenizer: the model that is trained.
        schedule: of replacement and of the commitment weight, which rises to the config's.
        text_loss (*optional*): the frozen LLM's loss, or CTC; every batch must then have `text_labels`.
    """

    def __init__(
        self,
        tokenizer: BaichuanAudioTokenizerModel,
        schedule: ReplacementSchedule,
        text_loss: FrozenLLMTextLoss | CTCTextLoss | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.text_loss = text_loss

    def forward(self, step: int, text_labels: torch.Tensor | None = None, **inputs) -> BaichuanAudioTokenizerOutput:
        """
        Args:
            step: optimiser steps done so far.
            text_labels: as in `FrozenLLMTextLoss.forward`; left unused without a text loss.
            inputs: the other arguments of `BaichuanAudioTokenizerModel.forward`, both mel labels among them.

        Raises:
            ValueError: a text loss without `text_labels`.
        """
        if self.text_loss is None:
            text_labels = None
        elif text_labels is None:
            raise ValueError("Training with a text loss needs `text_labels` in every batch.")
        return self.tokenizer(
            **inputs,
            text_labels=text_labels,
            text_loss=self.text_loss,
            replacement_share=self.schedule.share(step),
            commitment_weight=self.schedule.commitment(step, self.tokenizer.config.commitment_weight),
        )


def count_code_frames(input_features_mask: torch.Tensor, tokenizer: BaichuanAudioTokenizerModel) -> torch.Tensor:
    """
    Code frames of a batch; summed over the batches of one optimiser step, it is `num_items_in_batch`.

    Args:
        input_features_mask (`(chunks, mel_frames)`): 1 where a chunk has a frame.

    Returns:
        int64 scalar tensor.
    """
    lengths = tokenizer.encoder.output_lengths(input_features_mask.sum(-1))
    return (lengths // tokenizer.config.downsample_factor).sum()


__all__ = ["CTCTextLoss", "FrozenLLMTextLoss", "ReplacementSchedule", "TokenizerForTraining", "count_code_frames"]
