"""Audio head: a depth transformer that predicts the codebooks of one frame in turn (paper, section 3.2)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_baichuan_audio import BaichuanAudioHeadConfig
from .modeling_common import PART_KEYS_TO_IGNORE, BaichuanAudioAttention, BaichuanAudioPreTrainedModel, BaichuanAudioRMSNorm


class AudioHeadMLP(nn.Module):
    """Feed-forward part of one codebook position, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(states)))


class AudioHeadLayer(GradientCheckpointingLayer):
    """Attention over the codebook positions, then a feed-forward part with weights of its own for each position."""

    def __init__(self, config: BaichuanAudioHeadConfig):
        super().__init__()
        width = config.hidden_size
        self.norm1 = BaichuanAudioRMSNorm(width, config.rms_norm_eps)
        self.self_attn = BaichuanAudioAttention(
            config, width, config.num_attention_heads, biases=(True, True, True, True), is_causal=True
        )
        self.norm2 = BaichuanAudioRMSNorm(width, config.rms_norm_eps)
        self.mlps = nn.ModuleList([AudioHeadMLP(width, config.intermediate_size) for _ in range(config.num_codebooks)])

    def forward(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        first_position: int = 0,
        cache: list | None = None,
    ) -> torch.Tensor:
        """(rows, positions, hidden_size) at codebook positions `first_position ...` -> the same shape."""
        states = states + self.self_attn(self.norm1(states), attention_mask, cache=cache)[0]
        states = self.norm2(states)  # the second residual starts from the normalised states
        mlps = self.mlps[first_position : first_position + states.shape[1]]
        # `unbind`, not an index for each position: its gradient is one stack, theirs a tensor of zeros each.
        return states + torch.stack([mlp(state) for mlp, state in zip(mlps, states.unbind(1))], dim=1)


class BaichuanAudioHead(BaichuanAudioPreTrainedModel):
    """Depth transformer and one classifier per codebook. Classifier i has one class more than codebook i: the end of audio.

    Position 0 reads the LLM's hidden state, position i the sum of the embeddings of codes 0 .. i-1. The embeddings belong to the
    model, which uses them for its own input too, so they are passed in.
    """

    config: BaichuanAudioHeadConfig
    base_model_prefix = "audio_head"
    _keys_to_ignore_on_load_unexpected = PART_KEYS_TO_IGNORE
    main_input_name = "hidden_states"
    _supports_flash_attn = True
    _no_split_modules = ["AudioHeadLayer"]

    def __init__(self, config: BaichuanAudioHeadConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([AudioHeadLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = BaichuanAudioRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.heads = nn.ModuleList([nn.Linear(config.hidden_size, size + 1) for size in config.codebook_sizes])
        self.post_init()

    def forward(self, hidden_states: torch.Tensor, code_embeddings: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        """
        Logits of whole frames, all positions at once (teacher forcing).

        Args:
            hidden_states (`(frames, hidden_size)`): the LLM's final hidden state before each frame.
            code_embeddings (`(frames, num_codebooks - 1, hidden_size)`): embeddings of all codes but the last.

        Returns:
            One `(frames, codebook_size + 1)` tensor per codebook.
        """
        states = torch.cat([hidden_states[:, None], code_embeddings.cumsum(1)], dim=1)
        mask = create_causal_mask(config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        for layer in self.layers:
            states = layer(states, mask)
        states = self.norm(states)
        return tuple(head(state) for head, state in zip(self.heads, states.unbind(1)))

    def generate_frame(
        self,
        hidden_states: torch.Tensor,
        embed_code: Callable[[int, torch.Tensor], torch.Tensor],
        sample_code: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        One frame, codebook after codebook, with a key/value cache: each position runs once and reads only its own weights.

        Args:
            hidden_states (`(rows, hidden_size)`): the LLM's final hidden state.
            embed_code: (codebook index, `(rows,)` codes) -> `(rows, hidden_size)` embeddings.
            sample_code: (codebook index, `(rows, classes)` logits) -> `(rows,)` int64 codes. The end-of-audio class is offered
                by the first codebook only.

        Returns:
            `(rows, num_codebooks)` int64. A frame whose first code is `codebook_sizes[0]` ends the audio.
        """
        caches: list[list[torch.Tensor]] = [[] for _ in self.layers]
        codes, state = [], hidden_states
        for position, head in enumerate(self.heads):
            hidden = state[:, None]
            for layer, cache in zip(self.layers, caches):
                hidden = layer(hidden, first_position=position, cache=cache)
            logits = head(self.norm(hidden)[:, 0])
            chosen = sample_code(position, logits if position == 0 else logits[:, :-1])
            codes.append(chosen)
            embedded = embed_code(position, chosen)
            state = embedded if position == 0 else state + embedded
        return torch.stack(codes, dim=1)


__all__ = ["BaichuanAudioHead"]
