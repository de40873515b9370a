"""Where a transcript must end: no recording holds more words than can be said in its time."""

import torch
from transformers import StoppingCriteria


class TranscriptLengthCriteria(StoppingCriteria):
    """
    Ends each transcript that has grown longer than its recording can be, for a recogniser that hears what it does not know may repeat
    itself without end.

    A row's limit is a token for each of its audio frames (12.5 a second, about twice as many as fast speech has) and `margin`.

    Args:
        inputs: of `processor.apply_transcription_request`.
        audio_token_id (`int`): the placeholder of an audio frame (`processor.audio_token_id`).
        margin (`int`, defaults to 8): tokens beyond one a frame.
    """

    def __init__(self, inputs, audio_token_id: int, margin: int = 8):
        self.start = inputs["input_ids"].shape[1]
        self.limits = (inputs["input_ids"] == audio_token_id).sum(1) + margin

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        """`(rows, tokens)` int64, prompts included -> `(rows,)` bool, true where a transcript is as long as it may be."""
        limits = self.limits.to(input_ids.device)
        # Beams of a row follow one another.
        return input_ids.shape[1] - self.start >= limits.repeat_interleave(input_ids.shape[0] // len(limits))


__all__ = ["TranscriptLengthCriteria"]
