"""The feature extractor against the golden tensors, an independent numpy version, and every packaging of audio."""

import base64
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from helpers.golden import clip_keys, golden, golden_json
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor

from modeling_baichuan_audio.processors import BaichuanAudioFeatureExtractor


RATE = 16000
WAVES = ("wave.0", "wave.1", "wave.2")


@pytest.fixture(scope="module")
def extractor():
    return BaichuanAudioFeatureExtractor()


@pytest.fixture(scope="module")
def short_extractor():
    """Chunks of 2 seconds."""
    return BaichuanAudioFeatureExtractor(max_audio_seconds=2)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that 16-bit samples hold exactly, so that no packaging may change it."""
    return np.random.default_rng(seed).integers(-8000, 8000, samples).astype(np.int16) / np.float32(32768)


def as_int16(waveform: np.ndarray) -> np.ndarray:
    return (waveform * 32768).astype(np.int16)


def encoded(waveform: np.ndarray, rate: int = RATE, file_format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, as_int16(waveform), rate, format=file_format)
    return buffer.getvalue()


def features_of(batch, index: int) -> np.ndarray:
    """(128, L): what the mask keeps of one chunk."""
    return np.asarray(batch["input_features"])[index][:, np.asarray(batch["input_features_mask"])[index].astype(bool)]


# MODEL.md, section 2, once more and as plainly as possible.


def expected_lengths(samples: int, max_seconds: int) -> list[tuple[int, int, int]]:
    """(L, encoder_length, frames) of every chunk that is kept."""
    size, lengths = max_seconds * RATE, []
    while samples > 0:
        piece, samples = min(samples, size), samples - size
        mel_frames = min(max_seconds * 100, piece // 160 + 1)
        encoder_length = (mel_frames - 1) // 2 + 1
        if piece >= 400 and encoder_length // 4 > 0:
            lengths.append((mel_frames, encoder_length, encoder_length // 4))
    return lengths


def slaney_filters(bins: int = 128, n_fft: int = 400) -> np.ndarray:
    """(bins, n_fft / 2 + 1): triangles of equal area on Slaney's mel scale (linear below 1 kHz, logarithmic above)."""

    def to_hz(mel):
        return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))

    top = 15.0 + 27.0 * np.log(RATE / 2 / 1000.0) / np.log(6.4)
    edges = to_hz(np.linspace(0.0, top, bins + 2))
    frequencies = np.arange(n_fft // 2 + 1) * RATE / n_fft
    filters = np.zeros((bins, len(frequencies)))
    for index, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:])):
        rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
        filters[index] = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)
    return filters


def expected_features(waveform: np.ndarray, max_seconds: int) -> np.ndarray:
    padded = np.zeros(max_seconds * RATE)
    padded[: len(waveform)] = waveform
    padded = np.pad(padded, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160] * window
    power = np.abs(np.fft.rfft(frames)[:-1]) ** 2
    mel = np.log10(np.maximum(slaney_filters() @ power.T, 1e-10))
    mel = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    return mel[:, : min(max_seconds * 100, len(waveform) // 160 + 1)]


# Golden tensors.


@pytest.mark.parametrize("index", range(3))
def test_features_equal_the_golden_ones(index):
    extractor = BaichuanAudioFeatureExtractor(max_audio_seconds=4)
    batch = extractor(golden()[f"wave.{index}"].numpy(), return_tensors="pt")
    chunks = int(golden()[f"wave.{index}.num_chunks"])
    assert batch["input_features"].shape[0] == chunks == len([key for key in clip_keys() if key.startswith(f"{index}.")])
    for chunk in range(chunks):
        mel_frames, _, _ = golden()[f"lengths.{index}.{chunk}"].tolist()
        assert int(batch["input_features_mask"][chunk].sum()) == mel_frames
        np.testing.assert_allclose(features_of(batch, chunk), golden()[f"features.{index}.{chunk}"].numpy(), atol=1e-4)
    assert batch["num_frames"] == [sum(int(golden()[f"lengths.{index}.{chunk}"][2]) for chunk in range(chunks))]


@pytest.mark.parametrize("index", range(3))
def test_the_golden_lengths_follow_from_the_formulas(index):
    lengths = expected_lengths(len(golden()[f"wave.{index}"]), max_seconds=4)
    assert lengths == [tuple(golden()[f"lengths.{index}.{chunk}"].tolist()) for chunk in range(len(lengths))]
    assert len(lengths) == int(golden()[f"wave.{index}.num_chunks"])


def test_all_golden_waves_in_one_batch():
    batch = BaichuanAudioFeatureExtractor(max_audio_seconds=4)([golden()[name] for name in WAVES])
    assert batch["num_frames"] == [6, 15, 62]
    for chunk, key in enumerate(clip_keys()):
        np.testing.assert_allclose(features_of(batch, chunk), golden()[f"features.{key}"].numpy(), atol=1e-4)


def test_settings_from_an_original_config():
    loaded = BaichuanAudioFeatureExtractor.from_dict(
        BaichuanAudioFeatureExtractor.settings_from_original(golden_json()["config"]["audio_config"])
    )
    assert loaded.max_audio_seconds == 4
    np.testing.assert_allclose(features_of(loaded(golden()["wave.2"]), 1), golden()["features.2.1"].numpy(), atol=1e-4)


# Independence of clips, and the formula.


@pytest.mark.parametrize("samples", [960, 5000, 31999, 32000])
def test_features_equal_an_independent_version(short_extractor, samples):
    waveform = noise(samples)
    computed = features_of(short_extractor(waveform), 0)
    np.testing.assert_allclose(computed, expected_features(waveform, max_seconds=2), atol=1e-5)


def test_features_of_near_silence_after_a_loud_start_equal_an_independent_version(extractor):
    # The floor lies 8 below the maximum of the whole chunk: it cuts here.
    waveform = np.concatenate([noise(4000), 1e-6 * noise(12000, seed=1)])
    computed = features_of(extractor(waveform), 0)
    np.testing.assert_allclose(computed, expected_features(waveform, max_seconds=30), atol=1e-5)
    assert computed.min() == pytest.approx(computed.max() - 2.0, abs=1e-6)


def test_features_of_digital_silence():
    batch = BaichuanAudioFeatureExtractor()(np.zeros(RATE, dtype=np.float32))
    np.testing.assert_allclose(features_of(batch, 0), (np.log10(1e-10) + 4) / 4, atol=1e-6)


def test_a_clip_in_a_batch_equals_the_clip_alone(short_extractor):
    clips = [noise(12345), noise(70000, seed=1), 0.01 * noise(1000, seed=2), noise(32000, seed=3)]
    batch = short_extractor(clips, return_tensors="pt")
    alone = [short_extractor(clip, return_tensors="pt") for clip in clips]
    chunks = iter(range(len(batch["input_features"])))
    for one in alone:
        for index in range(len(one["input_features"])):
            np.testing.assert_array_equal(features_of(batch, next(chunks)), features_of(one, index))
    assert next(chunks, None) is None
    assert batch["num_frames"] == [one["num_frames"][0] for one in alone]


@pytest.mark.parametrize("padding_value", [0.0, -1.5])
def test_padding_is_masked_and_holds_the_padding_value(padding_value):
    batch = BaichuanAudioFeatureExtractor(padding_value=padding_value)([noise(1600), noise(16000)], return_tensors="pt")
    assert batch["input_features"].shape == (2, 128, 101)
    assert batch["input_features"].dtype == torch.float32
    assert batch["input_features_mask"].dtype == torch.int64
    assert batch["input_features_mask"][0].tolist() == [1] * 11 + [0] * 90
    assert batch["input_features_mask"][1].all()
    assert (batch["input_features"][0, :, 11:] == padding_value).all()


def test_chunks_are_cut_without_overlap(short_extractor):
    waveform = noise(80000)
    batch = short_extractor(waveform)
    for index in range(3):
        piece = waveform[index * 32000 : (index + 1) * 32000]
        np.testing.assert_array_equal(features_of(batch, index), features_of(short_extractor(piece), 0))
    assert batch["num_frames"] == [25 + 25 + 12]


@pytest.mark.parametrize("rest, chunks, frames", [(399, 1, 25), (400, 1, 25), (959, 1, 25), (960, 2, 26)])
def test_a_rest_too_short_for_a_frame_is_dropped(short_extractor, rest, chunks, frames):
    batch = short_extractor(noise(32000 + rest))
    assert len(batch["input_features"]) == chunks
    assert batch["num_frames"] == [frames]


def test_return_tensors(extractor):
    assert isinstance(extractor(noise(1600), return_tensors="pt")["input_features"], torch.Tensor)
    as_numpy = extractor(noise(1600), return_tensors="np")
    assert isinstance(as_numpy["input_features"], np.ndarray) and isinstance(as_numpy["input_features_mask"], np.ndarray)


# Packaging.


class Decoder:
    """What the `datasets` library hands out for an audio column."""

    def __init__(self, waveform: np.ndarray, rate: int):
        self.samples = SimpleNamespace(data=torch.from_numpy(waveform)[None], sample_rate=rate)

    def get_all_samples(self):
        return self.samples


def two_channels(waveform: np.ndarray) -> np.ndarray:
    """(2, n) whose average is `waveform`, exactly."""
    return np.stack([2 * waveform, np.zeros_like(waveform)])


PACKAGINGS = {
    "float64": lambda x: x.astype(np.float64),
    "tensor": torch.from_numpy,
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "float64 tensor": lambda x: torch.from_numpy(x).double(),
    "list of floats": lambda x: x.tolist(),
    "tuple of floats": lambda x: tuple(x.tolist()),
    "list of numpy scalars": list,
    "list of ints": lambda x: as_int16(x).tolist(),
    "int16": as_int16,
    "int16 tensor": lambda x: torch.from_numpy(as_int16(x)),
    "int32": lambda x: as_int16(x).astype(np.int32) * 65536,
    "bytes": encoded,
    "bytearray": lambda x: bytearray(encoded(x)),
    "BytesIO": lambda x: io.BytesIO(encoded(x)),
    "flac bytes": lambda x: encoded(x, file_format="FLAC"),
    "stereo bytes": lambda x: encoded(two_channels(x).T),
    "base64": lambda x: base64.b64encode(encoded(x)).decode(),
    "data URL": lambda x: "data:audio/wav;base64," + base64.b64encode(encoded(x)).decode(),
    "dict with array": lambda x: {"array": x, "sampling_rate": RATE, "path": None},
    "dict with list": lambda x: {"array": x.tolist()},
    "dict with bytes": lambda x: {"bytes": encoded(x), "path": "not/here.wav"},
    "decoder": lambda x: Decoder(x, RATE),
    "(1, n)": lambda x: x[None],
    "(2, n)": two_channels,
    "(n, 2)": lambda x: two_channels(x).T,
    "(2, n) int16": lambda x: as_int16(two_channels(x)),
    "(2, n) tensor": lambda x: torch.from_numpy(two_channels(x)),
    "(8, n)": lambda x: np.tile(x, (8, 1)),
}


@pytest.mark.parametrize("name", PACKAGINGS)
def test_every_packaging_gives_the_same_features(extractor, name):
    waveform = noise(8000)
    one, listed = extractor(PACKAGINGS[name](waveform)), extractor([PACKAGINGS[name](waveform), waveform[:1600]])
    expected = extractor(waveform)
    # The samples are whole 16-bit numbers: nothing is lost on the way.
    np.testing.assert_array_equal(one["input_features"], expected["input_features"])
    np.testing.assert_array_equal(features_of(listed, 0), features_of(expected, 0))
    assert (one["num_frames"], listed["num_frames"]) == ([6], [6, 1])


@pytest.mark.parametrize("wrap", [str, Path, lambda path: {"path": str(path), "bytes": None}, lambda path: path.open("rb")])
def test_files_give_the_same_features(extractor, tmp_path, wrap):
    path = tmp_path / "speech.wav"
    path.write_bytes(encoded(noise(8000)))
    np.testing.assert_array_equal(extractor(wrap(path))["input_features"], extractor(noise(8000))["input_features"])


def test_half_precision_is_close(extractor):
    waveform = noise(8000)
    for half in (torch.from_numpy(waveform).bfloat16(), torch.from_numpy(waveform).half(), waveform.astype(np.float16)):
        assert np.abs(extractor(half)["input_features"] - extractor(waveform)["input_features"]).max() < 0.05


def test_lists_of_integers_are_16_bit_samples(extractor):
    np.testing.assert_array_equal(extractor.read_audio([32767, -32768, 0]), np.float32([32767 / 32768, -1.0, 0.0]))
    for value in (32768, -32769, 10**9):
        with pytest.raises(ValueError, match="must be 16-bit samples"):
            extractor.read_audio([0, value])


def test_the_input_is_not_changed(extractor):
    waveform, integers = noise(8000), as_int16(noise(8000))
    extractor([waveform, integers])
    np.testing.assert_array_equal(waveform, noise(8000))
    np.testing.assert_array_equal(integers, as_int16(noise(8000)))


# Other sampling rates.


def tones(rate: int, seconds: float = 1.0) -> np.ndarray:
    """Four tones below 3.5 kHz, faded in and out."""
    time = np.arange(round(seconds * rate)) / rate
    return (np.sin(np.pi * time / seconds) * sum(np.sin(2 * np.pi * f * time) for f in (220, 710, 1500, 3100)) / 8).astype(
        np.float32
    )


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("packaging", ["argument", "dict", "file", "decoder"])
def test_other_rates_are_resampled(extractor, rate, packaging):
    waveform = tones(rate)
    if packaging == "argument":
        batch = extractor(waveform, sampling_rate=rate)
    elif packaging == "dict":
        batch = extractor({"array": waveform, "sampling_rate": rate})
    elif packaging == "decoder":
        batch = extractor(Decoder(waveform, rate))
    else:
        batch = extractor(encoded(waveform, rate))
    expected = features_of(extractor(tones(RATE)), 0)
    assert batch["num_frames"] == [12]
    assert features_of(batch, 0).shape == expected.shape == (128, 101)
    # Away from the faded ends, all that is less than 30 dB below the maximum.
    strong = expected[:, 10:91] > expected.max() - 0.75
    assert strong.sum() > 1500
    np.testing.assert_allclose(features_of(batch, 0)[:, 10:91][strong], expected[:, 10:91][strong], atol=1e-3)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampled_waveforms_have_the_right_samples(extractor, rate):
    resampled = extractor.read_audio(tones(rate), rate)
    assert len(resampled) == RATE and resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, tones(RATE), atol=1e-4)


def test_the_rate_of_a_file_counts_not_the_argument(extractor):
    content = encoded(noise(8000), rate=RATE)
    np.testing.assert_array_equal(extractor.read_audio(content, sampling_rate=8000), noise(8000))


def test_a_rate_can_stand_in_the_dict_or_in_the_argument_or_in_both(extractor):
    resampled = extractor.read_audio(tones(8000), 8000)
    for audio, rate in (
        ({"array": tones(8000), "sampling_rate": 8000}, None),
        ({"array": tones(8000), "sampling_rate": 8000}, 8000),
        ({"array": tones(8000), "sampling_rate": None}, 8000),
        ({"array": tones(8000)}, 8000),
    ):
        np.testing.assert_array_equal(extractor.read_audio(audio, rate), resampled)


@pytest.mark.parametrize("rate", [8000, np.int64(8000), 8000.0, np.float32(8000)])
def test_whole_rates_of_any_type_are_taken(extractor, rate):
    assert len(extractor.read_audio(tones(8000), rate)) == RATE


# Refusals.


@pytest.mark.parametrize(
    "audio, message",
    [
        ([], "Audio is empty"),
        (np.zeros(0, dtype=np.float32), "Audio is empty"),
        (np.zeros((2, 0), dtype=np.float32), "Audio is empty"),
        (np.append(noise(2000), np.float32("nan")), "NaN or infinite"),
        (np.append(noise(2000), np.float32("inf")), "NaN or infinite"),
        (np.append(noise(2000), -np.float32("inf")), "NaN or infinite"),
        (np.zeros((1, 2, 2000), dtype=np.float32), r"\(channels, samples\), got shape \(1, 2, 2000\)"),
        (np.float32(0.5), r"got shape \(\)"),
        ({"array": [[0.1, 0.2], [0.3]]}, "rows have different lengths"),
        ([[[0.1, 0.2], [0.3]]], "rows have different lengths"),
        (np.array(["a", "b"]), "float or 16- or 32-bit integer samples, got <U1"),
        (np.array([b"a", b"b"]), "integer samples, got [|]S1"),
        (np.zeros(2000, dtype=bool), "integer samples, got bool"),
        ([True, False] * 1000, "integer samples, got bool"),
        (np.zeros(2000, dtype=np.int8), "integer samples, got int8"),
        (np.zeros(2000, dtype=np.uint8), "integer samples, got uint8"),
        (np.zeros(2000, dtype=np.uint16), "integer samples, got uint16"),
        (torch.zeros(2000, dtype=torch.uint8), "integer samples, got uint8"),
        (np.zeros(2000, dtype=np.complex64), "integer samples, got complex64"),
        (None, "integer samples, got object"),
        ([0.1, None], "integer samples, got object"),
        (100 * noise(2000) / np.abs(noise(2000)).max(), r"lie in \[-1, 1\], got a peak of 100"),
        (np.array([0, 40000] * 1000), "must be 16-bit samples"),
        (np.zeros((9, 2000), dtype=np.float32), "would have 9 channels, 8 is the most"),
        (np.zeros((2000, 9), dtype=np.float32), "would have 9 channels, 8 is the most"),
        ("no/such/file.wav", "no/such/file.wav is no file, URL or base64 string"),
        (Path("no/such/file.wav"), "no/such/file.wav is no file, URL or base64 string"),
        ("/", "Audio / is no file"),
        ("", "is no file, URL or base64 string"),
        (b"", "0 bytes cannot be decoded"),
        (b"RIFF and then nothing", "21 bytes cannot be decoded"),
        (io.BytesIO(b"abcdefgh"), "cannot be decoded"),
        (base64.b64encode(b"not a sound").decode(), "cannot be decoded"),
        ("data:audio/wav;base64,%%%", "is no file, URL or base64 string"),
        ({}, 'needs "array", "bytes" or "path", got the keys \\[\\]'),
        ({"sampling_rate": RATE}, r'needs "array", "bytes" or "path", got the keys \[\'sampling_rate\'\]'),
        ({"array": None, "bytes": None, "path": None}, 'needs "array", "bytes" or "path"'),
        ({"path": "no/such/file.wav"}, "is no file"),
        ({"bytes": b"nothing"}, "7 bytes cannot be decoded"),
    ],
)
def test_unusable_audio_is_refused(extractor, audio, message):
    with pytest.raises(ValueError, match=message):
        extractor(audio)


def test_long_strings_are_not_repeated_in_messages(extractor):
    with pytest.raises(ValueError, match="is no file") as error:
        extractor("?" * 100000)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "rate", [0, -1, 999, 768001, 16000.5, "16k", "16000", float("nan"), float("inf"), 10, True, np.True_, 8000j]
)
def test_bad_rates_are_refused(extractor, rate):
    for audio, argument in ((noise(2000), rate), ({"array": noise(2000), "sampling_rate": rate}, None)):
        with pytest.raises(ValueError, match="`sampling_rate` must be a (whole )?number of Hz"):
            extractor(audio, sampling_rate=argument)


def test_contradicting_rates_are_refused(extractor):
    with pytest.raises(ValueError, match="says 8000 Hz but the audio's own entry says 16000 Hz"):
        extractor({"array": noise(2000), "sampling_rate": RATE}, sampling_rate=8000)


@pytest.mark.parametrize("samples", [1, 399, 400, 959])
def test_audio_shorter_than_a_frame_is_refused(extractor, samples):
    with pytest.raises(ValueError, match=rf"Audio of {samples} samples .* shorter than one code frame \(960 samples\)"):
        extractor(noise(samples))


def test_the_shortest_audio_has_one_frame(extractor):
    batch = extractor(noise(960))
    assert batch["num_frames"] == [1] and batch["input_features"].shape == (1, 128, 7)


def test_audio_shorter_than_a_long_window_is_refused():
    extractor = BaichuanAudioFeatureExtractor(n_fft=1200)
    with pytest.raises(ValueError, match=r"shorter than one code frame \(1200 samples\)"):
        extractor(noise(1199))
    assert extractor(noise(1200))["num_frames"] == [1]


def test_one_bad_audio_in_a_list_is_refused(extractor):
    with pytest.raises(ValueError, match="Audio is empty"):
        extractor([noise(2000), np.zeros(0, dtype=np.float32)])


# Any audio at all.

DTYPES = {
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "int16": as_int16,
    "int32": lambda x: as_int16(x).astype(np.int32) * 65536,
    "tensor": torch.from_numpy,
    "uint8": lambda x: (127 + 127 * x).astype(np.uint8),
    "bool": lambda x: x > 0,
}


@settings(max_examples=150, deadline=None)
@given(
    samples=st.one_of(st.integers(0, 1100), st.integers(0, 70000), st.sampled_from([32000, 32399, 32400, 32959, 32960, 64000])),
    rate=st.sampled_from([RATE, RATE, RATE, 8000, 11025, 44100, 48000, 0, 999]),
    channels=st.sampled_from([None, None, 1, 2, 8, 9]),
    channels_last=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_any_audio_has_the_documented_lengths_or_is_refused(short_extractor, samples, rate, channels, channels_last, dtype):
    waveform = noise(samples)
    audio = waveform if channels is None else np.tile(waveform, (channels, 1))
    audio = DTYPES[dtype](audio.T.copy() if channels_last else audio)
    resampled = samples * RATE / max(rate, 1)
    bad = dtype in ("uint8", "bool") or rate in (0, 999) or (channels == 9 and samples >= 9)
    try:
        batch = short_extractor(audio, sampling_rate=rate)
    except ValueError:
        assert bad or resampled < 961
        return
    assert not bad
    length = samples if rate == RATE else len(short_extractor.read_audio(audio, rate))
    assert abs(length - resampled) <= 1
    lengths = expected_lengths(length, max_seconds=2)
    assert batch["input_features"].shape == (len(lengths), 128, max(mel_frames for mel_frames, _, _ in lengths))
    assert batch["input_features_mask"].sum(1).tolist() == [mel_frames for mel_frames, _, _ in lengths]
    assert batch["num_frames"] == [sum(frames for _, _, frames in lengths)]
    assert np.isfinite(batch["input_features"]).all()


# Saving and sending to workers.


@pytest.mark.parametrize("load", [BaichuanAudioFeatureExtractor.from_pretrained, AutoFeatureExtractor.from_pretrained])
def test_a_saved_feature_extractor_gives_the_same_features(tmp_path, load):
    saved = BaichuanAudioFeatureExtractor(max_audio_seconds=2, padding_value=-1.0)
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is BaichuanAudioFeatureExtractor and loaded.to_dict() == saved.to_dict()
    clips = [noise(40000), noise(2000)]
    np.testing.assert_array_equal(loaded(clips)["input_features"], saved(clips)["input_features"])
    assert loaded(clips)["num_frames"] == saved(clips)["num_frames"] == [25 + 6, 1]


def test_a_pickled_feature_extractor_gives_the_same_features():
    extractor = BaichuanAudioFeatureExtractor(max_audio_seconds=2)
    copied = pickle.loads(pickle.dumps(extractor))
    np.testing.assert_array_equal(copied(noise(40000))["input_features"], extractor(noise(40000))["input_features"])


def test_data_loader_workers(extractor):
    clips = [noise(2000, seed) for seed in range(4)]
    loader = torch.utils.data.DataLoader(
        clips, batch_size=2, num_workers=1, collate_fn=lambda batch: extractor(batch, return_tensors="pt")
    )
    for number, batch in enumerate(loader):
        torch.testing.assert_close(batch, extractor(clips[2 * number : 2 * number + 2], return_tensors="pt"), rtol=0, atol=0)
    assert number == 1
