"""Waveforms of any rate, channel count, length and packaging -> chunks of Whisper-style log-mel features."""

import base64
import binascii
import io
import os
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import load_audio, mel_filter_bank
from transformers.utils import TensorType, is_soundfile_available


try:
    import soxr
except ImportError:  # only audio at another rate needs it
    soxr = None
if is_soundfile_available():
    import soundfile


_MAX_CHANNELS = 8
_MIN_RATE, _MAX_RATE = 1000, 768000
# A float waveform is in [-1, 1]; resampling and mixing may overshoot, integer samples given as floats do so by orders of magnitude.
_MAX_PEAK = 32.0


class BaichuanAudioFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel features as the released tokenizer expects them.

    Audio longer than `max_audio_seconds` is cut into consecutive chunks; a last piece shorter than `n_fft` samples is dropped, and so
    is one too short for a code frame (80 ms).

    Args:
        feature_size (`int`, defaults to 128): mel bins.
        sampling_rate (`int`, defaults to 16000): Hz; audio at other rates is resampled.
        hop_length (`int`, defaults to 160), n_fft (`int`, defaults to 400): analysis hop and window, in samples.
        max_audio_seconds (`int`, defaults to 30): longest chunk.
        stride_size (`int`, defaults to 2), downsample_factor (`int`, defaults to 4): of the tokenizer; they give the frame counts.
        padding_value (`float`, defaults to 0.0): of features past the end of a chunk.
    """

    model_input_names = ["input_features", "input_features_mask"]
    _auto_class = "AutoFeatureExtractor"  # saving copies the code file

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        hop_length: int = 160,
        n_fft: int = 400,
        max_audio_seconds: int = 30,
        stride_size: int = 2,
        downsample_factor: int = 4,
        padding_value: float = 0.0,
        **kwargs,
    ):
        # Chunks are independent; where prompts are padded is the tokenizer's business, and pipelines compare the two sides.
        kwargs.setdefault("padding_side", "left")
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.max_audio_seconds = max_audio_seconds
        self.stride_size = stride_size
        self.downsample_factor = downsample_factor
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=0.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ).astype(np.float32)

    @classmethod
    def settings_from_original(cls, audio_config: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments from the `audio_config` of an original `config.json`."""
        return {
            "feature_extractor_type": cls.__name__,
            "feature_size": audio_config["num_mel_bins"],
            "sampling_rate": audio_config["sampling_rate"],
            "hop_length": audio_config["hop_length"],
            "n_fft": audio_config["n_fft"],
            "max_audio_seconds": audio_config["max_audio_seconds"],
            "stride_size": audio_config["stride_size"],
            "downsample_factor": audio_config["avg_pooler"],
        }

    def num_frames(self, num_samples: int) -> int:
        """Code frames (12.5 Hz) of a chunk of `num_samples` samples at `sampling_rate`."""
        mel_frames = min(self.max_audio_seconds * self.sampling_rate // self.hop_length, num_samples // self.hop_length + 1)
        return ((mel_frames - 1) // self.stride_size + 1) // self.downsample_factor

    def read_audio(self, audio: Any, sampling_rate: int | None = None) -> np.ndarray:
        """
        One audio in any packaging -> mono float32 `(samples,)` at `self.sampling_rate`.

        Args:
            audio: an array, tensor or list of numbers (mono, or 2-D with channels on the shorter side); a path, URL or base64 string;
                encoded bytes or a binary file; `{"array": ..., "sampling_rate": ...}` or `{"bytes": ...}` / `{"path": ...}` as the
                `datasets` library has them.
            sampling_rate (`int`, *optional*): of raw samples, in Hz; `self.sampling_rate` by default. Files carry their own.

        Raises:
            ValueError: empty, not finite, of the wrong rank or type, unreadable, at an impossible rate.
        """
        if hasattr(audio, "get_all_samples"):  # the decoder object of datasets' Audio feature
            decoded = audio.get_all_samples()
            audio = {"array": decoded.data, "sampling_rate": int(decoded.sample_rate)}
        if isinstance(audio, dict):
            samples, rate = self._read_dict(audio, sampling_rate)
        elif isinstance(audio, (str, os.PathLike, bytes, bytearray)) or hasattr(audio, "read"):
            samples, rate = self._read_file(audio)
        else:
            samples, rate = audio, self.sampling_rate if sampling_rate is None else sampling_rate
        return self._resample(self._to_mono(samples), self._checked_rate(rate), self.sampling_rate)

    def _read_dict(self, audio: dict, sampling_rate: int | None) -> tuple[Any, Any]:
        if audio.get("array") is not None:
            given = [rate for rate in (audio.get("sampling_rate"), sampling_rate) if rate is not None]
            if len(given) == 2 and given[0] != given[1]:
                raise ValueError(f"`sampling_rate` says {given[1]} Hz but the audio's own entry says {given[0]} Hz.")
            return audio["array"], given[0] if given else self.sampling_rate
        source = audio.get("bytes") or audio.get("path")
        if not source:
            raise ValueError(f'An audio dict needs "array", "bytes" or "path", got the keys {sorted(map(str, audio))}.')
        return self._read_file(source)

    def _read_file(self, source: Any) -> tuple[np.ndarray, int]:
        if not is_soundfile_available():
            raise ValueError("Reading audio files needs the `soundfile` package: pip install soundfile.")
        name = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else str(source)
        if len(name) > 100:
            name = name[:80] + "..."
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            return load_audio(source, sampling_rate=self.sampling_rate), self.sampling_rate
        elif isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
            try:
                encoded = str(source).split(";base64,")[-1]
                source = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                source = b""
            if not source:
                raise ValueError(f"Audio {name} is no file, URL or base64 string.")
        if isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        try:
            return soundfile.read(source, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise ValueError(f"Audio {name} cannot be decoded: {error}") from error

    @staticmethod
    def _checked_rate(rate: Any) -> int:
        is_number = isinstance(rate, (int, float, np.integer, np.floating)) and not isinstance(rate, bool)
        if not is_number or not _MIN_RATE <= rate <= _MAX_RATE:
            raise ValueError(f"`sampling_rate` must be a number of Hz from {_MIN_RATE} to {_MAX_RATE}, got {rate!r}.")
        if int(rate) != rate:
            raise ValueError(f"`sampling_rate` must be a whole number of Hz, got {rate!r}.")
        return int(rate)

    @staticmethod
    def _to_mono(samples: Any) -> np.ndarray:
        if isinstance(samples, torch.Tensor):
            samples = samples.detach().cpu().float().numpy() if samples.is_floating_point() else samples.cpu().numpy()
        try:
            samples = np.asarray(samples)
        except ValueError as error:
            raise ValueError("Audio must be a regular array of numbers; its rows have different lengths.") from error
        if samples.dtype.kind not in "fi" or samples.dtype == np.int8:
            raise ValueError(f"Audio must be float or 16- or 32-bit integer samples, got {samples.dtype}.")
        if samples.ndim not in (1, 2):
            raise ValueError(f"Audio must be (samples,) or (channels, samples), got shape {samples.shape}.")
        if samples.size == 0:
            raise ValueError(f"Audio is empty (shape {samples.shape}).")
        if samples.dtype.kind == "i":
            if samples.dtype.itemsize > 4:  # plain Python integers
                if samples.max() > 32767 or samples.min() < -32768:
                    raise ValueError("Integer audio must be 16-bit samples; give 32-bit samples as an int32 array.")
                samples = samples.astype(np.int16) if np.abs(samples).max() > 1 else samples.astype(np.float32)
            if samples.dtype.kind == "i":
                samples = samples / np.float32(-np.iinfo(samples.dtype).min)
        samples = samples.astype(np.float32)
        if samples.ndim == 2:
            channels = min(samples.shape)
            if channels > _MAX_CHANNELS:
                raise ValueError(
                    f"Audio of shape {samples.shape} would have {channels} channels, {_MAX_CHANNELS} is the most. "
                    "Give several recordings as a list."
                )
            samples = samples.mean(axis=0 if samples.shape[0] <= samples.shape[1] else 1)
        if not np.isfinite(samples).all():
            raise ValueError("Audio holds NaN or infinite samples.")
        peak = float(np.abs(samples).max())
        if peak > _MAX_PEAK:
            raise ValueError(f"Float audio must lie in [-1, 1], got a peak of {peak:.6g}; give integer samples as int16.")
        return samples

    @staticmethod
    def _resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
        if rate != target:
            if soxr is None:
                raise ValueError(f"Audio at {rate} Hz needs the `soxr` package to be resampled: pip install soxr.")
            samples = soxr.resample(samples, rate, target, quality="HQ").astype(np.float32)
            if not len(samples):
                raise ValueError(f"Audio is empty once resampled from {rate} to {target} Hz.")
        return samples

    def at_rate(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """What `read_audio` returned, resampled to another rate."""
        return self._resample(samples, self.sampling_rate, rate)

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> Any:
        """Reads one audio, or each of a list of them; see `read_audio`. Arrays are returned at `self.sampling_rate`."""
        if self._is_one_audio(audio):
            return self.read_audio(audio, sampling_rate)
        return [self.fetch_audio(item, sampling_rate) for item in audio]

    @staticmethod
    def _is_one_audio(audio: Any) -> bool:
        if not isinstance(audio, (list, tuple)):
            return True
        return len(audio) == 0 or isinstance(audio[0], (int, float, np.number))

    def chunks(self, samples: np.ndarray) -> list[np.ndarray]:
        """Cuts a mono waveform into the pieces that are encoded one by one.

        Raises:
            ValueError: shorter than one code frame.
        """
        size = self.max_audio_seconds * self.sampling_rate
        pieces = [samples[start : start + size] for start in range(0, len(samples), size)]
        kept = [piece for piece in pieces if len(piece) >= self.n_fft and self.num_frames(len(piece)) > 0]
        if not kept:
            shortest = ((self.downsample_factor - 1) * self.stride_size) * self.hop_length
            raise ValueError(
                f"Audio of {len(samples)} samples at {self.sampling_rate} Hz is shorter than one code frame "
                f"({max(shortest, self.n_fft)} samples)."
            )
        return kept

    def log_mel(self, samples: np.ndarray) -> torch.Tensor:
        """One chunk, `(samples,)` -> `(feature_size, mel_frames)` float32 (Whisper's features, arXiv 2212.04356)."""
        longest = self.max_audio_seconds * self.sampling_rate
        frames = min(longest // self.hop_length, len(samples) // self.hop_length + 1)
        # The chunk counts as padded with zeros to its full length; silence further off than a window changes nothing that is kept.
        padded = torch.zeros(min(longest, len(samples) + 2 * self.n_fft), dtype=torch.float32)
        padded[: len(samples)] = torch.from_numpy(np.ascontiguousarray(samples))
        window = torch.hann_window(self.n_fft)
        spectrum = torch.stft(padded, self.n_fft, self.hop_length, window=window, center=True, return_complex=True)
        power = spectrum[:, :-1].abs().square()
        mel = (torch.from_numpy(self.mel_filters).T @ power).clamp(min=1e-10).log10()
        mel = mel.maximum(mel.max() - 8.0)
        return ((mel + 4.0) / 4.0)[:, :frames]

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one audio or a list of them, in any packaging that `read_audio` takes.
            sampling_rate (`int`, *optional*): of raw samples, in Hz.
            return_tensors (`"pt"` or `"np"`, *optional*).

        Returns:
            `input_features` (`(chunks, feature_size, mel_frames)`, float32): all chunks of all audios in order, padded on the right;
            `input_features_mask` (`(chunks, mel_frames)`, int64); `num_frames` (`list` of `int`): code frames of each audio.

        Raises:
            ValueError: as in `read_audio`, or an audio shorter than one code frame.
        """
        audios = [raw_speech] if self._is_one_audio(raw_speech) else list(raw_speech)
        features, num_frames = [], []
        for audio in audios:
            pieces = self.chunks(self.read_audio(audio, sampling_rate))
            features += [self.log_mel(piece) for piece in pieces]
            num_frames.append(sum(self.num_frames(len(piece)) for piece in pieces))
        lengths = torch.tensor([part.shape[1] for part in features])
        padded = torch.nn.utils.rnn.pad_sequence(
            [part.T for part in features], batch_first=True, padding_value=self.padding_value
        ).transpose(1, 2)
        mask = (torch.arange(padded.shape[2]) < lengths[:, None]).long()
        data = {"input_features": padded.contiguous().numpy(), "input_features_mask": mask.numpy()}
        batch = BatchFeature(data, tensor_type=return_tensors)
        batch["num_frames"] = num_frames
        return batch


__all__ = ["BaichuanAudioFeatureExtractor"]
