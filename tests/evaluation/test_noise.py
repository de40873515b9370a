from dataclasses import replace

import numpy as np
import pytest
import soundfile

from modeling_baichuan_audio.evaluation.noise import noise_like, noise_twins


def test_noise_is_white_and_as_long_and_as_loud():
    samples = np.sin(np.arange(48000) / 7).astype(np.float32)
    noise = noise_like(samples, "a")
    assert noise.shape == samples.shape and noise.dtype == np.float32
    assert np.square(noise).mean() == pytest.approx(np.square(samples).mean(), rel=1e-5)
    # No band of the spectrum stands out, and no sample follows from the one before.
    bands = np.square(np.abs(np.fft.rfft(noise)))[1:24001].reshape(8, -1).mean(1)
    assert bands.max() / bands.min() < 1.2
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    assert np.array_equal(noise, noise_like(samples, "a"))
    assert abs(np.corrcoef(noise, noise_like(samples, "b"))[0, 1]) < 0.02


def test_a_twin_for_each_clip(sets, tmp_path):
    twins = noise_twins(sets.voices, tmp_path / "noise")
    for clip, twin in zip(sets.voices, twins):
        assert replace(twin, id=clip.id, path=clip.path) == clip and twin.id != clip.id
        one, other = soundfile.read(clip.path), soundfile.read(twin.path)
        assert one[0].shape == other[0].shape and one[1] == other[1]
        assert np.square(one[0]).mean() == pytest.approx(np.square(other[0]).mean(), rel=1e-3)
    before = [twin.path.stat().st_mtime_ns for twin in twins]
    assert [twin.path.stat().st_mtime_ns for twin in noise_twins(sets.voices, tmp_path / "noise")] == before
