"""transformers' any-to-any and text-to-audio pipelines for this model: batches of prompts with speech, text and sound of a reply."""

from typing import Any

import torch
from transformers import AnyToAnyPipeline, Pipeline, TextToAudioPipeline
from transformers.pipelines.base import pad_collate_fn
from transformers.utils import ModelOutput

from .pipeline_batches import iterate_batches


# What a saved config.json says of them, for folders that are loaded without this package.
_TEXT_TO_AUDIO = {
    "impl": "pipeline_speech.BaichuanAudioTextToAudioPipeline",
    "pt": ["AutoModelForTextToWaveform"],
    "type": "text",
}
CUSTOM_PIPELINES = {
    "any-to-any": {
        "impl": "pipeline_speech.BaichuanAudioAnyToAnyPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    },
    "text-to-audio": _TEXT_TO_AUDIO,
    "text-to-speech": _TEXT_TO_AUDIO,
}


def _is_ours(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "baichuan_audio"


def _is_chat(prompt: Any) -> bool:
    return hasattr(prompt, "messages")  # transformers wraps chats in classes of two modules


def _joined(tensors: list[torch.Tensor], value: float) -> torch.Tensor:
    """Tensors of unequal last size, padded on the right and put one after the other along the first dimension."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(tensor, (0, longest - tensor.shape[-1]), value=value) for tensor in tensors])


def collate_prompts(items: list[dict], tokenizer: Any, audio_token_id: int) -> dict[str, Any]:
    """
    Prompts processed one by one -> the inputs of them all, as the processor makes them for a list.

    Args:
        items: each a prompt's `input_ids`, `attention_mask` `(1, time)` and, with speech, `input_features`, `input_features_mask`
            `(chunks, ...)` and `audio_codes` `(1, num_codebooks, frames)`; `forced_text_ids` of speech requests.
        tokenizer: gives padding token and side. audio_token_id: the token that stands for a frame.
    """
    special = ("input_features", "input_features_mask", "audio_codes", "forced_text_ids")
    text = [{name: value for name, value in item.items() if name not in special} for item in items]
    batch = pad_collate_fn(tokenizer, None)(text)
    for name in ("input_features", "input_features_mask"):
        given = [item[name] for item in items if name in item]
        if given:
            batch[name] = _joined(given, 0)
    codes = [item.get("audio_codes") for item in items]
    if any(one is not None for one in codes):
        codebooks = next(one.shape[1] for one in codes if one is not None)
        counts = [int((item["input_ids"] == audio_token_id).sum()) for item in items]
        # -1: still to be computed from features.
        rows = [torch.full((1, codebooks, n), -1) if one is None else one for one, n in zip(codes, counts)]
        batch["audio_codes"] = _joined(rows, -1)
    if all("forced_text_ids" in item for item in items):
        batch["forced_text_ids"] = [row for item in items for row in item["forced_text_ids"]]
    return batch


class _SpeechBatches:
    """Puts prompts into batches by `collate_prompts`."""

    def get_iterator(self, inputs, *args):
        def collate(items: list[dict]) -> dict[str, Any]:
            return collate_prompts(items, self.processor.tokenizer, self.model.config.audio_pad_token_id)

        return iterate_batches(self, collate, inputs, *args)


class BaichuanAudioAnyToAnyPipeline(_SpeechBatches, AnyToAnyPipeline):
    """
    Chats of text and speech -> text, or with `generation_mode="audio"` a spoken reply; `batch_size` takes prompts of any kind and
    length together. Everything else is as in [`~transformers.AnyToAnyPipeline`].

    A spoken reply's record is `{"input_text", "generated_audio": float32 (samples,), "sampling_rate": 24000, "generated_text",
    "generated_audio_codes": int64 (num_codebooks, frames)}`.
    """

    def __new__(cls, model=None, *args, **kwargs):
        # transformers knows one class for each task; any other model gets the one that was there.
        return super().__new__(cls) if _is_ours(model) else AnyToAnyPipeline(model, *args, **kwargs)

    def __init__(self, *args, **kwargs):
        # Not the class above: it only asks for libraries, in older releases for librosa, which nothing here reads sound with.
        Pipeline.__init__(self, *args, **kwargs)

    def _sanitize_parameters(self, generation_mode=None, generate_kwargs=None, **kwargs):
        kwargs["generate_kwargs"] = dict(generate_kwargs or {})  # a copy: the base class writes into it
        preprocess, forward, postprocess = super()._sanitize_parameters(generation_mode=generation_mode, **kwargs)
        if generation_mode is not None:
            preprocess["spoken"] = generation_mode == "audio"
        return preprocess, forward, postprocess

    def preprocess(self, inputs=None, spoken=False, **kwargs):
        if _is_chat(inputs):
            kwargs.setdefault("speech", spoken)
        return super().preprocess(inputs, **kwargs)

    def _forward(self, model_inputs, generate_kwargs=None):
        outputs = super()._forward(model_inputs, generate_kwargs)
        reply = outputs["generated_sequence"]
        if isinstance(reply, ModelOutput) and reply.get("segments") is not None:
            if reply.audio is None:
                raise ValueError('`output_audio=False` leaves nothing for `generation_mode="audio"` to return.')
            # One entry for each prompt, for batches are taken apart again.
            outputs["generated_sequence"] = [
                {
                    "audio": audio,
                    "audio_codes": codes[:, codes[0] >= 0],
                    "text_ids": [token for part in segments if part["type"] == "text" for token in part["token_ids"].tolist()],
                }
                for audio, codes, segments in zip(reply.audio, reply.audio_codes, reply.segments)
            ]
        return outputs

    def postprocess(self, model_outputs, skip_special_tokens=None, **kwargs):
        if kwargs.get("generation_mode") != "audio":
            return super().postprocess(model_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        prompts, replies = model_outputs["prompt_text"], model_outputs["generated_sequence"]
        prompts = [prompts] if isinstance(prompts, str) or _is_chat(prompts) else prompts
        replies = [replies] if isinstance(replies, dict) else replies
        return [
            {
                "input_text": prompt.messages if _is_chat(prompt) else prompt,
                "generated_audio": reply["audio"].float().numpy(),
                "sampling_rate": self.model.config.sampling_rate,
                "generated_text": self.processor.decode(reply["text_ids"], skip_special_tokens=skip_special_tokens is not False),
                "generated_audio_codes": reply["audio_codes"].numpy(),
            }
            for prompt, reply in zip(prompts, replies)
        ]


class BaichuanAudioTextToAudioPipeline(_SpeechBatches, TextToAudioPipeline):
    """
    Texts are spoken as they are; chats get a spoken reply. The result is `{"audio": float32 (samples,), "sampling_rate": 24000}`;
    arguments are those of [`~transformers.TextToAudioPipeline`].
    """

    _load_processor = None

    def __new__(cls, model=None, *args, **kwargs):
        return super().__new__(cls) if _is_ours(model) else TextToAudioPipeline(model, *args, **kwargs)

    def preprocess(self, text, **kwargs):
        if self.processor is None:
            raise ValueError("Speech needs the checkpoint's processor, and it has none.")
        if _is_chat(text):
            return super().preprocess(text, **{"speech": True, **kwargs})
        return self.processor.apply_tts_request(text, **kwargs)

    def _forward(self, model_inputs, **kwargs):
        settings = {"generation_mode": "audio", **kwargs["generate_kwargs"]}
        output = super()._forward(model_inputs, **{**kwargs, "generate_kwargs": settings})
        return {"audio": output["audio"]} if isinstance(output, ModelOutput) and output.get("audio") is not None else output


__all__ = ["BaichuanAudioAnyToAnyPipeline", "BaichuanAudioTextToAudioPipeline"]
