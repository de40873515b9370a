"""`hift.pt` -> our vocoder."""

import os
import pickle

import pytest
import torch
from helpers.golden import formula_state_dict, golden_json, write_hift
from torch import nn
from torch.nn.utils import parametrizations

from modeling_baichuan_audio import BaichuanAudioVocoder, BaichuanAudioVocoderConfig
from modeling_baichuan_audio.conversion import convert_vocoder, fold_weight_norm, read_vocoder_file


NEW_SPELLING = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


@pytest.fixture
def hift():
    """The golden vocoder's state dict, as the original spells it."""
    return formula_state_dict(golden_json()["vocoder_state_dict"])


def in_new_spelling(state_dict):
    renamed = {}
    for key, value in state_dict.items():
        stem, _, leaf = key.rpartition(".")
        renamed[f"{stem}.{NEW_SPELLING.get(leaf, leaf)}"] = value
    return renamed


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("layer_class", [nn.Conv1d, nn.ConvTranspose1d])
def test_fold_weight_norm_equals_torch(layer_class, spelling):
    layer = parametrizations.weight_norm(layer_class(6, 4, 5))
    with torch.no_grad():
        layer.parametrizations.weight.original0.uniform_(0.5, 2.0)
    old = {new: leaf for leaf, new in NEW_SPELLING.items()} if spelling == "old" else {}
    state = {f"a.{old.get(key, key)}": value for key, value in layer.state_dict().items()}
    folded = fold_weight_norm(state)
    assert folded.keys() == {"a.weight", "a.bias"}
    torch.testing.assert_close(folded["a.weight"], layer.weight.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(folded["a.bias"], layer.bias)
    assert "a.weight" not in state, "the caller's dict was changed"


@pytest.mark.parametrize("missing", ["conv_pre.weight_v", "conv_pre.weight_g"])
def test_half_a_weight_norm_pair_is_refused(hift, missing):
    del hift[missing]
    with pytest.raises(ValueError, match="conv_pre.weight"):
        convert_vocoder(hift)


def test_config_is_read_off_the_shapes(hift):
    config, state = convert_vocoder(hift)
    assert config.base_channels == hift["conv_pre.weight_v"].shape[0] == 32
    assert config.num_mel_bins == 80
    assert config.f0_channels == hift["f0_predictor.classifier.weight"].shape[1] == 24
    assert config.f0_layers == 5
    assert config.num_harmonics == 8
    assert config.istft_n_fft == 16
    assert config.upsample_kernel_sizes == [16, 11, 7]
    assert config.resblock_kernel_sizes == [3, 7, 11]
    assert config.source_resblock_kernel_sizes == [7, 7, 11]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    vocoder = BaichuanAudioVocoder(config)
    vocoder.load_state_dict(state, strict=True)


@pytest.mark.parametrize("kernel_sizes", [[3, 5], [5]])
def test_other_residual_blocks_are_read_off(kernel_sizes):
    """Fewer residual blocks with other kernels: names are numbered over all stages, so the count matters."""
    settings = BaichuanAudioVocoderConfig(base_channels=16, f0_channels=8, f0_layers=2, resblock_kernel_sizes=kernel_sizes)
    shapes = hift_shapes(settings)
    config, state = convert_vocoder({name: torch.randn(shape) for name, shape in shapes.items()})
    assert config.to_dict() == settings.to_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in BaichuanAudioVocoder(settings).state_dict().items()
    }


@pytest.mark.parametrize("change", [in_new_spelling, lambda state: {f"generator.{key}": value for key, value in state.items()}])
def test_other_spellings_give_the_same_vocoder(hift, tmp_path, change, assert_same_tensors):
    config, state = convert_vocoder(hift)
    torch.save(change(hift), tmp_path / "hift.pt")
    other_config, other_state = convert_vocoder(read_vocoder_file(tmp_path / "hift.pt"))
    assert other_config.to_dict() == config.to_dict()
    assert_same_tensors(other_state, state)


def test_half_precision_file_becomes_float32(hift):
    _, state = convert_vocoder({key: value.half() for key, value in hift.items()})
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_read_vocoder_file(hift, tmp_path, assert_same_tensors):
    assert_same_tensors(read_vocoder_file(write_hift(tmp_path / "hift.pt")), hift)


def test_pickle_that_calls_a_function_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was run"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"a": Malicious()}, tmp_path / "zipped.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for path in (tmp_path / "zipped.pt", tmp_path / "plain.pt"):
        with pytest.raises(ValueError, match="cannot be read as plain weights"):
            read_vocoder_file(path)
        assert not marker.exists()


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "does not exist"),
        (lambda path: path.write_bytes(b"not a pickle"), "cannot be read as plain weights"),
        (lambda path: path.write_bytes(b""), "cannot be read as plain weights"),
        (lambda path: torch.save([torch.ones(1)], path), "not a state dict"),
        (lambda path: torch.save({"epoch": 3}, path), "not a state dict"),
        (lambda path: torch.save({0: torch.ones(1)}, path), "not a state dict"),
    ],
    ids=["missing", "folder", "text", "empty", "list", "no tensor", "no name"],
)
def test_unusable_file_is_refused(tmp_path, write, message):
    write(tmp_path / "hift.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_vocoder_file(tmp_path / "hift.pt")
    assert "hift.pt" in str(error.value)


@pytest.mark.parametrize(
    "change, listed",
    [
        ({"ups.1.bias": None}, "stages.1.upsample.bias is missing"),
        ({"m_source.l_linear.bias": None}, "source.linear.bias is missing"),
        ({"decoder.weight": torch.ones(2)}, "decoder.weight is unknown"),
        ({"source_downs.0.bias": torch.ones(3)}, r"stages.0.source_down.bias has shape \[3\] instead of \[16\]"),
        ({"conv_pre.weight_g": None, "conv_pre.weight_v": None}, "conv_pre.weight"),
        ({"conv_pre.weight_v": torch.ones(32, 1), "conv_pre.weight_g": torch.ones(32, 1)}, "conv_pre.weight"),
        ({"ups.0.weight_v": torch.ones(32, 16), "ups.0.weight_g": torch.ones(32, 1)}, "HiFT"),
    ],
)
def test_wrong_tensors_are_listed(hift, change, listed):
    hift = {key: value for key, value in (hift | change).items() if value is not None}
    with pytest.raises(ValueError, match=listed):
        convert_vocoder(hift)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="not a HiFT vocoder"):
        convert_vocoder(nn.Linear(2, 2).state_dict())


def hift_shapes(config):
    """Tensor shapes of a HiFT state dict, written down from the architecture (MODEL.md 9), not from our model."""
    shapes = {}

    def conv(name, out_channels, in_channels, kernel, bias, weight_norm=True):
        shapes[f"{name}.bias"] = [bias]
        if weight_norm:
            shapes[f"{name}.weight_g"] = [out_channels, 1, 1]
        shapes[f"{name}.weight_v" if weight_norm else f"{name}.weight"] = [out_channels, in_channels, kernel]

    def resblock(name, channels, kernel):
        for index in range(3):
            for group in ("convs1", "convs2"):
                conv(f"{name}.{group}.{index}", channels, channels, kernel, channels)
            for group in ("activations1", "activations2"):
                shapes[f"{name}.{group}.{index}.alpha"] = [channels]

    shapes["m_source.l_linear.weight"], shapes["m_source.l_linear.bias"] = [1, 9], [1]
    channels = config.base_channels
    conv("conv_pre", channels, 80, 7, channels)
    blocks = config.resblock_kernel_sizes
    source_kernels = [(30, 7), (6, 7), (1, 11)]  # 2 u of the strides 15, 3 and 1 (kernel 1 for stride 1); source block
    for stage, (kernel, (down_kernel, source_kernel)) in enumerate(zip((16, 11, 7), source_kernels, strict=True)):
        half = channels // 2
        conv(f"ups.{stage}", channels, half, kernel, half)
        conv(f"source_downs.{stage}", half, 18, down_kernel, half, weight_norm=False)
        resblock(f"source_resblocks.{stage}", half, source_kernel)
        for index, block_kernel in enumerate(blocks):
            resblock(f"resblocks.{stage * len(blocks) + index}", half, block_kernel)
        channels = half
    conv("conv_post", 18, channels, 7, 18)
    width = config.f0_channels
    for index in range(config.f0_layers):
        conv(f"f0_predictor.condnet.{2 * index}", width, 80 if index == 0 else width, 3, width)
    shapes["f0_predictor.classifier.weight"], shapes["f0_predictor.classifier.bias"] = [1, width], [1]
    return shapes


def test_released_hift_is_the_default_config():
    shapes = hift_shapes(BaichuanAudioVocoderConfig())
    config, state = convert_vocoder({name: torch.ones(shape) for name, shape in shapes.items()})
    assert config.to_dict() == BaichuanAudioVocoderConfig().to_dict()
    with torch.device("meta"):
        ours = BaichuanAudioVocoder(BaichuanAudioVocoderConfig()).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: tensor.shape for name, tensor in ours.items()}


def test_golden_hift_has_the_names_of_the_architecture():
    """The shapes written down above are those of the original code, at the golden sizes."""
    golden = golden_json()["vocoder_state_dict"]
    assert hift_shapes(BaichuanAudioVocoderConfig(base_channels=32, f0_channels=24)) == golden
