"""Drawing tokens and code frames on the device: settings are tensors, a draw is a number in [0, 1), and nothing waits for the host."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import CompileConfig, GenerationConfig


@dataclass
class SamplingSettings:
    """How one kind of token is drawn.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    def __post_init__(self):
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0):
            raise ValueError(
                f"Sampling needs temperature > 0, top_k >= 0, 0 < top_p <= 1 and repetition_penalty > 0, got {self}."
            )

    @classmethod
    def read(cls, generation_config: GenerationConfig, prefix: str = "") -> "SamplingSettings":
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        values = {name: getattr(generation_config, prefix + name, None) for name in neutral}
        return cls(**{name: neutral[name] if value is None else value for name, value in values.items()})


@dataclass
class SamplingColumns:
    """
    Settings of several rows on the device, where a compiled graph reads them: it need not be made anew when they change.

    Args:
        temperature, top_k, top_p, repetition_penalty (`(rows, 1)`, float32).
        candidates: the most classes that any row may choose from, a power of two; None for all of them. A graph depends on it.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    repetition_penalty: torch.Tensor
    candidates: int | None

    @classmethod
    def of(cls, settings: list[SamplingSettings], device: torch.device | str = "cpu") -> "SamplingColumns":
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        columns = {name: torch.tensor([[float(getattr(row, name))] for row in settings], device=device) for name in names}
        limited = all(row.top_k for row in settings)
        largest = max(row.top_k for row in settings)
        return cls(**columns, candidates=1 << (largest - 1).bit_length() if limited else None)


def penalised(scores: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Repetition penalty (arXiv 1909.05858): scores (rows, classes) of the classes `seen` (bool) moved away from being chosen."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose_tokens(
    logits: torch.Tensor,
    settings: SamplingColumns,
    seen: torch.Tensor,
    uniforms: torch.Tensor,
    do_sample: bool,
) -> torch.Tensor:
    """
    One token per row: repetition penalty, then the best token, or temperature, top-k, top-p and a draw.

    Args:
        logits (`(rows, classes)`): -inf where a class is not allowed.
        settings: of the same rows.
        seen (`(rows, classes)`, bool): classes that the repetition penalty applies to.
        uniforms (`(rows,)`): draws in [0, 1), one per row, turned into tokens by the inverse of the cumulative distribution.

    Returns:
        `(rows,)` int64.
    """
    logits = penalised(logits.float(), seen, settings.repetition_penalty)
    if not do_sample:
        return logits.argmax(-1)
    candidates = min(settings.candidates or logits.shape[-1], logits.shape[-1])
    values, tokens = (logits / settings.temperature).topk(candidates, dim=-1)
    ranks = torch.arange(candidates, device=logits.device)
    excluded = (ranks >= settings.top_k) & (settings.top_k > 0)
    probabilities = values.masked_fill(excluded, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= settings.top_p) & (ranks > 0), 0.0)
    cumulative = probabilities.cumsum(-1)
    drawn = (cumulative <= uniforms[:, None].to(cumulative) * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must never reach an excluded token
    return tokens.gather(1, drawn.minimum(last))[:, 0]


def sample_frame(
    audio_head,
    code_tables: torch.nn.ModuleList,
    hidden: torch.Tensor,
    seen: torch.Tensor,
    settings: SamplingColumns,
    uniforms: torch.Tensor,
    do_sample: bool,
) -> torch.Tensor:
    """
    One frame of every row: eight positions of the audio head in turn, one graph, no word from the host in between.

    Args:
        audio_head, code_tables: the model's audio head and its embeddings of codes.
        hidden (`(rows, hidden_size)`): the LLM's final hidden states.
        seen (`(rows, classes of all codebooks)`, bool): codes of this piece of audio, one codebook after the other.
        settings: of the same rows. uniforms (`(rows, num_codebooks)`): draws in [0, 1).

    Returns:
        `(rows, num_codebooks)` int64.
    """
    seen_codes = seen.split([table.num_embeddings for table in code_tables], dim=1)

    def sample_code(codebook, logits):
        return choose_tokens(logits, settings, seen_codes[codebook][:, : logits.shape[1]], uniforms[:, codebook], do_sample)

    return audio_head.generate_frame(hidden, lambda codebook, chosen: code_tables[codebook](chosen), sample_code)


def language_step(
    base_model,
    tokens: torch.Tensor,
    codes: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor,
    cache,
) -> torch.Tensor:
    """
    One position of the LLM in every row; the text head is not part of it.

    Args:
        base_model: a `BaichuanAudioModel`.
        tokens (`(rows,)`), codes (`(rows, num_codebooks)`): what the last step chose; codes are -1 in rows without a frame.
        attention_mask (`(rows, positions)`, *optional*), positions (`(rows,)`): as for any decoder.
        cache: keys and values, filled in place.

    Returns:
        `(rows, hidden_size)`.
    """
    is_frame = (codes[:, 0] >= 0)[:, None]
    embeds = base_model.get_input_embeddings()(tokens)
    embeds = torch.where(is_frame, base_model.embed_codes(codes.clamp(min=0)).to(embeds.dtype), embeds)
    outputs = base_model(
        inputs_embeds=embeds[:, None],
        attention_mask=attention_mask,
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return outputs.last_hidden_state[:, -1]


@lru_cache
def _compiled(function, backend, mode, fullgraph, dynamic):
    return torch.compile(function, backend=backend, mode=mode, fullgraph=fullgraph, dynamic=dynamic)


def compiled(function, config: CompileConfig):
    """
    `function`, which returns a tensor, compiled as `config` says. Every model shares what was compiled before. Results are copies: CUDA
    graphs write into memory that they share, so whatever one of them returned is lost once another one runs.
    """
    graph = _compiled(function, config.backend, config.mode, config.fullgraph, config.dynamic)
    return lambda *inputs: graph(*inputs).clone()
