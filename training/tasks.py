"""What each stage trains on: batches from rows, the module that trains, its targets' counts, the losses to log, audio to listen to."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from .audio_codes import AudioCodeEncoder, RememberedCodes
from .augmentation import at_another_speed, through_a_room
from .collators import SpeechCollator
from .flow_training import MEL_FRAMES_PER_CODE, flow_targets
from .layouts import LayoutBuilder, TokenIds
from .mel_decoder_training import MelAndFlowForTraining, MelDecoderForTraining
from .mel_targets import tokenizer_mel_targets
from .own_mels import OwnMels
from .pitch import PitchTracks
from .recipe import LLM_STAGES, Recipe
from .rows import AudioReader, Row
from .tokenizer_training import CTCTextLoss, FrozenLLMTextLoss, ReplacementSchedule, TokenizerForTraining, count_code_frames
from .vocoder_training import VocoderTrainingModule, part_at_another_speed, vocoder_segments


class Task:
    """
    One stage's side of the trainer.

    Args:
        model: the whole model; the task trains a part of it in place. processor: its processor. recipe: the recipe.

    Attributes:
        module (`nn.Module`): what the trainer wraps, optimises and checkpoints. step (`int`): optimiser steps done so far.

    Raises:
        ValueError: loss options that the stage does not have, or audio samples that the checkpoint cannot make.
    """

    loss_options: tuple[str, ...] = ()
    # Rates other than the tokenizer's 16 kHz are for targets above its band.
    sampling_rate: int | None = None

    def __init__(self, model: BaichuanAudioForCausalLM, processor: BaichuanAudioProcessor, recipe: Recipe):
        unknown = [name for name in recipe.loss if name not in self.loss_options]
        if unknown:
            raise ValueError(
                f"Stage {recipe.stage} has the loss options {', '.join(self.loss_options) or 'none'}, got {', '.join(unknown)}."
            )
        if recipe.samples.every and model.vocoder is None:
            raise ValueError("`samples.every` asks for audio while training, but the checkpoint has no vocoder.")
        self.model, self.processor, self.recipe = model, processor, recipe
        self.options: dict[str, Any] = dict(recipe.loss)
        self.step = 0
        self.module: nn.Module = model
        self.builder = LayoutBuilder(
            processor.tokenizer, TokenIds.from_tokenizer(processor.tokenizer), model.config.audio_tokenizer_config.codebook_sizes
        )

    def _number(self, name: str, least: float, most: float) -> float | None:
        """A loss option that is a number above `least` and at most `most`, or was not given."""
        value = self.options.get(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and least < value <= most):
            return value
        raise ValueError(f"`loss.{name}` must be a number above {least} and at most {most}, got {value!r}.")

    def _remembered_codes(self) -> RememberedCodes:
        """Codes of clips at the task's rate, which are encoded the first time they come."""
        encoder = AudioCodeEncoder(self.model.audio_tokenizer, self.processor.feature_extractor)
        return RememberedCodes(lambda clips: encoder([self._at_tokenizer_rate(clip) for clip in clips]))

    def to(self, device: torch.device) -> None:
        """Moves the model, frozen parts included, to where the trained one will be."""
        self.model.to(device)

    def reader(self) -> AudioReader:
        """Reads the rows' audio at the rate the task needs."""
        return AudioReader(self.extractor, self.model.config.audio_tokenizer_config.codebook_sizes)

    @cached_property
    def extractor(self) -> BaichuanAudioFeatureExtractor:
        ours = self.processor.feature_extractor
        if self.sampling_rate is None:
            return ours
        scale = self.sampling_rate / ours.sampling_rate  # the same windows in seconds, so that frame counts agree
        settings = {
            name: getattr(ours, name) for name in ("feature_size", "max_audio_seconds", "stride_size", "downsample_factor")
        }
        return BaichuanAudioFeatureExtractor(
            sampling_rate=self.sampling_rate,
            hop_length=round(ours.hop_length * scale),
            n_fft=round(ours.n_fft * scale),
            **settings,
        )

    def collate(self, rows: list[Row]) -> dict[str, Any]:
        """A batch; what comes first in it has as many rows as the batch, for that is where the trainer's evaluation counts them."""
        raise NotImplementedError

    def count_targets(self, batch: dict[str, Any]) -> torch.Tensor:
        """Targets of a batch, by kind: `(kinds,)`."""
        raise NotImplementedError

    def model_inputs(self, batch: dict[str, Any], counts: torch.Tensor | None) -> dict[str, Any]:
        """The module's arguments. `counts` are `count_targets` summed over the accumulation window, or None in evaluation."""
        raise NotImplementedError

    def loss(self, outputs: dict[str, Any]) -> torch.Tensor:
        return outputs["loss"]

    def metrics(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Every scalar of the outputs that is a loss of its own or describes one."""
        return {
            name: value.detach()
            for name, value in outputs.items()
            if name != "loss" and isinstance(value, torch.Tensor) and value.dim() == 0
        }

    def averages(self, outputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Scalars to log that describe each micro-batch on its own."""
        return {}

    def write_samples(self, prefix: Path, rows: list[Row]) -> None:
        """Writes `prefix`-0.wav, ... : resynthesised clips of the given rows."""
        encoder = AudioCodeEncoder(self.model.audio_tokenizer, self.processor.feature_extractor)
        clips = [self._at_tokenizer_rate(chunk) for chunk in self._chunks(rows)[: self.recipe.samples.clips]]
        was_training = self.model.training
        self.model.eval()
        waveforms = self.model.decode_audio([torch.from_numpy(codes) for codes in encoder(clips)], seed=self.recipe.seed)
        self.model.train(was_training)
        self._save(prefix, waveforms)

    def _save(self, prefix: Path, waveforms: list[torch.Tensor]) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for number, waveform in enumerate(waveforms):
            if waveform.numel():
                path = prefix.with_name(f"{prefix.name}-{number}.wav")
                self.processor.save_audio(waveform, path, sampling_rate=self.model.config.sampling_rate)

    def _chunks(self, rows: list[Row]) -> list[np.ndarray]:
        """Every waveform of the rows, in the chunks that are encoded one by one."""
        extractor = self.extractor
        return [chunk for row in rows for part in row.audio_segments() for chunk in extractor.chunks(part.waveform)]

    def _at_tokenizer_rate(self, chunk: np.ndarray) -> np.ndarray:
        return self.extractor.at_rate(chunk, self.processor.feature_extractor.sampling_rate)

    def _features(self, chunks: list[np.ndarray]) -> dict[str, torch.Tensor]:
        features = self.processor.feature_extractor(chunks, return_tensors="pt")
        return {name: features[name] for name in ("input_features", "input_features_mask")}


class LanguageTask(Task):
    """Stages 1 and 2, fine-tuning and LoRA: text and audio targets of the LLM and its audio head."""

    loss_options = ("audio_frames",)

    def __init__(self, model, processor, recipe, module: nn.Module | None = None, sharded: bool = False):
        super().__init__(model, processor, recipe)
        if recipe.samples.every and not recipe.samples.texts:
            raise ValueError("`samples.every` needs `samples.texts` to speak.")
        self.module = model if module is None else module
        # Sharding takes the weights apart outside of the model's own forward pass: batches then need a tokenizer of their own.
        self.tokenizer = copy.deepcopy(model.audio_tokenizer) if sharded else model.audio_tokenizer
        self.collate = SpeechCollator(
            self.builder,
            pad_token_id=processor.tokenizer.pad_token_id,
            encoder=AudioCodeEncoder(self.tokenizer, processor.feature_extractor),
            pack_tokens=recipe.data.max_tokens if recipe.data.pack else None,
        )

    def to(self, device):
        super().to(device)
        self.tokenizer.to(device)

    def count_targets(self, batch):
        text = (batch["labels"][:, 1:] != -100).sum()
        return torch.cat([text[None], (batch["audio_labels"][:, :, 1:] != -100).sum((0, 2))])

    def model_inputs(self, batch, counts):
        inputs = {**batch, "audio_loss_frames": self.options.get("audio_frames")}
        if counts is not None:
            inputs |= {"num_items_in_batch": counts[0].clamp(min=1), "num_audio_items_in_batch": counts[1:]}
        return inputs

    def metrics(self, outputs):
        codebooks = {f"codebook_{i}_loss": value for i, value in enumerate(outputs["codebook_losses"])}
        return super().metrics(outputs) | codebooks

    def write_samples(self, prefix, rows):
        was_training = self.model.training
        self.model.eval()
        inputs = self.processor.apply_tts_request(self.recipe.samples.texts).to(self.model.device)
        reply = self.model.generate(**inputs, generation_mode="audio", seed=self.recipe.seed, max_audio_frames=125)
        self.model.train(was_training)
        self._save(prefix, reply.audio)


class TokenizerTask(Task):
    """
    Encoder, quantiser and mel decoder: reconstruction, commitment and, with `text_llm` or `text_ctc`, a text loss. `speed` makes other
    voices of the clips; a share `rooms` of them is heard through another room and microphone, while targets stay the clean clips'.
    """

    loss_options = ("ramp_steps", "start_share", "end_share", "commitment_weight", "text_llm", "text_ctc", "speed", "rooms")

    def __init__(self, model, processor, recipe):
        super().__init__(model, processor, recipe)
        text_loss, options = None, self.options
        if options.get("text_ctc"):
            if options["text_ctc"] is not True or options.get("text_llm"):
                raise ValueError("`loss.text_ctc` must be true or false, and stands in for `loss.text_llm`.")
            size, blank = model.config.audio_tokenizer_config.quantizer_size, self.builder.tokens.end_of_text
            text_loss = CTCTextLoss(size, len(processor.tokenizer), blank)
        elif options.get("text_llm"):
            llm = AutoModelForCausalLM.from_pretrained(options["text_llm"])
            text_loss = FrozenLLMTextLoss(llm, model.config.audio_tokenizer_config.quantizer_size)
        schedule = ReplacementSchedule(
            **{"ramp_steps": 1000} | {name: options[name] for name in self.loss_options[:4] if name in options}
        )
        self.speed, self.rooms = self._number("speed", 1, 2), self._number("rooms", 0, 1)
        self.module = TokenizerForTraining(model.audio_tokenizer, schedule, text_loss)

    def collate(self, rows):
        chunks, rate = self._chunks(rows), self.extractor.sampling_rate
        if self.speed is not None:
            changed = [at_another_speed(chunk, rate, self.speed) for chunk in chunks]
            sizes = range(self.extractor.n_fft, self.extractor.max_audio_seconds * rate + 1)
            usable = [len(new) in sizes and self.extractor.num_frames(len(new)) > 0 for new in changed]
            chunks = [new if fits else old for old, new, fits in zip(chunks, changed, usable)]
        heard = chunks
        if self.rooms is not None:
            draws = torch.rand(len(chunks)).tolist()
            heard = [through_a_room(chunk, rate) if draw < self.rooms else chunk for chunk, draw in zip(chunks, draws)]
        batch = self._features(heard) | tokenizer_mel_targets(chunks, self.model.config.audio_tokenizer_config)
        if self.module.text_loss is not None:
            batch["text_labels"] = self._text_labels(rows)
        return batch

    def _text_labels(self, rows: list[Row]) -> torch.Tensor:
        """The transcript beside every chunk. A recording of several chunks has none of its own for each, so it is refused."""
        labels = []
        for row in rows:
            texts = [part.text for part in row.segments if part.is_text]
            if len(texts) != 1 or len(self._chunks([row])) != 1:
                raise ValueError(
                    f"The text loss needs rows of one audio of one chunk and one text, got a row of the task {row.task}."
                )
            ids = self.processor.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
            labels.append(torch.tensor([*ids, self.builder.tokens.end_of_text]))
        return nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)

    def averages(self, outputs):
        return {
            f"codebook_{index}_{name}": value for name in ("perplexity", "usage") for index, value in enumerate(outputs[name])
        }

    def count_targets(self, batch):
        return count_code_frames(batch["input_features_mask"], self.model.audio_tokenizer)[None]

    def model_inputs(self, batch, counts):
        return {**batch, "step": self.step, "num_items_in_batch": None if counts is None else counts[0]}


class _FixedCodesTask(Task):
    """A part that learns from codes, everything before it frozen. Clips are encoded the first time they come."""

    def __init__(self, model, processor, recipe):
        super().__init__(model, processor, recipe)
        self._codes = self._remembered_codes()

    def _audio_codes(self, batch: dict[str, Any]) -> torch.Tensor:
        # Here and not in `collate`, which may run where the model is not. Clips are arrays, which the trainer leaves on the CPU.
        return self._codes(batch["clips"]).to(self.model.device)


class MelDecoderTask(_FixedCodesTask):
    """The mel decoder alone: codes -> both mels."""

    def __init__(self, model, processor, recipe):
        super().__init__(model, processor, recipe)
        self.module = MelDecoderForTraining(model.audio_tokenizer)

    def collate(self, rows):
        chunks, config = self._chunks(rows), self.model.config.audio_tokenizer_config
        frames = torch.tensor([self.extractor.num_frames(len(chunk)) for chunk in chunks])
        return tokenizer_mel_targets(chunks, config) | {"frames": frames, "clips": chunks}

    def count_targets(self, batch):
        return batch["frames"].sum()[None]

    def model_inputs(self, batch, counts):
        return {
            "audio_codes": self._audio_codes(batch),
            "codebooks": self.module.draw_codebooks(len(batch["clips"])).to(batch["frames"].device),
            "coarse_labels": batch["coarse_labels"],
            "mel_labels": batch["mel_labels"],
            "num_items_in_batch": None if counts is None else counts[0],
        }


class FlowMatchingTask(_FixedCodesTask):
    """Flow matching: the mel decoder's states of the codes -> the 24 kHz log-mel."""

    def __init__(self, model, processor, recipe):
        self.sampling_rate = model.config.flow_matching_config.sampling_rate
        super().__init__(model, processor, recipe)
        self.module = model.flow_matching

    def collate(self, rows):
        chunks = self._chunks(rows)
        frames = [self.extractor.num_frames(len(chunk)) for chunk in chunks]
        waveforms = [torch.from_numpy(chunk) for chunk in chunks]
        labels, lengths = flow_targets(waveforms, frames, self.model.config.flow_matching_config)
        return {"labels": labels, "lengths": lengths, "clips": chunks}

    def count_targets(self, batch):
        return batch["lengths"].sum()[None]

    @torch.no_grad()
    def model_inputs(self, batch, counts):
        decoded = self.model.audio_tokenizer.eval().decode(self._audio_codes(batch))
        return {
            "hidden_states": decoded.hidden_states,
            "lengths": decoded.hidden_lengths,
            "labels": batch["labels"],
            "num_items_in_batch": None if counts is None else counts[0],
        }


class MelAndFlowTask(FlowMatchingTask):
    """The mel decoder and flow matching together: codes -> all three mels."""

    def __init__(self, model, processor, recipe):
        super().__init__(model, processor, recipe)
        self.module = MelAndFlowForTraining(model.audio_tokenizer, model.flow_matching)

    def collate(self, rows):
        batch = super().collate(rows)
        narrow = [self._at_tokenizer_rate(clip) for clip in batch["clips"]]
        return batch | tokenizer_mel_targets(narrow, self.model.config.audio_tokenizer_config)

    def count_targets(self, batch):
        code_frames = (batch["lengths"] + 1) // MEL_FRAMES_PER_CODE  # a state fewer than four for each, in every clip
        return torch.stack([code_frames.sum(), batch["lengths"].sum()])

    def model_inputs(self, batch, counts):
        code_frames, mel_frames = (None, None) if counts is None else counts
        return {
            "audio_codes": self._audio_codes(batch),
            "codebooks": self.module.tokenizer_side.draw_codebooks(len(batch["clips"])).to(batch["lengths"].device),
            **{name: batch[name] for name in ("coarse_labels", "mel_labels", "labels")},
            "num_items_in_batch": code_frames,
            "num_mel_items_in_batch": mel_frames,
        }


class VocoderTask(Task):
    """
    The vocoder on segments of real speech; `energy_distance` asks for real noise, `adversarial` adds discriminators, `pitch` F0
    targets, `speed` voices, `own_mels` the mistakes of the mels that it will be given.
    """

    loss_options = (
        "segment_frames",
        "speed",
        "own_mels",
        "pitch",
        "energy_distance",
        "adversarial",
        "period_width",
        "spectrogram_width",
    )

    def __init__(self, model, processor, recipe):
        if model.vocoder is None:
            raise ValueError("Stage vocoder needs a checkpoint with a vocoder.")
        self.sampling_rate = model.config.vocoder_config.sampling_rate
        super().__init__(model, processor, recipe)
        config = model.config.vocoder_config
        for name in ("pitch", "energy_distance", "adversarial"):
            if not isinstance(self.options.get(name, False), bool):
                raise ValueError(f"`loss.{name}` must be true or false, got {self.options[name]!r}.")
        self.pitch = PitchTracks(config.sampling_rate, config.hop_length) if self.options.get("pitch") else None
        self.speed = self._number("speed", 1, 2)
        self.own_share, self.own_mels = self._number("own_mels", 0, 1), None
        if self.own_share is not None:
            if self.speed is not None:
                raise ValueError("`loss.own_mels` are of clips as they are: it cannot be joined with `loss.speed`.")
            self.own_mels = OwnMels(model, self._remembered_codes())
        options = {name: self.options[name] for name in self.loss_options[4:] if name in self.options}
        self.module = VocoderTrainingModule(model.vocoder, **options)

    def collate(self, rows):
        clips, hop = self._chunks(rows), self.model.config.vocoder_config.hop_length
        frames = [len(clip) // hop for clip in clips]
        if self.own_mels is not None:
            frames = [MEL_FRAMES_PER_CODE * self.extractor.num_frames(len(clip)) - 1 for clip in clips]
        longest = self.options.get("segment_frames", 50)
        batch = {"lengths": torch.tensor([min(longest, count) for count in frames]), "clips": clips}
        if self.pitch is None or self.speed is not None:  # at another speed the pitch is another one
            return batch
        return batch | {"pitch": [self.pitch(torch.from_numpy(clip)).numpy() for clip in clips]}

    def count_targets(self, batch):
        return batch["lengths"].sum()[None]

    def _draw_mels(self, clips: list[np.ndarray]) -> list[torch.Tensor | None]:
        """The model's own mels of a random share of the clips, half of them by each of its ways; None stands for the recording's."""
        draws = torch.rand(len(clips)).tolist()
        ways = {i: OwnMels.WAYS[draw < self.own_share / 2] for i, draw in enumerate(draws) if draw < self.own_share}
        made = dict(zip(ways, self.own_mels([clips[i] for i in ways], list(ways.values())))) if ways else {}
        return [made.get(i) for i in range(len(clips))]

    def model_inputs(self, batch, counts):
        # Drawn here and not in `collate`, which runs ahead of the steps: a resumed run must draw the same segments.
        config, device, lengths = self.model.config.vocoder_config, batch["lengths"].device, batch["lengths"].tolist()
        mels = None if self.own_mels is None else self._draw_mels(batch["clips"])
        clips = [torch.from_numpy(clip) for clip in batch["clips"]]
        if self.speed is not None:
            clips = [part_at_another_speed(clip, frames, self.speed, config) for clip, frames in zip(clips, lengths)]
        mel, labels, starts = vocoder_segments(clips, lengths, config, mels, device)
        inputs = {
            "mel": mel,
            "labels": labels,
            "lengths": batch["lengths"],
            "num_items_in_batch": None if counts is None else counts[0],
        }
        if self.pitch is not None:
            pitch = [self.pitch.of_new(clip) for clip in clips] if self.speed else [torch.from_numpy(p) for p in batch["pitch"]]
            tracks = [track[start : start + frames] for track, start, frames in zip(pitch, starts, lengths)]
            inputs["f0_labels"] = nn.utils.rnn.pad_sequence(tracks, batch_first=True).to(device)
        return inputs

    def loss(self, outputs):
        # The two reach different parameters, so one backward pass serves both.
        adversary = outputs.get("discriminator_loss")
        return outputs["loss"] if adversary is None else outputs["loss"] + adversary


_PART_TASKS = {
    "tokenizer": TokenizerTask,
    "mel_decoder": MelDecoderTask,
    "flow_matching": FlowMatchingTask,
    "mel_and_flow": MelAndFlowTask,
    "vocoder": VocoderTask,
}


def make_task(model, processor, recipe: Recipe, module: nn.Module | None = None, sharded: bool = False) -> Task:
    """The recipe's task; `module` is the model with its adapters, for LoRA, `sharded` whether its weights will be (FSDP)."""
    if recipe.stage in LLM_STAGES:
        return LanguageTask(model, processor, recipe, module, sharded)
    return _PART_TASKS[recipe.stage](model, processor, recipe)
