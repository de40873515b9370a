"""`hift.pt` (CosyVoice 2's vocoder) -> our vocoder: config read off the shapes, names mapped, weight norm folded."""

import re
from pathlib import Path

import torch

from ..configuration_baichuan_audio import BaichuanAudioVocoderConfig
from ..modeling_vocoder import BaichuanAudioVocoder


# Old and new spelling of the weight-norm pair.
_PAIRS = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}
_RENAMES = [
    (r"^m_source\.l_linear\.", "source.linear."),
    (r"^ups\.", "stages.{}.upsample."),
    (r"^source_downs\.", "stages.{}.source_down."),
    (r"^source_resblocks\.", "stages.{}.source_resblock."),
]


def read_vocoder_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads a plain state dict from a pickle, without running code from it.

    Raises:
        ValueError: not a file, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Vocoder file {path} does not exist.")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"Vocoder file {path} cannot be read as plain weights: {error}") from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise ValueError(f"Vocoder file {path} is not a state dict of tensors.")
    return {key.removeprefix("generator."): value for key, value in state_dict.items()}


def fold_weight_norm(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces each weight-norm pair (arXiv 1602.07868) by the weight it stands for, g * v / |v| per index of dimension 0.

    Raises:
        ValueError: half of a pair.
    """
    folded = dict(state_dict)
    for gain_name, direction_name in _PAIRS.items():
        for key in [key for key in folded if key.endswith("." + gain_name)]:
            stem = key.removesuffix(gain_name)
            if stem + direction_name not in folded:
                raise ValueError(f"Weight norm needs {stem}{direction_name} next to {key}, which is missing.")
            gain, direction = folded.pop(key).float(), folded.pop(stem + direction_name).float()
            norm = direction.flatten(1).norm(dim=1).reshape(gain.shape)
            folded[stem + "weight"] = direction * (gain / norm)
    return folded


def _our_name(key: str, num_resblocks: int) -> str:
    match = re.match(r"^resblocks\.(\d+)\.(.*)", key)
    if match:
        stage, block = divmod(int(match[1]), num_resblocks)
        return f"stages.{stage}.resblocks.{block}.{match[2]}"
    match = re.match(r"^f0_predictor\.condnet\.(\d+)\.(.*)", key)
    if match:  # a convolution, then an activation without weights
        return f"f0_predictor.convs.{int(match[1]) // 2}.{match[2]}"
    for pattern, replacement in _RENAMES:
        match = re.match(pattern + r"(\d+)\.(.*)", key)
        if match and "{}" in replacement:
            return replacement.format(match[1]) + match[2]
        key = re.sub(pattern, replacement, key) if "{}" not in replacement else key
    return key


def _read_config(state: dict[str, torch.Tensor]) -> BaichuanAudioVocoderConfig:
    """The sizes that the shapes show. Rates, dilations and thresholds are HiFT's own and appear in no shape."""

    def count(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    stages = count(r"ups\.(\d+)\.")
    num_resblocks = count(r"resblocks\.(\d+)\.") // stages
    defaults = BaichuanAudioVocoderConfig()
    return BaichuanAudioVocoderConfig(
        num_mel_bins=state["conv_pre.weight"].shape[1],
        base_channels=state["conv_pre.weight"].shape[0],
        upsample_rates=defaults.upsample_rates[:stages],
        upsample_kernel_sizes=[state[f"ups.{i}.weight"].shape[2] for i in range(stages)],
        resblock_kernel_sizes=[state[f"resblocks.{i}.convs1.0.weight"].shape[2] for i in range(num_resblocks)],
        resblock_dilations=defaults.resblock_dilations[: count(r"resblocks\.0\.convs1\.(\d+)\.")],
        source_resblock_kernel_sizes=[state[f"source_resblocks.{i}.convs1.0.weight"].shape[2] for i in range(stages)],
        istft_n_fft=state["conv_post.weight"].shape[0] - 2,
        num_harmonics=state["m_source.l_linear.weight"].shape[1] - 1,
        f0_channels=state["f0_predictor.classifier.weight"].shape[1],
        f0_layers=count(r"f0_predictor\.condnet\.(\d+)\."),
    )


def convert_vocoder(state_dict: dict[str, torch.Tensor]) -> tuple[BaichuanAudioVocoderConfig, dict[str, torch.Tensor]]:
    """
    HiFT state dict -> our config and state dict, float32.

    Raises:
        ValueError: tensors that HiFT lacks, does not have or has in another shape; the message lists them.
    """
    state = fold_weight_norm(state_dict)
    try:
        config = _read_config(state)
    except (KeyError, ZeroDivisionError, IndexError) as error:
        raise ValueError(f"This is not a HiFT vocoder: its sizes cannot be read off ({error!r}).") from error
    num_resblocks = len(config.resblock_kernel_sizes)
    ours = {_our_name(key, num_resblocks): value.float().contiguous() for key, value in state.items()}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in BaichuanAudioVocoder(config).state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in ours]
    problems += [f"{name} is unknown" for name in ours if name not in expected]
    problems += [
        f"{name} has shape {list(ours[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in ours and ours[name].shape != shape
    ]
    if problems:
        raise ValueError(f"This is not a HiFT vocoder, {len(problems)} tensors do not fit: {'; '.join(problems)}")
    return config, ours
