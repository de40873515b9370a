"""What bounds a figure: bytes of weights that must be read, operations that must be done, and how fast this machine does either."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_baichuan_audio import BaichuanAudioFlowMatchingConfig, BaichuanAudioForCausalLM, BaichuanAudioVocoderConfig
from modeling_baichuan_audio.modeling_flow_estimator import chunk_bounds


def timed(function: Callable, device: str) -> float:
    """Seconds, all work of a GPU done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians_in_turns(ways: dict[str, Callable], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """
    Wall and processor (`cpu`) seconds of each way, and `seconds`, the one of both that counts on the device: wall on a GPU.

    The ways are taken in turns: what disturbs the machine disturbs all of them.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            processor = time.process_time()
            times[name]["wall"].append(timed(way, device))
            times[name]["cpu"].append(time.process_time() - processor)
    medians = {name: {kind: statistics.median(values) for kind, values in both.items()} for name, both in times.items()}
    counts = "wall" if device.startswith("cuda") else "cpu"
    return {name: both | {"seconds": both[counts]} for name, both in medians.items()}


def read_speed(device: str = "cpu", gigabytes: float = 0.5) -> float:
    """Bytes a second that a matrix-vector product of that size reads, the pattern of a frame: the best of five."""
    width = 4096
    rows = max(256, int(gigabytes * 1e9 / 4 / width))
    matrix, vector = torch.ones(rows, width, device=device), torch.ones(width, 1, device=device)
    return matrix.numel() * 4 / min(timed(lambda: matrix @ vector, device) for _ in range(5))


def multiply_speed(device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 1024) -> float:
    """Operations a second of a square matrix product (a multiplication and an addition are two): the best of twenty."""
    left, right = torch.ones(2, width, width, device=device, dtype=dtype).unbind()
    return 2 * width**3 / min(timed(lambda: left @ right, device) for _ in range(20))


def counted_flops(function: Callable) -> int:
    """Operations of the products and convolutions in one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def weight_bytes(model: BaichuanAudioForCausalLM) -> dict[str, int]:
    """
    Bytes of weights that are read for one frame: the least, and what recomputing every position reads.

    An embedding is one row of its table. The head's attention serves eight positions, each after the one before, so it is read eight
    times; its feed-forward parts and classifiers are read once each, or eight times by who computes all of them every time.
    """

    def size(module):
        return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())

    head, llm = model.audio_head, model.model.language_model
    text = size(model.lm_head)
    # A tied text head is read in full, its other use as an embedding is one row.
    layers = size(llm.layers) + size(llm.norm)
    own = sum(size(layer.mlps) for layer in head.layers) + size(head.heads)
    shared = size(head) - own
    positions = len(head.heads)
    return {
        "llm": layers,
        "lm_head": text,
        "head": own + positions * shared,
        "head_recomputed": positions * (own + shared),
    }


def vocoder_flops(config: BaichuanAudioVocoderConfig, frames: int) -> int:
    """Operations of the vocoder's convolutions, and of the F0 predictor's linear layer, for a clip."""
    width, bins, spectrum = config.f0_channels, config.num_mel_bins, config.istft_n_fft + 2
    weights = frames * (3 * width * (bins + (config.f0_layers - 1) * width) + width + 7 * bins * config.base_channels)
    channels, positions, pairs = config.base_channels, frames, 2 * len(config.resblock_dilations)
    stages = zip(config.upsample_rates, config.upsample_kernel_sizes, config.source_resblock_kernel_sizes)
    for index, (rate, kernel, source_kernel) in enumerate(stages):
        later = math.prod(config.upsample_rates[index + 1 :])
        weights += positions * kernel * channels * channels // 2
        channels, positions = channels // 2, positions * rate + (later == 1)
        weights += positions * (2 * later if later > 1 else 1) * spectrum * channels
        weights += positions * pairs * channels**2 * (source_kernel + sum(config.resblock_kernel_sizes))
    return 2 * (weights + positions * 7 * channels * spectrum)


def estimator_flops(config: BaichuanAudioFlowMatchingConfig, frames: int, chunk_sizes: list[int] | None = None) -> int:
    """
    Operations of one clip's pass through the estimator of flow matching: the products, not norms and activations.

    Args:
        chunk_sizes (*optional*): of the attention; without, every frame sees all frames (as under a dense mask).
    """
    width, mel = config.estimator_channels, config.num_mel_bins
    inner = config.estimator_attention_heads * config.estimator_head_dim
    stages = config.estimator_mid_stages + 2
    inputs = 2 * mel + config.estimator_mid_stages * width + 2 * width
    weights = stages * config.estimator_blocks * (4 * width * inner + 8 * width**2)  # q, k, v, output; feed-forward part
    weights += 4 * width * inputs + 3 * stages * width**2  # ResNet blocks: k 3 and k 1 on the input, k 3 after it
    weights += 3 * 3 * width**2 + width * mel  # down, up and final convolution, projection
    seen = frames**2 if chunk_sizes is None else sum((end - start) * end for start, end in chunk_bounds(frames, chunk_sizes))
    return 2 * weights * frames + stages * config.estimator_blocks * 4 * inner * seen


def sound_flops(model: BaichuanAudioForCausalLM, frames: int, mel_frames: int, sound_frames: int, chunk_sizes: list[int]) -> int:
    """
    Operations that turn code frames into sound under guidance: weights times positions in the mel decoder and in the pre-net of flow
    matching (attention there is left out: a few per cent), two passes of the estimator for each Euler step, the vocoder.

    Args:
        frames: of codes, through the mel decoder. mel_frames: solved by flow matching. sound_frames: of the mel that come out as sound.
        chunk_sizes: of flow matching's attention.
    """

    def weights(module):
        return sum(parameter.numel() for parameter in module.parameters())

    decoder, flow = model.audio_tokenizer.mel_decoder, model.flow_matching
    hidden = frames * model.config.audio_tokenizer_config.downsample_factor
    products = frames * (weights(decoder.in_proj) + weights(decoder.dconv1)) + hidden * weights(decoder.layers)
    products += mel_frames * weights(flow.prenet)
    solving = 2 * flow.config.num_steps * estimator_flops(flow.config, mel_frames, chunk_sizes)
    return 2 * products + solving + vocoder_flops(model.config.vocoder_config, sound_frames)
