import math
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from modeling_baichuan_audio.evaluation.clips import TestClip
from modeling_baichuan_audio.evaluation.codec import MEL_DECODER, VOCODER, Codec, flow_task
from modeling_baichuan_audio.evaluation.noise import noise_twins
from modeling_baichuan_audio.evaluation.subject import clip_seed
from modeling_baichuan_audio.training.own_mels import as_vocoder_mel


SPEECH = Path(__file__).parents[2] / "examples" / "question.wav"


@pytest.fixture
def codec(subject):
    return Codec(subject)


@pytest.fixture
def clips(sets):
    return sets.voices


@pytest.fixture
def speech():
    return TestClip("speech", "", "", "allison", SPEECH, soundfile.info(SPEECH).duration)


def test_the_mel_decoders_target_becomes_the_vocoders_mel(codec, speech):
    """On real speech: no bias beyond what windows explain, and an error far below that of any codec."""
    refined, wide = codec.targets(speech, codec.encode([speech])[0].shape[1])
    converted = as_vocoder_mel(refined, len(wide), codec.config.audio_tokenizer_config, codec.config.flow_matching_config)
    assert converted.shape == wide.shape
    # The two floors differ: Whisper's is 8 decades below the loudest bin.
    loud = wide > wide.max() - 7
    assert float(loud.float().mean()) > 0.3
    difference = (converted - wide)[loud]
    assert abs(float(difference.mean())) < 0.1
    assert float(difference.abs().mean()) < 0.25
    # One frame, 20 ms, of delay would show.
    assert float((converted[1:] - wide[:-1])[loud[:-1]].abs().mean()) > 1.3 * float(difference.abs().mean())
    assert float((converted[:-1] - wide[1:])[loud[1:]].abs().mean()) > 1.3 * float(difference.abs().mean())


def test_a_louder_recording_gives_a_louder_mel(codec):
    parts = (codec.config.audio_tokenizer_config, codec.config.flow_matching_config)
    mel = torch.rand(20, 80)
    # Ten times the amplitude are two decades of power, half a unit of the features' scale.
    louder = as_vocoder_mel(mel + 0.5, 16, *parts) - as_vocoder_mel(mel, 16, *parts)
    assert torch.allclose(louder, torch.full_like(louder, math.log(10)), atol=1e-4)


def test_codes(codec, clips):
    first, second = codec.encode(clips)
    samples = codec.extractor.read_audio(clips[0].path)
    features = codec.extractor(samples, return_tensors="pt")
    alone = codec.model.get_audio_codes(features["input_features"], features["input_features_mask"])[0]
    assert torch.equal(first, alone) and second.shape[1] == codec.extractor.num_frames(
        len(codec.extractor.read_audio(clips[1].path))
    )


def test_clips_of_more_than_a_chunk_are_refused(codec, clips, tmp_path):
    long = tmp_path / "long.wav"
    soundfile.write(long, torch.zeros(31 * 8000).numpy(), 8000)
    with pytest.raises(ValueError, match="at most 30 s"):
        codec.encode([TestClip("long", "", "", "ann", long, 31.0)])


def wave(codec, task, clip):
    samples, rate = soundfile.read(codec.outputs.wav(task, clip.id), dtype="float32")
    assert rate == codec.config.sampling_rate
    return torch.from_numpy(samples)


@torch.no_grad()
@pytest.mark.parametrize("codebooks", [1, 8])
def test_flow_matching_is_what_decode_audio_gives(codec, clips, codebooks):
    items = codec.flow_matching(clips, codebooks)
    codes = codec.encode(clips)
    seeds = [clip_seed(0, clip.id) for clip in clips]
    for clip, expected in zip(clips, codec.model.decode_audio(codes, seed=seeds, num_codebooks=codebooks)):
        assert torch.allclose(wave(codec, flow_task(codebooks), clip), expected, atol=1e-4)
    for clip, row, item in zip(clips, codes, items):
        refined, wide = codec.targets(clip, row.shape[1])
        decoded = codec.model.audio_tokenizer.decode(row[None], codebooks)
        error, frames = item["refined"]
        assert frames == len(refined) == decoded.refined_mel.shape[1]
        assert error == pytest.approx(float((decoded.refined_mel[0] - refined).abs().mean()), rel=1e-4)
        flow = codec.model.flow_matching(decoded.hidden_states, seed=clip_seed(0, clip.id))
        assert item["prior"] == [pytest.approx(float((flow.condition[0] - wide).abs().mean()), rel=1e-4), len(wide)]
        assert item["flow"] == [pytest.approx(float((flow.mel[0] - wide).abs().mean()), rel=1e-4), len(wide)]


@torch.no_grad()
def test_the_other_ways(codec, clips):
    codec.mel_decoder(clips)
    codec.vocoder_alone(clips)
    parts = (codec.config.audio_tokenizer_config, codec.config.flow_matching_config)
    for clip, row in zip(clips, codec.encode(clips)):
        frames, seed = 4 * row.shape[1] - 1, clip_seed(0, clip.id)
        mel = as_vocoder_mel(codec.model.audio_tokenizer.decode(row[None]).refined_mel[0], frames, *parts)
        for task, given in ((MEL_DECODER, mel), (VOCODER, codec.targets(clip, row.shape[1])[1])):
            expected = codec.vocoder(given[None], seed=seed).waveform[0]
            assert torch.allclose(wave(codec, task, clip), expected, atol=1e-3)


def test_the_mels_of_noise(codec, clips, tmp_path):
    noise = noise_twins(clips, tmp_path / "noise")
    floor = codec.mel_floor(clips, noise)
    frames = codec.encode(clips)[0].shape[1]
    real, other = codec.targets(clips[0], frames), codec.targets(noise[0], frames)
    for name, one, two in zip(("refined", "flow"), real, other):
        error, count = floor[name][0]
        assert error == pytest.approx(float((one - two).abs().mean())) and error > 0.2 and count == len(one)
    assert all(error == 0 for errors in codec.mel_floor(clips, clips).values() for error, _ in errors)


def test_a_checkpoint_without_a_vocoder_is_refused(subject, tiny):
    tiny.vocoder = None
    with pytest.raises(ValueError, match="no vocoder"):
        Codec(replace(subject, model=tiny))
