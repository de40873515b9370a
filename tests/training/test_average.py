import copy

import pytest
import torch

from modeling_baichuan_audio import BaichuanAudioVocoder
from modeling_baichuan_audio.training.miniature import average


def test_between_two_vocoders(tiny, tmp_path, monkeypatch, capsys):
    before = tiny.vocoder
    after = BaichuanAudioVocoder(copy.deepcopy(before.config))
    after.load_state_dict({name: tensor + 1 for name, tensor in before.state_dict().items()})
    after.config.noise_std = before.config.noise_std + 0.01
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")

    command = ["average", *(str(tmp_path / name) for name in ("before", "after", "middle")), "--share", "0.25"]
    monkeypatch.setattr("sys.argv", command)
    average.main()
    assert capsys.readouterr().out == f"{tmp_path / 'middle'}\n"
    middle = BaichuanAudioVocoder.from_pretrained(tmp_path / "middle")
    assert middle.config.noise_std == pytest.approx(before.config.noise_std + 0.0025)
    for name, tensor in middle.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name] + 0.25)

    for share, end in ((0.0, before), (1.0, after)):
        found = average.between(before, copy.deepcopy(after), share)
        assert all(torch.equal(tensor, end.state_dict()[name]) for name, tensor in found.state_dict().items())
        assert found.source.config.noise_std == pytest.approx(end.config.noise_std)


def test_what_has_no_middle(tiny, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        average.between(tiny.vocoder, tiny.vocoder, 1.5)
    config = copy.deepcopy(tiny.vocoder.config)
    config.f0_channels *= 2
    with pytest.raises(ValueError, match="differ in size"):
        average.between(tiny.vocoder, BaichuanAudioVocoder(config), 0.5)
    monkeypatch.setattr("sys.argv", ["average", str(tmp_path / "none"), str(tmp_path / "none"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="Error: "):
        average.main()
