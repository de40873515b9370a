"""Waveforms -> code frames with a frozen speech tokenizer, in batches of chunks of similar length."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..modeling_common import pad_codes
from .rows import Row


class AudioCodeEncoder:
    """
    Tokenises audio on the fly.

    Args:
        tokenizer_model ([`BaichuanAudioTokenizerModel`]): on any device; it is put into evaluation mode at every call, as its codes
            must not depend on whether the model around it trains.
        feature_extractor ([`BaichuanAudioFeatureExtractor`]).
        batch_size (`int`, defaults to 8): chunks (at most 30 s each) encoded at once. A clip's codes do not depend on its batch.
    """

    def __init__(self, tokenizer_model, feature_extractor, batch_size: int = 8):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.tokenizer_model, self.feature_extractor, self.batch_size = tokenizer_model, feature_extractor, batch_size

    @torch.no_grad()
    def __call__(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """
        Float32 `(samples,)` waveforms at 16 kHz -> int64 `(num_codebooks, frames)` each.

        Raises:
            ValueError: a waveform shorter than one code frame, or a CUDA model inside a data-loader worker.
        """
        device = self.tokenizer_model.device
        if waveforms and device.type == "cuda" and get_worker_info() is not None:
            raise ValueError(
                "Audio is tokenised on the GPU by the main process: use 0 data-loader workers, or tokenise the data beforehand."
            )
        self.tokenizer_model.eval()
        pieces = [self.feature_extractor.chunks(waveform) for waveform in waveforms]
        places = [(clip, part) for clip, parts in enumerate(pieces) for part in range(len(parts))]
        places.sort(key=lambda place: -len(pieces[place[0]][place[1]]))
        codes: dict[tuple[int, int], np.ndarray] = {}
        for start in range(0, len(places), self.batch_size):
            batch = places[start : start + self.batch_size]
            mels = [self.feature_extractor.log_mel(pieces[clip][part]) for clip, part in batch]
            lengths = torch.tensor([mel.shape[1] for mel in mels])
            features = torch.nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2)
            mask = torch.arange(features.shape[2]) < lengths[:, None]
            encoded = self.tokenizer_model.encode(features.to(device), mask.to(device))
            counts = encoded.audio_codes_mask.sum(-1).tolist()
            for place, frames, count in zip(batch, encoded.audio_codes.cpu().numpy(), counts):
                codes[place] = frames[:, :count]
        return [
            np.concatenate([codes[clip, part] for part in range(len(parts))], axis=1).astype(np.int64)
            for clip, parts in enumerate(pieces)
        ]

    def encode_rows(self, rows: list[Row]) -> list[list[np.ndarray]]:
        """The codes of every audio segment of every row, in order; waveforms are encoded, codes taken as they are."""
        segments = [list(row.audio_segments()) for row in rows]
        encoded = iter(self([part.waveform for row in segments for part in row if part.codes is None]))
        return [[next(encoded) if part.codes is None else part.codes for part in row] for row in segments]


def clip_key(waveform: np.ndarray) -> bytes:
    """What a clip is remembered by: a digest of its samples."""
    return hashlib.blake2b(np.ascontiguousarray(waveform), digest_size=16).digest()


class RememberedCodes:
    """
    Codes of clips that come again every epoch: each is encoded once. An hour of speech takes 1.4 MB of memory.

    Args:
        encode: waveforms -> codes, `(num_codebooks, frames)` each, always the same for the same waveform.
    """

    def __init__(self, encode: Callable[[list[np.ndarray]], list[np.ndarray]]):
        self.encode = encode
        self._codes: dict[bytes, np.ndarray] = {}

    def __call__(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """Waveforms `(samples,)` -> `(batch, num_codebooks, longest)` int64, -1 past the end of a clip."""
        keys = [clip_key(waveform) for waveform in waveforms]
        new = {key: waveform for key, waveform in zip(keys, waveforms) if key not in self._codes}
        for key, codes in zip(new, self.encode(list(new.values())) if new else ()):
            self._codes[key] = codes.astype(np.int32)
        return pad_codes([torch.from_numpy(self._codes[key]).long() for key in keys])
