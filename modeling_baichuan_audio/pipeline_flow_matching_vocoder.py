"""Pipeline from audio codes to sound, without the LLM: mel decoder, flow matching and vocoder."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForTextToSpectrogram, Pipeline

from .pipeline_batches import iterate_batches


TASK = "flow-matching-vocoder"
# What a saved config.json says of it, for folders that are loaded without this package.
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "pipeline_flow_matching_vocoder.FlowMatchingVocoderPipeline",
        "pt": ["AutoModelForTextToSpectrogram"],
        "type": "audio",
    }
}


def as_clip(audio_codes: Any) -> torch.LongTensor:
    """One clip's codes in any packaging -> int64 `(num_codebooks, frames)`.

    Raises:
        ValueError: not a rectangle of integers.
    """
    try:
        clip = audio_codes if isinstance(audio_codes, torch.Tensor) else torch.as_tensor(np.asarray(audio_codes))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`audio_codes` of a clip must be a regular array of integers: {error}") from error
    if clip.dim() != 2 or clip.is_floating_point() or clip.dtype == torch.bool:
        raise ValueError(
            f"`audio_codes` of a clip must be integers of shape (num_codebooks, frames), got {clip.dtype} of shape {tuple(clip.shape)}."
        )
    return clip.long()


def _depth(codes: Any) -> int:
    """Nesting of lists and arrays: 2 for a clip, 3 for several."""
    if hasattr(codes, "ndim"):
        return codes.ndim
    return 1 + _depth(codes[0]) if isinstance(codes, (list, tuple)) and len(codes) else 0


class FlowMatchingVocoderPipeline(Pipeline):
    """
    Audio codes -> waveform. Loads the mel decoder, flow matching and the vocoder of a checkpoint; its LLM is never read.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from modeling_baichuan_audio.conversion import untrained_checkpoint
    >>> pipe = pipeline("flow-matching-vocoder", model=untrained_checkpoint())
    >>> sound = pipe([[0] * 25] * 8, seed=0)
    >>> sound["audio"].shape, sound["sampling_rate"]
    ((47520,), 24000)

    ```
    """

    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_processor = False

    @classmethod
    def from_pretrained(cls, model: Any, device: Any = None, **kwargs) -> "FlowMatchingVocoderPipeline":
        """
        The pipeline of a checkpoint.

        Args:
            model: folder or Hub id, whole or of these parts alone. device (*optional*): as for `transformers.pipeline`.
            kwargs: further arguments of the model's `from_pretrained` (`dtype`, `revision`, `trust_remote_code`, ...).

        Raises:
            ValueError: the checkpoint has no vocoder.
        """
        return cls(model=AutoModelForTextToSpectrogram.from_pretrained(model, **kwargs), task=TASK, device=device)

    def __call__(self, audio_codes: Any, **kwargs) -> dict | list[dict] | Iterator[dict]:
        """
        Args:
            audio_codes: one clip `(num_codebooks, frames)` as array, tensor or nested list; or several, of any lengths: a list, a
                batch `(batch, num_codebooks, frames)` padded with -1, a column of a `datasets` dataset, or an iterable.
            seed (`int`, *optional*): of all noise; a clip's sound depends on its codes and the seed alone.
            num_steps (`int`), guidance (`float`, *optional*): of the flow-matching solver; the config's by default.
            num_codebooks (`int`, *optional*): decode from the first codebooks only.
            batch_size (`int`, defaults to 1): clips decoded at once. num_workers: as for any pipeline.

        Returns:
            `{"audio": float32 (samples,), "sampling_rate": 24000}` for one clip; a list of them for several; an iterator over them
            for a generator or any other iterable without a length.

        Raises:
            ValueError: codes of the wrong shape, kind or range.
        """
        if isinstance(audio_codes, (Sequence, np.ndarray, torch.Tensor)) and not isinstance(audio_codes, str):
            if _depth(audio_codes) == 2:
                return super().__call__(as_clip(audio_codes), **kwargs)
            return super().__call__(list(audio_codes), **kwargs) if len(audio_codes) else []
        if isinstance(audio_codes, Dataset):
            return super().__call__(audio_codes, **kwargs)
        if isinstance(audio_codes, Iterable) and not isinstance(audio_codes, (str, dict)):
            return super().__call__((clip for clip in audio_codes), **kwargs)
        raise ValueError(f"`audio_codes` must be a clip or several, got {type(audio_codes).__name__}.")

    def stream(self, audio_codes: Any, latency: str = "exact", **settings) -> Iterator[np.ndarray]:
        """
        One clip's sound in chunks, as they become ready.

        Args:
            audio_codes: a clip as for a call, or an iterator over pieces of it, each `(num_codebooks, frames)`, as they come.
            latency: "exact": the chunks together are what a call gives, and begin when the clip is complete. "low_latency": they begin
                with its first frames, and differ a little.
            seed, num_steps, guidance (*optional*): as for a call.

        Returns:
            An iterator over float32 `(samples,)` arrays at `model.config.sampling_rate`.

        Raises:
            ValueError: an unknown `latency`, or codes that do not fit, as they come.
        """
        one = isinstance(audio_codes, (Sequence, np.ndarray, torch.Tensor))
        pieces = as_clip(audio_codes) if one else map(as_clip, audio_codes)
        chunks = self.model.stream_audio(pieces, latency=latency, **{**self._forward_params, **settings})
        return (chunk.cpu().numpy() for chunk in chunks)

    def _sanitize_parameters(self, seed=None, num_steps=None, guidance=None, num_codebooks=None):
        settings = {"seed": seed, "num_steps": num_steps, "guidance": guidance, "num_codebooks": num_codebooks}
        return {}, {name: value for name, value in settings.items() if value is not None}, {}

    def preprocess(self, clip: Any) -> dict[str, list[torch.Tensor]]:
        return {"audio_codes": [as_clip(clip)]}

    def _forward(self, inputs: dict[str, list[torch.Tensor]], **settings) -> dict[str, list[torch.Tensor]]:
        clips = inputs["audio_codes"]
        return {"audio": self.model.decode_audio(clips, batch_size=len(clips), **settings)}

    def postprocess(self, outputs: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
        return {"audio": outputs["audio"][0].float().numpy(), "sampling_rate": self.model.config.sampling_rate}

    def get_iterator(self, inputs, *args):
        def collate(items: list[dict]) -> dict[str, list[torch.Tensor]]:
            return {"audio_codes": [clip for item in items for clip in item["audio_codes"]]}

        return iterate_batches(self, collate, inputs, *args)


__all__ = ["FlowMatchingVocoderPipeline"]
