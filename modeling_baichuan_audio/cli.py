"""The command `baichuan-audio`: a thin layer over the public API."""

import importlib.util
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from .configuration_baichuan_audio import BaichuanAudioConfig
from .conversion import build_checkpoint, convert_checkpoint, default_checkpoint, find_checkpoint
from .conversion.convert import DTYPES
from .mel_spectrogram import vocoder_log_mel
from .modeling_baichuan_audio import BaichuanAudioForCausalLM
from .processors.processing_baichuan_audio import DEFAULT_VOICE_PROMPT


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Baichuan-Audio: speech and text in, speech and text out.",
)

Checkpoint = Annotated[
    Optional[str],
    typer.Option("--checkpoint", "-c", help="Folder or Hub id. Without one: a small untrained checkpoint, made on this machine."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Sound file to write; the format follows the ending.")]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1", "mps", ...')]
Dtype = Annotated[str, typer.Option(help='"auto" (the checkpoint\'s), "float32", "bfloat16" or "float16".')]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token instead of sampling.")]
MaxNewTokens = Annotated[Optional[int], typer.Option(min=1, help="Longest reply, in text tokens and 80 ms audio frames.")]


@contextmanager
def one_line_errors():
    """Turns the errors of bad input into one line on standard error and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        typer.echo(f"baichuan-audio: {message}", err=True)
        raise typer.Exit(2) from None


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of config entries.")
    return values


def require_training_extra() -> None:
    missing = [name for name in ("accelerate", "datasets", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'Training needs {", ".join(missing)}: pip install "baichuan-audio[train]".')


def resolve_device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(checkpoint: str | None, device: str, dtype: str) -> tuple[BaichuanAudioForCausalLM, object]:
    """Model and processor; says plainly when the untrained stand-in is used."""
    target = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}, got {dtype}.")
    if checkpoint is None:
        checkpoint = default_checkpoint()
        typer.echo(
            f"No checkpoint named: using the small UNTRAINED one in {checkpoint}. What it says means nothing; "
            "name a real one with --checkpoint.",
            err=True,
        )
    folder = find_checkpoint(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES.get(dtype, "auto"))
    if not isinstance(model, BaichuanAudioForCausalLM):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a Baichuan-Audio model.")
    return model.to(target), AutoProcessor.from_pretrained(folder)


class StepProgress(StoppingCriteria):
    """Moves a progress bar by one at every generation step; never stops anything."""

    def __init__(self, total: int | None):
        self.bar = tqdm(total=total, unit="step", desc="generating", leave=False, disable=not sys.stderr.isatty())

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        self.bar.update(1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: BaichuanAudioForCausalLM, inputs, max_new_tokens: int | None = None, greedy: bool = False, **kwargs):
    """`model.generate` with a progress bar."""
    if max_new_tokens is not None:
        kwargs["max_new_tokens"] = max_new_tokens
    if greedy:
        kwargs |= {"do_sample": False}
    progress = StepProgress(max_new_tokens or model.generation_config.max_new_tokens)
    try:
        return model.generate(**inputs.to(model.device), stopping_criteria=StoppingCriteriaList([progress]), **kwargs)
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


def bits_per_second(config: BaichuanAudioConfig, codebook_sizes: list[int]) -> float:
    return config.audio_tokenizer_config.frame_rate * sum(math.log2(size) for size in codebook_sizes)


@app.callback()
def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def reply(
    question: Annotated[Optional[Path], typer.Argument(help="Recording of the question, any rate, channels and length.")] = None,
    output: Output = Path("answer.wav"),
    text: Annotated[Optional[str], typer.Option(help="Question in writing, instead of or after the recording.")] = None,
    system: Annotated[str, typer.Option(help="System prompt; it also chooses the voice.")] = DEFAULT_VOICE_PROMPT,
    checkpoint: Checkpoint = None,
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
        switch = model.generation_config.audio_switch_token_ids or processor.audio_switch_token_ids()
        result = generate(
            model, inputs, max_new_tokens, greedy, generation_mode="audio", seed=seed, audio_switch_token_ids=switch
        )
        typer.echo(f"text: {reply_text(processor, result.segments[0])}")
        write_audio(processor, model, result.audio[0], output, piece_frames(result.segments[0]))


@app.command()
def transcribe(
    recordings: Annotated[list[Path], typer.Argument(help="Recordings, any rate, channels and length.")],
    checkpoint: Checkpoint = None,
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
            sequences = generate(model, inputs, max_new_tokens, greedy=True, repetition_penalty=1.0)
            spoken = printable(processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            typer.echo(f"{path}\t{spoken}" if len(recordings) > 1 else spoken)


@app.command()
def speak(
    text: Annotated[str, typer.Argument(help="What to say.")],
    output: Output = Path("speech.wav"),
    checkpoint: Checkpoint = None,
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
        # The original allows 700 frames a piece here; the untrained stand-in sets a shorter limit of its own.
        limit = max_audio_frames or (700 if checkpoint else model.generation_config.max_audio_frames)
        pieces = 1 + len(inputs["forced_text_ids"][0])
        budget = pieces * (limit + 2) + sum(map(len, inputs["forced_text_ids"][0]))
        result = generate(model, inputs, budget, greedy, generation_mode="audio", seed=seed, max_audio_frames=limit)
        write_audio(processor, model, result.audio[0], output, piece_frames(result.segments[0]))


@app.command()
def resynthesize(
    recording: Annotated[Path, typer.Argument(help="Recording, any rate, channels and length.")],
    output: Output = Path("resynthesized.wav"),
    checkpoint: Checkpoint = None,
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


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Original (or converted) checkpoint: folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    hift: Annotated[
        Optional[Path], typer.Option(help="hift.pt of CosyVoice 2: the vocoder, which the checkpoints do not carry.")
    ] = None,
    dtype: Annotated[Optional[str], typer.Option(help='"float32", "bfloat16" or "float16"; unchanged by default.')] = None,
) -> None:
    """Convert an original checkpoint, or add a vocoder to a converted one."""
    with one_line_errors():
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {dtype}.")
        with tqdm(unit="B", unit_scale=True, desc="converting", leave=False, disable=not sys.stderr.isatty()) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = convert_checkpoint(checkpoint, output, hift, None if dtype is None else DTYPES[dtype], progress)
        typer.echo(
            f"{output}: {report.tensors} tensors, {report.total_bytes / 1e9:.2f} GB in {len(report.shards)} files; "
            f"{report.dropped} unused tensors dropped, {report.vision} vision tensors ignored."
        )


@app.command()
def build(
    llm: Annotated[str, typer.Option(help="Any causal language model of transformers: folder or Hub id.")],
    encoder: Annotated[str, typer.Option(help="Any Whisper checkpoint: folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    config: Annotated[
        Optional[Path], typer.Option(help="YAML or JSON file of config entries that win over the derived ones.")
    ] = None,
    vocoder: Annotated[Optional[str], typer.Option(help="hift.pt, or a folder with a vocoder.")] = None,
    seed: Seed = 0,
    dtype: Annotated[Optional[str], typer.Option(help='"float32", "bfloat16" or "float16"; the sources\' by default.')] = None,
) -> None:
    """Start a new speech model from a language model and a Whisper encoder."""
    with one_line_errors():
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"--dtype must be {', '.join(DTYPES)}, got {dtype}.")
        overrides = None if config is None else read_yaml(config)
        report = build_checkpoint(llm, encoder, output, overrides, vocoder, seed, None if dtype is None else DTYPES[dtype])
        typer.echo(
            f"{output}: {report.parameters:,} parameters; {report.llm_tensors} tensors from the language model, "
            f"{report.encoder_tensors} from the encoder, {report.new_tensors} new; vocabulary {report.vocab_size}."
        )


@app.command()
def tokenize(
    data: Annotated[list[str], typer.Argument(help="JSONL or Parquet files, folders or Hub ids; see docs/data.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the Parquet shards.")],
    checkpoint: Checkpoint = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Rows of a shard.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks of at most 30 s encoded at once.")] = 8,
    max_tokens: Annotated[Optional[int], typer.Option(min=1, help="Skip longer rows.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as they come.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Replace the audio of training rows by its codes, once; goes on where it was interrupted."""
    with one_line_errors():
        require_training_extra()
        from .training.pretokenize import pretokenize

        model, processor = load(checkpoint, device, dtype)
        with tqdm(unit="row", desc="tokenizing", leave=False, disable=not sys.stderr.isatty()) as bar:

            def progress(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            settings = {"shard_size": shard_size, "batch_size": batch_size, "max_tokens": max_tokens, "streaming": streaming}
            summary = pretokenize(data, model.audio_tokenizer, processor, output, progress=progress, **settings)
        skipped = sum(summary["skipped"].values())
        typer.echo(
            f"{output}: {summary['rows_written']} rows in {summary['shards']} shards, {summary['audio_frames']} frames "
            f"({summary['audio_hours']:.2f} h); {skipped} rows skipped {summary['skipped'] or ''}".rstrip()
        )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help='YAML file, or a shipped recipe: "stage1", "lora", "tiny/stage1", ...')],
    changes: Annotated[
        Optional[list[str]], typer.Argument(help="Settings that win over the recipe's, as section.key=value.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = True,
) -> None:
    """Train a part of the model from a recipe; also under torchrun and accelerate launch."""
    with one_line_errors():
        require_training_extra()
        from .training.recipe import read_recipe
        from .training.run import train as run_recipe

        logging.set_verbosity_warning()
        settings = read_recipe(recipe, changes)
        summary = run_recipe(settings, resume)
        skipped = sum(summary["rows_skipped"].values())
        typer.echo(
            f"{summary['final']}: {summary['trained_parameters']:,} parameters trained, final loss {summary['train_loss']:.4f}; "
            f"{skipped} rows skipped {summary['rows_skipped'] or ''}".rstrip()
        )


@app.command()
def info(
    checkpoint: Annotated[Optional[str], typer.Argument(help="Folder or Hub id; the untrained one by default.")] = None,
) -> None:
    """Say what a checkpoint holds, from its config alone."""
    with one_line_errors():
        folder = default_checkpoint() if checkpoint is None else find_checkpoint(checkpoint)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: it is not a checkpoint.")
        config = BaichuanAudioConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = BaichuanAudioForCausalLM(config)
        parts = {
            "language model": model.model.language_model,
            "text head": model.lm_head,
            "audio embeddings": model.model.audio_embed_layers,
            "audio tokenizer": model.audio_tokenizer,
            "audio head": model.audio_head,
            "flow matching": model.flow_matching,
            "vocoder": model.vocoder,
        }
        tokenizer = config.audio_tokenizer_config
        typer.echo(f"checkpoint: {folder}")
        typer.echo(
            f"language model: {config.text_config.model_type}, {config.text_config.num_hidden_layers} layers, "
            f"width {config.text_config.hidden_size}, vocabulary {config.text_config.vocab_size}"
        )
        typer.echo(
            f"codes: {tokenizer.num_codebooks} codebooks of {tokenizer.codebook_sizes} at {tokenizer.frame_rate:g} Hz, "
            f"{bits_per_second(config, tokenizer.codebook_sizes):.1f} bit/s"
        )
        typer.echo(
            f"audio in: {tokenizer.sampling_rate} Hz, chunks of {tokenizer.max_audio_seconds} s; audio out: {config.sampling_rate} Hz"
        )
        for name, part in parts.items():
            if part is None:
                typer.echo(f"{name}: none (add one with `baichuan-audio convert {folder} OUTPUT --hift hift.pt`)")
            else:
                typer.echo(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
        typer.echo(f"total: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    app()
