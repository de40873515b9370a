"""The mel decoder piece by piece: codes -> the hidden states that flow matching starts from.

The group norm after the up-sampling spans the whole clip, so no state is final before the clip is. Two policies:

- "exact" waits: a clip comes out when it is complete, as `decode` gives it.
- "low_latency" hands states on at once, normed by the statistics of what has been heard so far and, while that is little, of typical
  codes. A piece that is the whole clip comes out as `decode` gives it; otherwise states differ from the exact ones by a few per cent,
  least where pieces are long (`benchmarks/mel_decoder_latency.py`).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from .configuration_baichuan_audio import BaichuanAudioTokenizerConfig
from .modeling_common import check_codes, frame_lengths, length_mask, seeded_generator, sinusoidal_embedding
from .streaming_rows import StreamRows


# Positions (2 s) for which typical codes count beside what a clip has brought itself.
PRIOR_POSITIONS = 100
# Random frames of codes that stand for typical ones.
_TYPICAL_FRAMES = 1024


@dataclass
class NormStatistics:
    """
    Of a group norm's input, over channels and time.

    Args:
        mean, variance (`(batch,)`, float32).
        count (`(batch,)`, float32): positions in time they were taken over.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor, lengths: torch.Tensor) -> "NormStatistics":
        """Of states (batch, channels, time) in their valid positions, lengths (batch,)."""
        inside = length_mask(lengths, states.shape[2])[:, None]
        numbers = (lengths * states.shape[1]).clamp(min=1)
        states = states.float()
        mean = states.masked_fill(~inside, 0.0).sum((1, 2)) / numbers
        centred = (states - mean[:, None, None]).masked_fill(~inside, 0.0)
        return cls(mean, centred.square().sum((1, 2)) / numbers, lengths.float())

    def merged(self, other: "NormStatistics") -> "NormStatistics":
        """Of the positions of both together (Chan et al., 1979: exact, and without sums of large squares)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        apart = other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + (1 - share) * share * apart.square()
        return NormStatistics(self.mean + share * apart, variance, count)


@dataclass
class MelDecoderStream:
    """
    Clips on their way through the mel decoder, side by side. It holds every tensor of the stream; dropping it frees them.

    Args:
        config: of the tokenizer.
        batch (`int`): clips.
        policy (`"low_latency"` or `"exact"`): see above.
        prior (`NormStatistics`, *optional*): of typical codes; `typical_statistics` by default.

    Attributes:
        statistics (`NormStatistics`): of what each clip has brought so far.
    """

    config: BaichuanAudioTokenizerConfig
    batch: int
    policy: Literal["low_latency", "exact"] = "low_latency"
    prior: NormStatistics | None = None
    statistics: NormStatistics | None = field(default=None, init=False)
    position: int = field(default=0, init=False)  # hidden states handed out
    codes: list[torch.Tensor] = field(default_factory=list, init=False)  # "exact": pieces (batch, num_codebooks, frames)
    overlap: torch.Tensor | None = field(default=None, init=False)  # (batch, width, kernel - stride): sums not yet complete

    def __post_init__(self):
        self.rows = StreamRows(self.batch)
        self.caches: list[list[torch.Tensor]] = [[] for _ in range(self.config.decoder_layers)]  # keys and values of each layer

    @property
    def extra(self) -> int:
        """F code frames make F * downsample_factor + extra hidden states."""
        return self.config.decoder_kernel_size - self.config.downsample_factor


@torch.no_grad()
def typical_statistics(tokenizer, num_codebooks: int) -> NormStatistics:
    """
    Statistics of codes drawn as often as training assigned them (the codebooks' `cluster_size`), each codebook by itself. (1,) each.

    They follow from the checkpoint alone: one result serves every stream that uses as many codebooks.
    """
    decoder, generator = tokenizer.mel_decoder, seeded_generator("typical codes")
    codes = []
    for codebook in tokenizer.quantizer.codebooks[:num_codebooks]:
        usage = codebook.cluster_size.float().cpu().clamp(min=0)
        usage = usage if usage.sum() > 0 else torch.ones_like(usage)
        codes.append(torch.multinomial(usage, _TYPICAL_FRAMES, replacement=True, generator=generator))
    vectors = tokenizer.quantizer.decode(torch.stack(codes)[None].to(decoder.in_proj.weight.device))
    states = decoder.dconv1.conv(decoder.in_proj(vectors.to(decoder.in_proj.weight.dtype)).transpose(1, 2))
    return NormStatistics.of(states, torch.tensor([states.shape[2]], device=states.device))


def push(tokenizer, audio_codes: torch.Tensor, state: MelDecoderStream, lengths, final: bool, num_codebooks: int):
    """`BaichuanAudioTokenizerModel.stream_decode`."""
    rows, device = state.rows, audio_codes.device
    check_codes(audio_codes, state.config.codebook_sizes)
    if audio_codes.shape[0] != rows.batch:
        raise ValueError(f"`audio_codes` must be of the stream's {rows.batch} clips, got shape {tuple(audio_codes.shape)}.")
    valid = frame_lengths(audio_codes) if lengths is None else torch.as_tensor(lengths, device=device)
    if valid.shape == (rows.batch,) and bool((audio_codes.amin(1) < 0)[length_mask(valid, audio_codes.shape[2])].any()):
        raise ValueError(f"`audio_codes` have padding (-1) within `lengths` {valid.tolist()}.")
    longest = tokenizer.max_code_frames
    total = max((r + v for r, v in zip(rows.received, valid.tolist())), default=0)
    if total > longest:
        raise ValueError(
            f"`audio_codes` make a clip of {total} frames, the mel decoder takes {longest} at most: begin a new clip."
        )
    before = list(rows.received)
    used = rows.accept("audio_codes", audio_codes.shape[2], valid.tolist(), final)
    new = torch.tensor([now - then for now, then in zip(rows.received, before)], device=device)
    if state.policy == "exact":
        state.codes.append(audio_codes[..., :used].masked_fill(~length_mask(new, used)[:, None], -1))
        hidden_states = decode_whole(tokenizer, state, num_codebooks)
    else:
        vectors = tokenizer.quantizer.decode(audio_codes[:, :num_codebooks, :used].clamp(min=0))
        hidden_states = decode_piece(tokenizer, vectors, new, state, num_codebooks)
    start, state.position = state.position, state.position + hidden_states.shape[1]
    ready = rows.ready(start, state.position, state.config.downsample_factor, state.extra)
    ready = torch.tensor(ready, device=device)
    return hidden_states.masked_fill(~length_mask(ready, hidden_states.shape[1])[..., None], 0.0), ready, state


def decode_whole(tokenizer, state: MelDecoderStream, num_codebooks: int) -> torch.Tensor:
    """The whole clips (batch, time, hidden_size) once all have ended; nothing before and after."""
    decoder, rows = tokenizer.mel_decoder, state.rows
    if not rows.all_ended or not rows.position or state.position:
        return decoder.in_proj.weight.new_empty(rows.batch, 0, state.config.hidden_size)
    codes, state.codes = torch.cat(state.codes, dim=2), []
    heard = [row for row, length in enumerate(rows.received) if length]
    decoded = tokenizer.decode(codes[heard], num_codebooks).hidden_states
    hidden_states = decoded.new_zeros(rows.batch, *decoded.shape[1:])
    hidden_states[heard] = decoded
    return hidden_states


def upsample(conv: nn.ConvTranspose1d, states: torch.Tensor, state: MelDecoderStream, stop: int) -> torch.Tensor:
    """(batch, width, new frames) -> the outputs from `state.position` to `stop`; what later frames add to is kept."""
    begun, kept = state.overlap is not None, max(0, state.extra)
    overlap = state.overlap if begun else states.new_zeros(states.shape[0], conv.out_channels, kept)
    sums = overlap
    if states.shape[2]:
        sums = nn.functional.conv_transpose1d(states, conv.weight, stride=conv.stride)
        sums[..., :kept] += overlap
        if begun:  # a kernel shorter than its stride leaves a gap between frames, where there is only the bias
            sums = nn.functional.pad(sums, (max(0, -state.extra), 0))
    ready = stop - state.position
    state.overlap = sums[..., ready:].clone()
    return sums[..., :ready] + conv.bias[:, None]


def decode_piece(tokenizer, vectors, lengths, state: MelDecoderStream, num_codebooks: int) -> torch.Tensor:
    """Vectors (batch, new frames, quantizer_size), valid frames (batch,) -> (batch, time now ready, hidden_size)."""
    decoder, rows, config = tokenizer.mel_decoder, state.rows, state.config
    dtype, device = decoder.in_proj.weight.dtype, vectors.device
    stop = rows.position * config.downsample_factor + (state.extra if rows.all_ended or state.extra < 0 else 0)
    stop = stop if rows.position else 0
    if stop <= state.position:
        return torch.empty(rows.batch, 0, config.hidden_size, dtype=dtype, device=device)
    states = decoder.in_proj(vectors.to(dtype)).masked_fill(~length_mask(lengths, vectors.shape[1])[..., None], 0.0)
    states = upsample(decoder.dconv1.conv, states.transpose(1, 2), state, stop)

    ready = rows.ready(state.position, stop, config.downsample_factor, state.extra)
    states = running_norm(tokenizer, states, torch.tensor(ready, device=device), state, num_codebooks).transpose(1, 2)
    positions = sinusoidal_embedding(torch.arange(state.position, stop, device=device), config.hidden_size)
    states = states + positions.to(dtype)
    mask = None  # flash attention is causal by itself, from the last position back
    if config._attn_implementation in ("eager", "sdpa"):
        mask = torch.full((states.shape[1], stop), torch.finfo(dtype).min, dtype=dtype, device=device)
        mask = mask.triu(state.position + 1)[None, None]
    for layer, cache in zip(decoder.layers, state.caches):
        states = layer(states, mask, cache=cache)
    return decoder.layer_norm(states)


def running_norm(tokenizer, states, lengths, state: MelDecoderStream, num_codebooks: int) -> torch.Tensor:
    """The group norm of (batch, width, time), by what each clip has brought up to this piece's end."""
    norm, new = tokenizer.mel_decoder.dconv1.norm, NormStatistics.of(states, lengths)
    state.statistics = new if state.statistics is None else state.statistics.merged(new)
    # A clip that has ended is known as a whole: its own statistics are the exact ones.
    weights = torch.tensor([0.0 if ended else float(PRIOR_POSITIONS) for ended in state.rows.ended], device=states.device)
    known = state.statistics
    if weights.any():
        if state.prior is None:
            state.prior = typical_statistics(tokenizer, num_codebooks)
        known = known.merged(NormStatistics(state.prior.mean, state.prior.variance, weights))
    normed = (states.float() - known.mean[:, None, None]) * torch.rsqrt(known.variance + norm.eps)[:, None, None]
    normed = normed * norm.weight.float()[:, None] + norm.bias.float()[:, None]
    return normed.masked_fill(~length_mask(lengths, states.shape[2])[:, None], 0.0).to(states.dtype)


class MelDecoderStreamingMixin:
    """`start_stream` and `stream_decode`, for the tokenizer."""

    def start_stream(
        self,
        batch: int = 1,
        policy: Literal["low_latency", "exact"] = "low_latency",
        prior: NormStatistics | None = None,
    ) -> MelDecoderStream:
        """
        The state before a stream's first code; see [`~BaichuanAudioTokenizerModel.stream_decode`].

        Args:
            batch (`int`, defaults to 1): clips side by side.
            policy (`"low_latency"` or `"exact"`): whether states come out at once, nearly right, or when the clip is complete.
            prior (`NormStatistics` of `(batch,)` or `(1,)`, *optional*): what a "low_latency" clip is normed by while little of it is
                known; typical codes by default. A stream's `prior` serves the next stream, and saves working it out again; so does the
                `statistics` of a clip before.

        Raises:
            ValueError: another policy, or no clips.
        """
        if policy not in ("low_latency", "exact"):
            raise ValueError(f'`policy` must be "low_latency" or "exact", got {policy!r}.')
        if batch < 1:
            raise ValueError(f"`batch` must be at least 1, got {batch}.")
        return MelDecoderStream(self.config, batch, policy, prior)

    @torch.no_grad()
    def stream_decode(
        self,
        audio_codes: torch.Tensor,
        state: MelDecoderStream,
        lengths: torch.Tensor | None = None,
        final: bool = False,
        num_codebooks: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, MelDecoderStream]:
        """
        Pushes the next codes; hidden states for flow matching come out as the stream's policy has it.

        What has come out never changes. F frames of a "low_latency" clip make the 4 F - 1 states that `decode` makes of them; a piece
        that is a whole clip, first and final, makes the same states.

        Args:
            audio_codes (`(batch, num_codebooks, frames)`, int64): any number of frames, 0 too; -1 past the end of a clip.
            state: from `start_stream` or the last call; it moves on in place.
            lengths (`(batch,)`, *optional*): valid frames of this piece; by default those before the padding. A clip with fewer than
                `frames` has ended and takes no more.
            final: whether this is the last piece of every clip.
            num_codebooks (`int`, *optional*): use only the first ones; the same in all pieces of a stream.

        Returns:
            Hidden states `(batch, ready, hidden_size)` at 50 Hz, zero past a clip's end; the valid ones in it, `(batch,)` int64; the
            state.

        Raises:
            ValueError: codes of another shape or range, lengths out of range, a clip longer than the position table was trained for,
                frames for a clip that has ended, or a piece after the final one.
        """
        return push(self, audio_codes, state, lengths, final, self.used_codebooks(num_codebooks))
