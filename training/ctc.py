"""An auxiliary loss for transcription: while it listens, the LLM is to say what it has just heard (CTC, Graves et al. 2006).

Attention from text to speech is slow to form from cross-entropy alone: much of a text can be guessed from the text before it, and
nothing says which frames a word is in. Connectionist temporal classification sums over all ways to spread the words over the frames;
joined to attention it speeds recognisers up (arXiv 1609.06773). Here it needs no new weights: at heard frames the text head's logits
are otherwise unused, and the audio token itself stands for "nothing new".
"""

import torch
from torch import nn

from .layouts import IGNORED, TokenIds


class TranscriptionCTC:
    """
    Args:
        tokens ([`TokenIds`]). prompt_ids: tokens that a transcription row begins with, before `audio_start`.
    """

    def __init__(self, tokens: TokenIds, prompt_ids: list[int]):
        self.tokens, self.start = tokens, [*prompt_ids, tokens.audio_start]

    def pairs(self, input_ids: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """
        Transcription rows that CTC can be computed on: those with at least as many frames as tokens and repetitions of a token.

        Args:
            input_ids, labels (`(batch, time)`, int64): as a collator makes them, not packed.

        Returns:
            Of each such row its number, the positions `(n,)` of the audio tokens and of `audio_end`, and the text `(tokens,)`.
        """
        begins = (input_ids[:, : len(self.start)] == torch.tensor(self.start, device=input_ids.device)).all(1)
        found = []
        for row in begins.nonzero()[:, 0].tolist():
            heard = (input_ids[row] == self.tokens.audio_pad) | (input_ids[row] == self.tokens.audio_end)
            text = labels[row][(labels[row] != IGNORED) & (labels[row] != self.tokens.end_of_text)]
            positions = heard.nonzero()[:, 0]
            if len(text) and len(text) + int((text[1:] == text[:-1]).sum()) <= len(positions):
                found.append((row, positions, text))
        return found

    def loss(self, logits: torch.Tensor, pairs: list[tuple[int, torch.Tensor, torch.Tensor]], num_items: torch.Tensor | int):
        """
        Args:
            logits (`(batch, time, vocab_size)`): text logits. pairs: of the same batch. num_items: what the sum is divided by.

        Returns:
            float32 scalar: minus the log probability of all texts, over `num_items`.
        """
        if not pairs:
            return logits.sum() * 0.0
        steps = nn.utils.rnn.pad_sequence([logits[row, positions].float().log_softmax(-1) for row, positions, _ in pairs])
        texts = torch.cat([text for _, _, text in pairs])
        lengths = [torch.tensor([len(pair[part]) for pair in pairs]) for part in (1, 2)]
        total = nn.functional.ctc_loss(steps, texts, *lengths, blank=self.tokens.audio_pad, reduction="sum")
        return total / num_items
