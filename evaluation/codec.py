"""Resynthesis: recording -> codes -> mel -> recording, by every way there is, with the mels' errors."""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling_common import pad_codes
from ..training.flow_training import flow_target
from ..training.mel_targets import tokenizer_mel_targets
from ..training.own_mels import as_vocoder_mel
from .clips import TestClip
from .scores import mel_error
from .subject import Subject


MEL_DECODER, VOCODER = "mel-decoder", "vocoder"


def flow_task(codebooks: int) -> str:
    """Name of the outputs that flow matching makes of the first `codebooks` codebooks."""
    return f"flow-matching-{codebooks}"


class Codec:
    """
    Resynthesis by the parts of a checkpoint.

    Args:
        subject: the checkpoint.

    Raises:
        ValueError: it has no vocoder.
    """

    def __init__(self, subject: Subject):
        self.subject, self.model, self.outputs = subject, subject.model, subject.outputs
        self.config, self.vocoder = subject.model.config, subject.model.require_vocoder()
        self.extractor = subject.processor.feature_extractor
        rate = self.config.flow_matching_config.sampling_rate
        self.wide_extractor = type(self.extractor)(sampling_rate=rate)  # reads at the rate of the vocoder's mel

    def encode(self, clips: list[TestClip]) -> list[torch.Tensor]:
        """
        Codes `(num_codebooks, frames)` int64 of each clip.

        Raises:
            ValueError: a clip longer than one chunk.
        """

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            features = self.extractor([str(clip.path) for clip in batch], return_tensors="pt")
            if len(features["input_features"]) != len(batch):
                raise ValueError(f"Clips of at most {self.extractor.max_audio_seconds} s can be evaluated.")
            codes = self.model.get_audio_codes(features["input_features"], features["input_features_mask"])
            return [{"id": clip.id, "codes": row[:, row[0] >= 0].tolist()} for clip, row in zip(batch, codes)]

        items = self.outputs.complete("codes", clips, self.subject.batch_size, step)
        return [torch.tensor(item["codes"]) for item in items]

    def targets(self, clip: TestClip, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a recording of `frames` code frames: the mel decoder's target (62.5 Hz), the vocoder's mel (50 Hz)."""
        samples = self.extractor.read_audio(clip.path)
        refined = tokenizer_mel_targets([samples], self.config.audio_tokenizer_config)["mel_labels"][0]
        wide = torch.from_numpy(self.wide_extractor.read_audio(clip.path))
        return refined, flow_target(wide, frames, self.config.flow_matching_config)

    def _decode(self, batch: list[TestClip], codebooks: int | None) -> tuple[Any, list[int]]:
        codes = self.encode(batch)
        return self.model.audio_tokenizer.decode(pad_codes(codes), codebooks), [row.shape[1] for row in codes]

    def _sound(self, task: str, batch: list[TestClip], mels: torch.Tensor, lengths: torch.Tensor) -> None:
        sound = self.vocoder(mels, lengths, seed=self.subject.seeds(batch))
        for clip, wave, length in zip(batch, sound.waveform, sound.waveform_lengths.tolist()):
            self.outputs.save_wav(task, clip.id, wave[:length].numpy(), self.config.sampling_rate)

    @torch.no_grad()
    def flow_matching(self, clips: list[TestClip], codebooks: int) -> list[dict[str, Any]]:
        """
        From the first `codebooks` codebooks through flow matching and the vocoder.

        Returns:
            Of each clip (error, frames) of three mels: the mel decoder's `refined`, the pre-net's `prior` (mu), the solver's `flow`.
        """

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            decoded, frames = self._decode(batch, codebooks)
            lengths = decoded.hidden_lengths
            flow = self.model.flow_matching(decoded.hidden_states, lengths, seed=self.subject.seeds(batch))
            self._sound(flow_task(codebooks), batch, flow.mel, lengths)
            items = []
            for row, clip in enumerate(batch):
                refined, wide = self.targets(clip, frames[row])
                mel = decoded.refined_mel[row, : int(decoded.mel_lengths[row])]
                items.append(
                    {
                        "id": clip.id,
                        "refined": mel_error(mel, refined),
                        "prior": mel_error(flow.condition[row, : int(lengths[row])], wide),
                        "flow": mel_error(flow.mel[row, : int(lengths[row])], wide),
                    }
                )
            return items

        return self.outputs.complete(flow_task(codebooks), clips, self.subject.batch_size, step)

    @torch.no_grad()
    def mel_decoder(self, clips: list[TestClip]) -> list[dict[str, Any]]:
        """From all codebooks through the mel decoder and the vocoder; see `as_vocoder_mel`."""

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            decoded, _ = self._decode(batch, None)
            lengths, parts = decoded.hidden_lengths, (self.config.audio_tokenizer_config, self.config.flow_matching_config)
            rows = zip(decoded.refined_mel, decoded.mel_lengths.tolist(), lengths.tolist())
            mels = [as_vocoder_mel(mel[:valid], frames, *parts) for mel, valid, frames in rows]
            self._sound(MEL_DECODER, batch, pad_sequence(mels, batch_first=True), lengths)
            return [{"id": clip.id} for clip in batch]

        return self.outputs.complete(MEL_DECODER, clips, self.subject.batch_size, step)

    @torch.no_grad()
    def vocoder_alone(self, clips: list[TestClip]) -> list[dict[str, Any]]:
        """From the recording's own mel through the vocoder: what no mel can better."""

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            mels = [self.targets(clip, row.shape[1])[1] for clip, row in zip(batch, self.encode(batch))]
            lengths = torch.tensor([len(mel) for mel in mels])
            self._sound(VOCODER, batch, pad_sequence(mels, batch_first=True), lengths)
            return [{"id": clip.id} for clip in batch]

        return self.outputs.complete(VOCODER, clips, self.subject.batch_size, step)

    def mel_floor(self, clips: list[TestClip], noise: list[TestClip]) -> dict[str, list[tuple[float, int]]]:
        """(error, frames) of the mels of noise, on the mel decoder's scale (`refined`) and on the vocoder's (`flow`)."""
        errors: dict[str, list[tuple[float, int]]] = {"refined": [], "flow": []}
        for clip, twin, codes in zip(clips, noise, self.encode(clips)):
            pairs = zip(errors.values(), self.targets(clip, codes.shape[1]), self.targets(twin, codes.shape[1]))
            for found, real, other in pairs:
                found.append(mel_error(other, real))
        return errors
