"""The vocoder's mel as the model itself makes it from a clip's codes, for vocoders that are to bear the model's mistakes."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from ..configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig, BaichuanAudioTokenizerConfig
from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from .audio_codes import clip_key


def as_vocoder_mel(
    mel: torch.Tensor, frames: int, source: BaichuanAudioTokenizerConfig, target: BaichuanAudioFlowMatchingConfig
) -> torch.Tensor:
    """
    The mel decoder's mel as the vocoder reads one, without a weight in between.

    Both have 80 slaney bands from 0 to 8 kHz. What differs is undone in closed form: Whisper's compression and base of the logarithm,
    power and magnitude, area of the filters, gain of the windows (halfway between a tone's and that of noise), and the time of the
    frames (linear interpolation). What is left differs from the vocoder's own mel of the same speech by about 1.4 dB.

    Args:
        mel (`(mel_frames, num_mel_bins)`): log10 power at 62.5 Hz, scaled as the input features are.
        frames: at 50 Hz.

    Returns:
        `(frames, num_mel_bins)` float32 on the mel's device, natural log of magnitudes.
    """
    windows = [torch.hann_window(size) for size in (4 * target.hop_length, source.refine_n_fft)]
    tone = math.log(windows[0].sum() / windows[1].sum())
    noise = math.log(windows[0].square().sum() / windows[1].square().sum()) / 2
    areas = []
    for n_fft, rate in ((4 * target.hop_length, target.sampling_rate), (source.refine_n_fft, source.refine_sampling_rate)):
        limits = {"min_frequency": 0.0, "max_frequency": source.refine_sampling_rate / 2, "sampling_rate": rate}
        filters = mel_filter_bank(n_fft // 2 + 1, target.num_mel_bins, **limits, norm="slaney", mel_scale="slaney")
        areas.append(torch.from_numpy(filters.sum(0)).float().log())
    shift = (areas[0] - 0.5 * areas[1] + (tone + noise) / 2).to(mel.device)
    magnitude = 0.5 * math.log(10) * (4 * mel.float() - 4) + shift
    seconds = (torch.arange(frames, device=mel.device) + 0.5) * target.hop_length / target.sampling_rate
    places = (seconds * source.refine_sampling_rate / source.refine_hop_length).clamp(max=len(mel) - 1)
    before = places.long()
    share = (places - before)[:, None]
    after = (before + 1).clamp(max=len(mel) - 1)
    return (magnitude[before] * (1 - share) + magnitude[after] * share).clamp(min=math.log(1e-5))


class OwnMels:
    """
    Mels that the model makes of clips, by both of its ways: through the mel decoder alone, and through flow matching. Each is made
    once and kept, in float16: 29 MB for an hour of speech, each.

    Args:
        model: with a trained tokenizer and flow matching, on any device; both are put into evaluation mode.
        codes: waveforms at the vocoder's rate -> `(batch, num_codebooks, frames)` int64, -1 past the end of a clip.
    """

    WAYS = ("mel_decoder", "flow_matching")

    def __init__(self, model: BaichuanAudioForCausalLM, codes: Callable[[list[np.ndarray]], torch.Tensor]):
        self.model, self.codes = model, codes
        self._known: dict[tuple[bytes, str], torch.Tensor] = {}

    def __call__(self, waveforms: Sequence[np.ndarray], ways: Sequence[str]) -> list[torch.Tensor]:
        """Clips `(samples,)` and the way for each, of `WAYS` -> `(4 * code frames - 1, num_mel_bins)` float32 on the CPU each."""
        keys = [(clip_key(waveform), way) for waveform, way in zip(waveforms, ways)]
        for way in self.WAYS:
            new = {key: clip for key, clip in zip(keys, waveforms) if key[1] == way and key not in self._known}
            if new:
                seeds = [int.from_bytes(digest[:4], "little") for digest, _ in new]
                for key, mel in zip(new, self._make(list(new.values()), way, seeds)):
                    self._known[key] = mel.half().cpu()
        return [self._known[key].float() for key in keys]

    @torch.no_grad()
    def _make(self, waveforms: list[np.ndarray], way: str, seeds: list[int]) -> list[torch.Tensor]:
        tokenizer, flow = self.model.audio_tokenizer.eval(), self.model.flow_matching.eval()
        decoded = tokenizer.decode(self.codes(waveforms).to(self.model.device))
        lengths = decoded.hidden_lengths.tolist()
        if way == "flow_matching":
            mels = flow(decoded.hidden_states, decoded.hidden_lengths, seed=seeds).mel
            return [mel[:length] for mel, length in zip(mels, lengths)]
        rows = zip(decoded.refined_mel, decoded.mel_lengths.tolist(), lengths)
        return [as_vocoder_mel(mel[:valid], length, tokenizer.config, flow.config) for mel, valid, length in rows]


__all__ = ["OwnMels", "as_vocoder_mel"]
