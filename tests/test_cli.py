import re

import numpy as np
import pytest
import soundfile
from helpers.golden import golden
from typer.testing import CliRunner

from modeling_baichuan_audio.cli import app


runner = CliRunner()


@pytest.fixture
def recording(tmp_path):
    """Five seconds at another rate, in stereo."""
    path = tmp_path / "in.wav"
    samples = np.repeat(golden()["wave.2"].numpy()[:, None], 2, axis=1)
    soundfile.write(path, samples, 16000)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def expected_samples(frames: int, pieces: int) -> int:
    """Frames of a reply -> samples: 4 F - 1 mel frames of 480 samples a piece, pieces overlapping by 10 ms."""
    return 1920 * frames - 480 * pieces - 240 * (pieces - 1)


def check_sound(path, output: str) -> None:
    frames, pieces, samples = map(int, re.search(r"\((\d+) frames in (\d+) pieces, (\d+) samples", output).groups())
    waveform, rate = soundfile.read(path)
    assert rate == 24000 and waveform.shape == (samples,)
    assert samples == expected_samples(frames, pieces)
    assert 1e-4 < np.abs(waveform).max() <= 0.99 + 1 / 2**15  # as 16-bit integers


def test_reply(recording, tiny_folder, tmp_path):
    first = run("reply", recording, "-o", tmp_path / "a.wav", "-c", tiny_folder, "--seed", 3)
    check_sound(tmp_path / "a.wav", first.stdout)
    assert "UNTRAINED" not in first.stderr
    again = run("reply", recording, "-o", tmp_path / "b.wav", "-c", tiny_folder, "--seed", 3)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert first.stdout.splitlines()[0] == again.stdout.splitlines()[0]
    other = run("reply", recording, "-o", tmp_path / "c.wav", "-c", tiny_folder, "--seed", 4)
    assert other.stdout.splitlines()[0] != first.stdout.splitlines()[0]
    short = run("reply", "--text", "hi", "-o", tmp_path / "d.flac", "-c", tiny_folder, "--max-new-tokens", 30, "--greedy")
    check_sound(tmp_path / "d.flac", short.stdout)


def test_the_untrained_checkpoint_is_announced(recording, tmp_path):
    result = run("reply", recording, "-o", tmp_path / "a.wav", "-c", "untrained")
    assert "UNTRAINED" in result.stderr and "means nothing" in result.stderr
    check_sound(tmp_path / "a.wav", result.stdout)


def test_transcribe(recording, tiny_folder):
    one = run("transcribe", recording, "-c", tiny_folder, "--max-new-tokens", 12)
    two = run("transcribe", recording, recording, "-c", tiny_folder, "--max-new-tokens", 12)
    assert two.stdout.count(str(recording)) == 2
    assert one.stdout.strip() in two.stdout


def test_speak(tiny_folder, tmp_path):
    text = "One sentence, long enough. Another one, as long."
    result = run("speak", text, "-o", tmp_path / "s.wav", "-c", tiny_folder, "--max-audio-frames", 5)
    check_sound(tmp_path / "s.wav", result.stdout)
    assert "in 2 pieces" in result.stdout or "in 3 pieces" in result.stdout


def test_resynthesize(recording, tiny_folder, tmp_path):
    result = run("resynthesize", recording, "-o", tmp_path / "r.wav", "-c", tiny_folder, "--num-steps", 2)
    waveform, rate = soundfile.read(tmp_path / "r.wav")
    assert rate == 24000 and len(waveform) == (4 * 62 - 1) * 480
    assert "62 frames x 8 codebooks at 12.5 Hz, 437.5 bit/s" in result.stdout
    assert 0 < float(re.search(r"mel error: ([0-9.]+)", result.stdout)[1]) < 20
    fewer = run("resynthesize", recording, "-o", tmp_path / "f.wav", "-c", tiny_folder, "--num-codebooks", 1, "--num-steps", 2)
    assert "62 frames x 1 codebooks at 12.5 Hz, 75.0 bit/s" in fewer.stdout
    assert (tmp_path / "f.wav").read_bytes() != (tmp_path / "r.wav").read_bytes()


def test_convert_and_info(original_folder, tmp_path):
    hift = original_folder.parent / "hift-cli.pt"
    from helpers.golden import write_hift

    write_hift(hift)
    before = run("info", original_folder)
    assert "vocoder: none" in before.stdout and "audio head: 4,763,040 parameters" in before.stdout
    result = run("convert", original_folder, tmp_path / "out", "--hift", hift, "--dtype", "bfloat16")
    assert "7 unused tensors dropped" in result.stdout
    assert "vocoder: none" not in run("info", tmp_path / "out").stdout
    assert "exists already" in run("convert", original_folder, tmp_path / "out", code=2).stderr


def test_tokenize(tiny_folder, recording, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"task": "asr", "segments": [{"audio": "in.wav"}, {"text": "hello"}]}\n{"task": "nonsense"}\n')
    result = run("tokenize", rows, "-o", tmp_path / "codes", "-c", tiny_folder)
    assert "1 rows in 1 shards, 62 frames" in result.stdout and "1 rows skipped" in result.stdout
    again = run("tokenize", rows, "-o", tmp_path / "codes", "-c", tiny_folder)
    assert again.stdout == result.stdout
    assert (
        "begun with other settings"
        in run("tokenize", rows, "-o", tmp_path / "codes", "-c", tiny_folder, "--shard-size", 5, code=2).stderr
    )


def test_build(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig, WhisperModel

    from modeling_baichuan_audio.conversion import tiny_tokenizer

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    whisper = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 128}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0}
    WhisperModel(WhisperConfig(**whisper, **decoder, decoder_start_token_id=1)).save_pretrained(tmp_path / "whisper")
    overrides = tmp_path / "config.yaml"
    overrides.write_text(
        "flow_matching_config: {prenet_hidden_size: 32, prenet_layers: 1, estimator_channels: 32}\nvocoder_config: {}\n"
    )
    sources = ["--llm", tmp_path / "llm", "--encoder", tmp_path / "whisper", "--config", overrides]
    result = run("build", *sources, tmp_path / "built")
    assert "from the language model" in result.stdout
    assert "language model: qwen2, 1 layers, width 32" in run("info", tmp_path / "built").stdout
    assert "exists" in run("build", *sources, tmp_path / "built", code=2).stderr
    overrides.write_text("- 1")
    assert "must be a mapping" in run("build", *sources, tmp_path / "other", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reply"], "Give a recording"),
        (["reply", "nowhere.wav"], "nowhere.wav does not exist"),
        (["reply", "{recording}", "-o", "x.txt"], "must end in"),
        (["reply", "{recording}", "-o", "/nowhere/x.wav"], "folder of /nowhere/x.wav does not exist"),
        (
            ["reply", "{recording}", "-c", "/nowhere"],
            "/nowhere is neither a folder nor a Hub repository, nor miniature or untrained",
        ),
        (["reply", "{recording}", "-c", "{folder}"], "has no config.json"),
        (["reply", "{recording}", "--device", "abacus"], "--device abacus"),
        (["reply", "{recording}", "--dtype", "int3"], "--dtype must be"),
        (["transcribe", "nowhere.wav"], "does not exist"),
        (["transcribe", "{text}"], "cannot be decoded"),
        (["speak", " "], "nothing to speak"),
        (["resynthesize", "{recording}", "--num-codebooks", "9"], "1 to 8"),
        (["convert", "/nowhere", "out"], "neither a folder nor"),
        (["convert", "{folder}", "out", "--dtype", "int3"], "--dtype must be"),
        (["info", "{folder}"], "has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.wav").write_text("no sound")
    places = {"recording": recording, "folder": tmp_path / "empty", "text": tmp_path / "text.wav"}
    result = run(*[argument.format(**places) for argument in arguments], code=2)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Using the miniature")]
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("baichuan-audio: ")
    assert not list(tmp_path.glob("*.part*"))
