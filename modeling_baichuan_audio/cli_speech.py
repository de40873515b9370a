"""Sub-commands that speak and listen: reply, transcribe, speak, resynthesize."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from .cli_common import DEFAULT_CHECKPOINT, Checkpoint, Device, Dtype, Seed, app, bits_per_second, load, one_line_errors
from .configuration_baichuan_audio import BaichuanAudioConfig
from .generation_baichuan_audio import REPLY_DEFAULTS
from .mel_spectrogram import vocoder_log_mel
from .modeling_baichuan_audio import BaichuanAudioForCausalLM
from .processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT
from .transcript_length import TranscriptLengthCriteria


Output = Annotated[Path, typer.Option("--output", "-o", help="Sound file to write; the format follows the ending.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token instead of sampling.")]
MaxNewTokens = Annotated[Optional[int], typer.Option(min=1, help="Longest reply, in text tokens and 80 ms audio frames.")]


class StepProgress(StoppingCriteria):
    """Moves a progress bar by one at every generation step; never stops anything."""

    def __init__(self, total: int | None):
        self.bar = tqdm(total=total, unit="step", desc="generating", leave=False, disable=not sys.stderr.isatty())

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        self.bar.update(1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: BaichuanAudioForCausalLM,
    inputs,
    max_new_tokens: int | None = None,
    greedy: bool = False,
    stopping_criteria: tuple[StoppingCriteria, ...] = (),
    **kwargs,
):
    """`model.generate` with a progress bar."""
    if max_new_tokens is not None:
        kwargs["max_new_tokens"] = max_new_tokens
    if greedy:
        kwargs |= {"do_sample": False}
    progress = StepProgress(max_new_tokens or model.generation_config.max_new_tokens)
    try:
        criteria = StoppingCriteriaList([progress, *stopping_criteria])
        return model.generate(**inputs.to(model.device), stopping_criteria=criteria, **kwargs)
    finally:
        progress.bar.close()


def check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist.")
    if path.suffix.lower() not in (".wav", ".flac", ".ogg"):
        raise ValueError(f"{path} must end in .wav, .flac or .ogg.")


def write_audio(processor, model, waveform: torch.Tensor, path: Path, frames: list[int]) -> None:
    """Saves a waveform and says what it is; `frames` are those of each piece."""
    if not waveform.numel():
        typer.echo("audio: none (the reply has no audio frames)")
        return
    rate = model.config.sampling_rate
    processor.save_audio(waveform, path, sampling_rate=rate)
    seconds = waveform.numel() / rate
    length = f"{sum(frames)} frames in {len(frames)} pieces, {waveform.numel()} samples, {seconds:.2f} s at {rate} Hz"
    typer.echo(f"audio: {path} ({length})")


def printable(text: str) -> str:
    """Text without the control characters that an untrained model may emit."""
    return "".join(symbol if symbol.isprintable() or symbol in "\n\t" else "\ufffd" for symbol in text)


def reply_text(processor, segments: list[dict]) -> str:
    ids = [part["token_ids"] for part in segments if part["type"] == "text"]
    return printable(processor.decode(torch.cat(ids), skip_special_tokens=True)) if ids else ""


def piece_frames(segments: list[dict]) -> list[int]:
    return [part["audio_codes"].shape[1] for part in segments if part["type"] == "audio"]


@app.command()
def reply(
    question: Annotated[Optional[Path], typer.Argument(help="Recording of the question, any rate, channels and length.")] = None,
    output: Output = Path("answer.wav"),
    text: Annotated[Optional[str], typer.Option(help="Question in writing, instead of or after the recording.")] = None,
    system: Annotated[str, typer.Option(help="System prompt; it also chooses the voice.")] = DEFAULT_VOICE_PROMPT,
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    greedy: Greedy = False,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Answer a spoken question in text and speech."""
    with one_line_errors():
        if question is None and text is None:
            raise ValueError("Give a recording, or a question with --text.")
        check_output(output)
        content = [] if question is None else [{"type": "audio", "path": str(question)}]
        content += [] if text is None else [{"type": "text", "text": text}]
        conversation = [{"role": "system", "content": system}] if system else []
        conversation.append({"role": "user", "content": content})
        if question is not None and not question.is_file():
            raise ValueError(f"Recording {question} does not exist.")
        model, processor = load(checkpoint, device, dtype)
        model.require_vocoder()
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True, speech=True
        )
        switch = model.generation_config.audio_switch_token_ids
        if switch is None:  # an original folder does not say
            switch = processor.audio_switch_token_ids()
        result = generate(
            model, inputs, max_new_tokens, greedy, generation_mode="audio", seed=seed, audio_switch_token_ids=switch
        )
        typer.echo(f"text: {reply_text(processor, result.segments[0])}")
        write_audio(processor, model, result.audio[0], output, piece_frames(result.segments[0]))


@app.command()
def transcribe(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings, any rate, channels and length.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Write down what is said; one line per recording."""
    with one_line_errors():
        missing = [str(path) for path in recordings if not path.is_file()]
        if missing:
            raise ValueError(f"Recording {', '.join(missing)} does not exist.")
        model, processor = load(checkpoint, device, dtype)
        for path in recordings:
            inputs = processor.apply_transcription_request(str(path))
            length = TranscriptLengthCriteria(inputs, processor.audio_token_id)
            sequences = generate(model, inputs, max_new_tokens, greedy=True, stopping_criteria=(length,), repetition_penalty=1.0)
            spoken = printable(processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            typer.echo(f"{path}\t{spoken}" if len(recordings) > 1 else spoken)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say.")],
    output: Output = Path("speech.wav"),
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    greedy: Greedy = False,
    max_audio_frames: Annotated[
        Optional[int], typer.Option(min=1, help="Longest piece, in 80 ms frames; 700 by default.")
    ] = None,
) -> None:
    """Say a text."""
    with one_line_errors():
        check_output(output)
        model, processor = load(checkpoint, device, dtype)
        model.require_vocoder()
        inputs = processor.apply_tts_request(text)
        # The original allows 700 frames a piece here and 500 in dialogue; a checkpoint with a limit of its own keeps to it.
        own = model.generation_config.max_audio_frames
        limit = max_audio_frames or (700 if own == REPLY_DEFAULTS["max_audio_frames"] else own)
        pieces = 1 + len(inputs["forced_text_ids"][0])
        budget = pieces * (limit + 2) + sum(map(len, inputs["forced_text_ids"][0]))
        result = generate(model, inputs, budget, greedy, generation_mode="audio", seed=seed, max_audio_frames=limit)
        write_audio(processor, model, result.audio[0], output, piece_frames(result.segments[0]))


@app.command()
def resynthesize(
    recording: Annotated[Path, typer.Argument(help="Recording, any rate, channels and length.")],
    output: Output = Path("resynthesized.wav"),
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    num_codebooks: Annotated[Optional[int], typer.Option(min=1, help="Decode from the first codebooks only.")] = None,
    num_steps: Annotated[Optional[int], typer.Option(min=1, help="Flow-matching steps.")] = None,
    guidance: Annotated[Optional[float], typer.Option(min=0.0, help="Flow-matching guidance.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Recording -> codes -> recording, with the codes' bitrate and the mel error."""
    with one_line_errors():
        check_output(output)
        if not recording.is_file():
            raise ValueError(f"Recording {recording} does not exist.")
        model, processor = load(checkpoint, device, dtype)
        extractor, config = processor.feature_extractor, model.config
        samples = extractor.read_audio(recording)
        features = extractor(samples, return_tensors="pt").to(model.device)
        codes = model.get_audio_codes(features["input_features"], features["input_features_mask"])
        waveforms, errors, frames = [], [], []
        chunks = zip(extractor.chunks(samples), codes)
        for chunk, clip in tqdm(
            chunks, total=len(codes), unit="chunk", desc="decoding", leave=False, disable=not sys.stderr.isatty()
        ):
            clip = clip[:, clip[0] >= 0]
            waveform = model.decode_audio([clip], seed, num_steps, guidance, num_codebooks)[0].cpu()
            waveforms.append(waveform)
            frames.append(clip.shape[1])
            errors.append(mel_difference(torch.from_numpy(extractor.at_rate(chunk, config.sampling_rate)), waveform, config))
        write_audio(processor, model, torch.cat(waveforms), output, frames)
        used = config.audio_tokenizer_config.codebook_sizes[:num_codebooks]
        typer.echo(
            f"codes: {sum(frames)} frames x {len(used)} codebooks at {config.audio_tokenizer_config.frame_rate:g} Hz, "
            f"{bits_per_second(config, used):.1f} bit/s"
        )
        typer.echo(f"mel error: {torch.cat(errors).mean():.3f} (mean absolute difference of the natural-log mels)")


def mel_difference(source: torch.Tensor, result: torch.Tensor, config: BaichuanAudioConfig) -> torch.Tensor:
    """Absolute difference of two waveforms' log-mels over the frames both have: (frames, mel_bins)."""
    flow = config.flow_matching_config
    mels = [
        vocoder_log_mel(waveform[None], flow.sampling_rate, flow.hop_length, num_mel_bins=flow.num_mel_bins)[0]
        for waveform in (source, result)
    ]
    frames = min(len(mel) for mel in mels)
    return (mels[0][:frames] - mels[1][:frames]).abs()
