"""The model that is evaluated: what it writes and what it says."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT, BaichuanAudioProcessor
from ..transcript_length import TranscriptLengthCriteria
from .clips import Outputs, TestClip


# What is written is always the most likely text, without a penalty: numbers repeat their digits.
GREEDY_TEXT = {"do_sample": False, "repetition_penalty": 1.0}
# Of speech only the text is the most likely one: its frames are drawn, as the checkpoint's own settings have it.
GREEDY_REPLY = {
    "do_sample": True,
    "top_k": 1,
    "repetition_penalty": 1.0,
    "later_text_top_k": 1,
    "later_text_repetition_penalty": 1.0,
}
LONGEST_TRANSCRIPT = 512  # text tokens: the longest prompt of the human set is spoken for more than a minute
LONGEST_ANSWER = 64
LONGEST_PIECE = 150  # audio frames, 12 s: what does not stop by itself is cut off
_LONGEST_REPLY = LONGEST_ANSWER + 2 * LONGEST_PIECE
_SILENCE = 0.5  # seconds, in place of a reply without sound


def clip_seed(seed: int, key: str) -> int:
    """A seed of its own for each clip."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big")


@dataclass
class Subject:
    """
    A checkpoint at work on clips. What it made is kept in `outputs`; only what is missing is made.

    Args:
        model (in evaluation mode), processor: the checkpoint.
        outputs: of this checkpoint and these settings.
        seed: of every draw.
        batch_size: clips at once.
    """

    model: BaichuanAudioForCausalLM
    processor: BaichuanAudioProcessor
    outputs: Outputs
    seed: int = 0
    batch_size: int = 16

    def seeds(self, batch: Iterable[TestClip]) -> list[int]:
        return [clip_seed(self.seed, clip.id) for clip in batch]

    def write(self, inputs: Any, limit: int = LONGEST_TRANSCRIPT, transcript: bool = False) -> list[str]:
        """The most likely text after each prompt; a transcript is no longer than speech can be."""
        criteria = [TranscriptLengthCriteria(inputs, self.processor.audio_token_id)] if transcript else []
        sequences = self.model.generate(
            **inputs.to(self.model.device),
            max_new_tokens=limit,
            stopping_criteria=criteria,
            **GREEDY_TEXT,
        )
        return self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _texts(self, task: str, clips: list[TestClip], ask: Any, limit: int, transcript: bool = False) -> list[str]:
        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            texts = self.write(ask(batch), limit, transcript)
            return [{"id": clip.id, "text": text} for clip, text in zip(batch, texts)]

        return [item["text"] for item in self.outputs.complete(task, clips, self.batch_size, step)]

    def _asked(self, questions: list[str | list[dict[str, Any]]], speech: bool = False) -> Any:
        system = [{"role": "system", "content": DEFAULT_VOICE_PROMPT}] if speech else []
        conversations = [[*system, {"role": "user", "content": question}] for question in questions]
        return self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True, speech=speech
        )

    def transcribe(self, task: str, clips: list[TestClip]) -> list[str]:
        """What the model writes down of each clip."""

        def ask(batch: list[TestClip]) -> Any:
            return self.processor.apply_transcription_request([str(clip.path) for clip in batch])

        return self._texts(task, clips, ask, LONGEST_TRANSCRIPT, transcript=True)

    def answer(self, task: str, clips: list[TestClip]) -> list[str]:
        """The written answer to each spoken question."""

        def ask(batch: list[TestClip]) -> Any:
            return self._asked([[{"type": "audio", "path": str(clip.path)}] for clip in batch])

        return self._texts(task, clips, ask, LONGEST_ANSWER)

    def answer_written(self, task: str, clips: list[TestClip]) -> list[str]:
        """The written answer to each question in writing: the clips' recordings, if any, are not heard."""
        return self._texts(task, clips, lambda batch: self._asked([clip.text for clip in batch]), LONGEST_ANSWER)

    def reply(self, inputs: Any, seeds: list[int], **limits: int) -> Any:
        """`generate` in audio mode, text greedy, frames drawn from `seeds`."""
        settings = GREEDY_REPLY | {"max_audio_frames": LONGEST_PIECE, "max_new_tokens": _LONGEST_REPLY} | limits
        return self.model.generate(**inputs.to(self.model.device), generation_mode="audio", seed=seeds, **settings)

    def ask_aloud(self, clips: list[TestClip]) -> Any:
        """Inputs that ask each clip's question and want a spoken reply."""
        return self._asked([[{"type": "audio", "path": str(clip.path)}] for clip in clips], speech=True)

    def _spoken(self, task: str, batch: list[TestClip], reply: Any) -> list[dict[str, Any]]:
        rate, items = self.model.config.sampling_rate, []
        for clip, waveform, segments in zip(batch, reply.audio, reply.segments):
            samples = waveform if waveform.numel() else torch.zeros(round(_SILENCE * rate))
            self.outputs.save_wav(task, clip.id, samples.float().cpu().numpy(), rate)
            words = [part["token_ids"] for part in segments if part["type"] == "text"]
            text = self.processor.decode(torch.cat(words), skip_special_tokens=True) if words else ""
            frames = [part["audio_codes"].shape[1] for part in segments if part["type"] == "audio"]
            items.append({"id": clip.id, "text": text, "frames": frames})
        return items

    def answer_aloud(self, task: str, clips: list[TestClip]) -> list[dict[str, Any]]:
        """The spoken reply to each spoken question: `text` and audio `frames` of each piece; the sound is in `outputs`."""

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            return self._spoken(task, batch, self.reply(self.ask_aloud(batch), self.seeds(batch)))

        return self.outputs.complete(task, clips, self.batch_size, step)

    def speak(self, task: str, clips: list[TestClip]) -> list[dict[str, Any]]:
        """Each clip's text, spoken: audio `frames` of each piece; the sound is in `outputs`."""

        def step(batch: list[TestClip]) -> list[dict[str, Any]]:
            inputs = self.processor.apply_tts_request([clip.text for clip in batch])
            later = inputs["forced_text_ids"]
            budget = max((1 + len(pieces)) * (LONGEST_PIECE + 2) + sum(map(len, pieces)) for pieces in later)
            return self._spoken(task, batch, self.reply(inputs, self.seeds(batch), max_new_tokens=budget))

        return self.outputs.complete(task, clips, self.batch_size, step)
