"""What a checkpoint folder gives through every Auto class and every pipeline.

Never imports the package: run as a script, it reports what folders give where the package cannot be imported.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import pipeline
from transformers.utils import logging


PROMPT = "Say: <audio_start_baichuan><audio_pad_baichuan><audio_end_baichuan>"
CODES = [np.random.default_rng(frames).integers(0, 16, (8, frames)) for frames in (5, 3)]
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SPOKEN = {"seed": 1, "max_new_tokens": 12}


def sound(samples: int) -> np.ndarray:
    return (np.sin(np.arange(samples) / 20) * 0.3).astype(np.float32)


def chat(samples: int) -> list[dict]:
    return [{"role": "user", "content": [{"type": "audio", "audio": sound(samples)}]}]


def auto_results(folder: str, **trust) -> tuple[dict[str, torch.Tensor], list[type]]:
    """Tensors through the Auto classes, and the classes they led to."""

    def load(name):
        loaded = getattr(transformers, name).from_pretrained(folder, **trust)
        if isinstance(loaded, torch.nn.Module):
            loaded.eval()
        if name != "AutoTokenizer":
            classes.append(type(loaded))
        return loaded

    classes: list[type] = []
    config, processor = load("AutoConfig"), load("AutoProcessor")
    inputs = dict(processor(text=PROMPT, audio=sound(16000)))
    features = load("AutoFeatureExtractor")([sound(16000), sound(9000)], return_tensors="pt")
    results = {f"processor.{name}": value for name, value in inputs.items()}
    results["extractor"] = features["input_features"]
    results["tokenizer"] = torch.tensor(load("AutoTokenizer")(PROMPT)["input_ids"])
    results["config"] = torch.tensor([config.sampling_rate, *config.audio_tokenizer_config.codebook_sizes])
    with torch.no_grad():
        results["model"] = load("AutoModel")(**inputs).last_hidden_state
        results["causal"] = load("AutoModelForCausalLM")(**inputs).logits
    results["multimodal"] = load("AutoModelForMultimodalLM").generate(**inputs, **GREEDY)
    reply = load("AutoModelForTextToWaveform").generate(**inputs, generation_mode="audio", **SPOKEN)
    results |= {"reply": reply.sequences, "reply.codes": reply.audio_codes, "reply.audio": reply.audio[0]}
    codec = load("AutoModelForAudioTokenization")
    encoded = codec.encode(features["input_features"], features["input_features_mask"])
    results["codec"] = encoded.audio_codes
    with torch.no_grad():
        results["codec.mel"] = codec.decode(encoded.audio_codes).refined_mel
    decoder = load("AutoModelForTextToSpectrogram")
    results["decoder"] = decoder.decode_audio(encoded.audio_codes[:1], seed=0)[0]
    return results, classes


def pipeline_results(folder: str, **trust) -> tuple[dict[str, torch.Tensor], list[type]]:
    """Tensors through the pipelines, and the pipelines' classes."""
    chats, results, classes = [chat(16000), chat(9000)], {}, []
    pipe = pipeline("any-to-any", model=folder, **trust)
    classes.append(type(pipe))
    for row, records in enumerate(pipe(chats, batch_size=2, return_tensors=True, generate_kwargs=GREEDY)):
        results[f"any-to-any.text.{row}"] = records[0]["generated_token_ids"].clone()
    for row, records in enumerate(pipe(chats, batch_size=2, generation_mode="audio", generate_kwargs=SPOKEN)):
        results[f"any-to-any.audio.{row}"] = torch.from_numpy(records[0]["generated_audio"].copy())
    for task in ("text-to-audio", "text-to-speech"):
        pipe = pipeline(task, model=folder, **trust)
        classes.append(type(pipe))
        results[task] = torch.from_numpy(pipe("Hello there.", generate_kwargs=SPOKEN)["audio"].copy())
    pipe = pipeline("flow-matching-vocoder", model=folder, **trust)
    classes.append(type(pipe))
    for row, record in enumerate(pipe(CODES, seed=2, num_steps=2, batch_size=2)):
        results[f"vocoder.{row}"] = torch.from_numpy(record["audio"].copy())
    return results, classes


def all_results(folder: str, pipelines: bool = True, **trust) -> tuple[dict[str, torch.Tensor], list[type]]:
    tensors, classes = auto_results(folder, **trust)
    more, pipelines = pipeline_results(folder, **trust) if pipelines else ({}, [])
    return {name: value.contiguous() for name, value in (tensors | more).items()}, classes + pipelines


def without_package(target: Path, folders: list[str]) -> None:
    """`<target>/<number>.safetensors` for each folder, and for the copy of the first that is saved from what was loaded."""
    sys.modules["modeling_baichuan_audio"] = None  # as if it were not installed, also where it is
    trust = {"trust_remote_code": True}
    copy = str(target / "copy")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0], **trust)
    model.save_pretrained(copy)
    transformers.AutoProcessor.from_pretrained(folders[0], **trust).save_pretrained(copy)
    for number, folder in enumerate([*folders, copy]):
        results, classes = all_results(folder, pipelines=number != 1, **trust)
        strangers = [named for named in classes if not named.__module__.startswith("transformers_modules.")]
        assert not strangers, strangers
        save_file(results, target / f"{number}.safetensors")
    # Parts: saved alone from there, and loaded again.
    model.audio_tokenizer.save_pretrained(target / "codec")
    codec = transformers.AutoModelForAudioTokenization.from_pretrained(target / "codec", **trust)
    sizes = torch.tensor([sum(p.numel() for p in part.parameters()) for part in (codec, model.audio_tokenizer)])
    pipeline("flow-matching-vocoder", model=folders[0], **trust).save_pretrained(target / "decoder")
    small = pipeline("flow-matching-vocoder", model=str(target / "decoder"), **trust)
    save_file({"sizes": sizes, "sound": torch.from_numpy(small(CODES[0], seed=2)["audio"])}, target / "parts.safetensors")


if __name__ == "__main__":
    logging.disable_progress_bar()
    without_package(Path(sys.argv[1]), sys.argv[2:])
