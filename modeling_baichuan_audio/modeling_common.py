"""What the audio parts share: the base class, attention, pre-norm transformer layers, masked norms, sinusoids, seeded noise."""

import hashlib
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_baichuan_audio import BaichuanAudioConfig
from .original_format import DROPPED_KEYS, VISION_KEYS


logger = logging.get_logger(f"transformers.{__name__}")  # obeys transformers.logging.set_verbosity_...


# Names in a full checkpoint; a part that is loaded alone passes over those of the others.
PART_KEYS_TO_IGNORE = [
    *DROPPED_KEYS,
    VISION_KEYS,
    r"^(model\.(language_model|audio_embed_layers|audio_tokenizer)|lm_head|audio_head|flow_matching|vocoder)\.",
]


class BaichuanAudioPreTrainedModel(PreTrainedModel):
    """Loading and initialisation shared by the whole model and by every part of it."""

    config: BaichuanAudioConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Caches are lists that a layer adds to. With a device map, lists among a module's arguments are rebuilt unless they are named here.
    _skip_keys_device_placement = ["past_key_values", "cache", "caches"]
    _keys_to_ignore_on_load_unexpected = [*DROPPED_KEYS, VISION_KEYS]
    # Running sums that follow from the entries and their counts: a checkpoint may leave them out.
    _keys_to_ignore_on_load_missing = [r"\.codebooks\.\d+\.embed_avg$"]

    # Saving copies the code files beside the weights: the folder works without this package (`trust_remote_code=True`).
    _auto_class = "AutoModel"
    _more_auto_classes = ()

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # A checkpoint is always written with our own tensor names, never turned back into the original layout.
        self._weight_conversions = []

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MaskedGroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def set_auto_map(self) -> None:
        """Names this class and its config's in the config, for the Auto classes."""
        model, config = type(self), type(self.config)
        names = {"AutoConfig": config, model._auto_class: model} | dict.fromkeys(model._more_auto_classes, model)
        self.config.auto_map = {auto: f"{named.__module__.split('.')[-1]}.{named.__name__}" for auto, named in names.items()}

    def save_pretrained(self, save_directory, **kwargs):
        """See [`~transformers.PreTrainedModel.save_pretrained`]; code files for the Hub are written next to the weights."""
        self.set_auto_map()
        return super().save_pretrained(save_directory, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        vision = [key for key in loading_info.unexpected_keys if re.search(VISION_KEYS, key)]
        if vision:
            logger.warning(
                f"Ignored {len(vision)} vision tensors of the checkpoint: this package runs the audio parts of Omni models."
            )
        super()._adjust_missing_and_unexpected_keys(loading_info)
        # transformers would raise without naming a tensor; `from_pretrained` lists them all.
        self._conversion_errors = dict(loading_info.conversion_errors)
        loading_info.conversion_errors.clear()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs
    ):
        """
        Loads a converted or an original checkpoint (folder or Hub id); see [`~transformers.PreTrainedModel.from_pretrained`].

        Tensors that are missing are listed in the loading info where `output_loading_info=True` asks for it, and initialised; so they
        are where `state_dict` is given.

        Raises:
            ValueError: the checkpoint lacks tensors that the config asks for, or has them in other shapes; the message lists them.
        """
        # An Auto class hands over the config it has read: the whole model's, also for a part.
        part = getattr(kwargs.get("config"), cls.config_class.base_config_key or "", None)
        if part is not None:
            kwargs["config"] = part
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        may_miss = output_loading_info or kwargs.get("state_dict") is not None
        problems = [] if may_miss else [f"{name} is missing" for name in sorted(loading_info["missing_keys"])]
        if not ignore_mismatched_sizes:
            problems += [
                f"{name} has shape {list(stored)} instead of {list(wanted)}"
                for name, stored, wanted in sorted(loading_info["mismatched_keys"])
            ]
        problems += [
            f"{name} cannot be made from the original ({' '.join(error.split())})"
            for name, error in sorted(getattr(model, "_conversion_errors", {}).items())
        ]
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__} in {len(problems)} tensors: {'; '.join(problems)}"
            )
        model._weight_conversions = []
        return (model, loading_info) if output_loading_info else model


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention. query, key, value: (batch, heads, time, head_dim); returns (batch, time, heads, head_dim) and the weights."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BaichuanAudioAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface.

    Args:
        config: the part's config; names the attention implementation.
        hidden_size: width of input and output.
        num_heads, head_dim: heads and their width (`hidden_size // num_heads` by default).
        biases: whether the q, k, v and output projections have one.
        is_causal: whether a position sees only the ones before it when no mask says otherwise.
    """

    def __init__(self, config, hidden_size, num_heads, head_dim=None, biases=(True, False, True, True), is_causal=False):
        super().__init__()
        self.config = config
        self.head_dim = head_dim or hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = is_causal
        inner = num_heads * self.head_dim
        q_bias, k_bias, v_bias, out_bias = biases
        self.q_proj = nn.Linear(hidden_size, inner, bias=q_bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=k_bias)
        self.v_proj = nn.Linear(hidden_size, inner, bias=v_bias)
        self.out_proj = nn.Linear(inner, hidden_size, bias=out_bias)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
        """
        Args:
            hidden_states (`(batch, time, hidden_size)`).
            attention_mask (*optional*): as transformers' masking utilities make it for the implementation in use.
            cache (`list[torch.Tensor]`, *optional*): keys and values of the positions before; this call's are appended in place.

        Returns:
            `(batch, time, hidden_size)` and the attention weights (or None).
        """
        query, key, value = (self._heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            if cache:
                key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
            cache[:] = [key, value]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            # A single new position sees everything in its cache.
            is_causal=self.is_causal and query.shape[2] > 1,
            **kwargs,
        )
        return self.out_proj(output.flatten(-2)), weights


class BaichuanAudioRMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * states.to(hidden_states.dtype)


class BaichuanAudioTransformerLayer(GradientCheckpointingLayer):
    """Pre-norm layer with Whisper's parameter layout (no bias on the keys): attention, then a two-layer feed-forward part."""

    def __init__(self, config, hidden_size, num_heads, ffn_dim, activation, is_causal, rms_norm_eps=None):
        super().__init__()

        def norm():
            return nn.LayerNorm(hidden_size) if rms_norm_eps is None else BaichuanAudioRMSNorm(hidden_size, rms_norm_eps)

        self.self_attn = BaichuanAudioAttention(config, hidden_size, num_heads, is_causal=is_causal)
        self.self_attn_layer_norm = norm()
        self.fc1 = nn.Linear(hidden_size, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, hidden_size)
        self.final_layer_norm = norm()
        self.activation_fn = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))


class MaskedGroupNorm(nn.Module):
    """Group norm with one group over channels and the valid time of each clip, so that padding never enters the statistics."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states (`(batch, channels, time)`).
            mask (`(batch, 1, time)`, bool): True inside the clip.

        Returns:
            `(batch, channels, time)`, zero outside the clip.
        """
        values = states.float().masked_fill(~mask, 0.0)
        count = mask.sum((1, 2), keepdim=True) * states.shape[1]
        mean = values.sum((1, 2), keepdim=True) / count
        centred = (values - mean).masked_fill(~mask, 0.0)
        variance = centred.square().sum((1, 2), keepdim=True) / count
        normed = centred * torch.rsqrt(variance + self.eps)
        normed = normed * self.weight.float()[:, None] + self.bias.float()[:, None]
        return normed.masked_fill(~mask, 0.0).to(states.dtype)


def length_mask(lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """(batch,) lengths -> (batch, max_length) bool, True inside."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def sinusoidal_embedding(positions: torch.Tensor, channels: int) -> torch.Tensor:
    """Sines then cosines of `positions` (n,) at log-spaced frequencies 1 .. 1/10000 (Whisper's table): (n, channels), float32."""
    half = channels // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(steps * -(torch.log(torch.tensor(10000.0)).item() / (half - 1)))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def check_codes(audio_codes: torch.Tensor, codebook_sizes: list[int]) -> None:
    """Refuses codes of the wrong form.

    Raises:
        ValueError: not an integer (batch, num_codebooks, frames) tensor, or a code above its codebook (-1 marks padding).
    """
    if audio_codes.dim() != 3 or audio_codes.shape[1] != len(codebook_sizes) or audio_codes.is_floating_point():
        raise ValueError(
            f"`audio_codes` must be integers of shape (batch, {len(codebook_sizes)}, frames), "
            f"got {audio_codes.dtype} of shape {tuple(audio_codes.shape)}."
        )
    sizes = torch.tensor(codebook_sizes, device=audio_codes.device)[:, None]
    if audio_codes.numel() and bool(((audio_codes >= sizes) | (audio_codes < -1)).any()):
        top = audio_codes.amax((0, 2)).tolist()
        raise ValueError(f"`audio_codes` reach {top} but the codebooks have {codebook_sizes} entries (-1 marks padding).")


def frame_lengths(audio_codes: torch.Tensor) -> torch.Tensor:
    """Frames of each clip in (batch, num_codebooks, frames) codes that are padded on the right with -1: (batch,) int64.

    Raises:
        ValueError: padding that is not at the end of a clip, or not in all codebooks at once.
    """
    valid = audio_codes >= 0
    lengths = valid.all(1).sum(-1)
    if not torch.equal(valid, length_mask(lengths, audio_codes.shape[-1])[:, None].expand_as(valid)):
        raise ValueError("`audio_codes` must be padded with -1 only at the end of a clip, in all codebooks at once.")
    return lengths


def pad_codes(clips: list[torch.Tensor]) -> torch.Tensor:
    """(num_codebooks, frames) int64 codes of each clip -> (batch, num_codebooks, longest), -1 past the end of a clip."""
    columns = [clip.transpose(0, 1) for clip in clips]
    return nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1).transpose(1, 2)


def draw_seeds(seed: int | list[int] | None, count: int) -> list[int]:
    """One seed per item. An int serves every item; None draws from torch's global generator, so `torch.manual_seed` reproduces.

    Raises:
        ValueError: a list of another length, or anything that is not an integer.
    """
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count or not all(isinstance(item, int) for item in seeds):
        raise ValueError(f"`seed` must be an int or a list of {count} ints, got {seed!r}.")
    return seeds


def seeded_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for `key`; different keys give unrelated streams."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def position_noise(seed: int, stream: str, start: int, length: int, width: int, block: int) -> torch.Tensor:
    """Standard normal noise that depends only on seed, stream and absolute position.

    How a signal is cut into chunks, batched, or placed on devices does not change its noise.

    Returns:
        `(length, width)`, float32, on the CPU: rows `start .. start + length` of an endless table drawn in blocks of `block` rows.
    """
    if length == 0:
        return torch.empty(0, width)
    first, last = start // block, (start + length - 1) // block
    rows = [torch.randn(block, width, generator=seeded_generator(seed, stream, index)) for index in range(first, last + 1)]
    return torch.cat(rows)[start - first * block :][:length]
