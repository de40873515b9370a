"""Over-fitting shows that labels are aligned: what was memorised comes back, token by token, out of `generate`."""

import json

import pytest
import torch

from modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioProcessor
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.run import train


WORDS = ["seven", "a red bus", "good day", "why not", "blue", "ten past", "hm, yes", "north"]


@pytest.mark.slow
def test_transcripts_and_audio_are_reproduced_exactly(tiny_folder, tmp_path):
    """Eight recordings and their transcripts, eight texts and their speech, through the real recipe and the real generate."""
    generator = torch.Generator().manual_seed(0)
    sizes = BaichuanAudioForCausalLM.from_pretrained(tiny_folder).config.audio_tokenizer_config.codebook_sizes

    def codes(frames: int) -> torch.Tensor:
        return torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in sizes])

    heard, spoken = [codes(4 + index % 3) for index in range(8)], [codes(3 + index % 4) for index in range(8)]
    rows = [{"task": "asr", "segments": [{"audio_codes": clip.tolist()}, {"text": text}]} for clip, text in zip(heard, WORDS)] + [
        {"task": "tts", "segments": [{"text": text}, {"audio_codes": clip.tolist()}]} for clip, text in zip(spoken, WORDS)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.train={path}", f"model={tiny_folder}", f"output={tmp_path / 'run'}", "samples.every=0"]
    changes += ["training.per_device_train_batch_size=16", "training.max_steps=400", "training.learning_rate=5e-3"]
    changes += ["training.logging_steps=100", "training.save_strategy=no", "training.disable_tqdm=true"]
    changes += ["training.lr_scheduler_type=cosine", "training.warmup_steps=20"]
    train(read_recipe("tiny/sft", changes))

    model = BaichuanAudioForCausalLM.from_pretrained(tmp_path / "run" / "final")
    processor = BaichuanAudioProcessor.from_pretrained(tmp_path / "run" / "final")
    inputs = processor.apply_transcription_request([{"audio_codes": clip} for clip in heard])
    sequences = model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=20)
    texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == WORDS

    inputs = processor.apply_tts_request(WORDS)
    options = {"generation_mode": "audio", "output_audio": False, "do_sample": False, "audio_repetition_penalty": 1.0}
    reply = model.generate(**inputs, **options, max_new_tokens=20)
    for row, clip in enumerate(spoken):
        assert torch.equal(reply.audio_codes[row, :, : clip.shape[1]], clip), row
        assert (reply.audio_codes[row, :, clip.shape[1] :] == -1).all(), "the end of audio was learnt too"
