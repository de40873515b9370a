"""Recordings for `examples/` and the README's picture: `python -m modeling_baichuan_audio.training.miniature.showcase CORPUS EXAMPLES`.

Questions are clips of held-out voices (Kokoro-82M, Apache-2.0); the answer to the first is the shipped model's own. Needs matplotlib.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from ...conversion import find_checkpoint
from ...mel_spectrogram import vocoder_log_mel
from ...processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT
from .corpus import read_manifest


def pick(entries: list[dict], texts: list[str]) -> list[dict]:
    """
    The clip of a held-out voice that says each text.

    Raises:
        ValueError: a text that no held-out voice says.
    """
    spoken = {entry["text"]: entry for entry in entries if entry["split"] in ("test_voice", "test_operands")}
    missing = [text for text in texts if text not in spoken]
    if missing:
        raise ValueError(f"No held-out voice says {missing[0]!r}; one says, for example, {next(iter(spoken), None)!r}.")
    return [spoken[text] for text in texts]


def draw(picture: Path, question: tuple[np.ndarray, int], answer: tuple[np.ndarray, int], titles: tuple[str, str]) -> None:
    """Mel spectrograms of question and answer, waveforms `(samples,)` and their rates, side by side on one time scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = [len(wave) / rate for wave, rate in (question, answer)]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 2.8), sharey=True, width_ratios=lengths)
    for panel, (wave, rate), title, length in zip(panels, (question, answer), titles, lengths):
        mel = vocoder_log_mel(torch.from_numpy(wave)[None], rate, rate // 50, n_fft=4 * (rate // 50))[0]
        panel.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, length, 0, mel.shape[1]))
        panel.set(title=title.replace(": ", ":\n", 1), xlabel="seconds")
    panels[0].set_ylabel("mel band")
    figure.tight_layout()
    part = picture.with_name(f".{picture.name}.part")
    figure.savefig(part, dpi=90, format="png")
    part.replace(picture)


def answer_of(recording: Path, checkpoint: Path, seed: int = 0) -> tuple[str, np.ndarray, int]:
    """The model's reply to a recording: text, `(samples,)` float32 and its rate."""
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    conversation = [
        {"role": "system", "content": DEFAULT_VOICE_PROMPT},
        {"role": "user", "content": [{"type": "audio", "path": str(recording)}]},
    ]
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True, speech=True)
    reply = model.generate(**inputs, generation_mode="audio", seed=seed)
    words = torch.cat([part["token_ids"] for part in reply.segments[0] if part["type"] == "text"])
    return processor.decode(words, skip_special_tokens=True), reply.audio[0].numpy(), model.config.sampling_rate


def make_examples(corpus: Path, target: Path, texts: list[str], checkpoint: Path) -> str:
    """
    Copies the questions as `question.wav`, `question-2.wav`, ..., answers the first one as `answer.wav` and draws `answer.png`.

    Returns:
        The text of the answer.

    Raises:
        ValueError: no corpus, or a text that no held-out voice says.
    """
    clips = pick(read_manifest(corpus), texts)
    for number, clip in enumerate(clips, start=1):
        shutil.copyfile(corpus / clip["path"], target / ("question.wav" if number == 1 else f"question-{number}.wav"))
    text, wave, rate = answer_of(target / "question.wav", checkpoint)
    part = target / ".answer.wav.part"
    soundfile.write(part, wave, rate, subtype="PCM_16", format="WAV")
    part.replace(target / "answer.wav")
    asked = soundfile.read(target / "question.wav", dtype="float32")
    draw(target / "answer.png", asked, (wave, rate), (f"asked: {texts[0]}", f"answered: {text}"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--checkpoint", default="miniature")
    parser.add_argument("--text", action="append", required=True, help="a question that a held-out voice asks; repeat for more")
    options = parser.parse_args()
    try:
        print(make_examples(options.corpus, options.examples, options.text, find_checkpoint(options.checkpoint)))
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
