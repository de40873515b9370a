"""Flow matching piece by piece: the state of a stream, and how a push moves it on.

The estimator looks back without end and ahead to the end of the attention chunk. So a chunk is solved, through all Euler steps, once it
is complete; every step keeps what later chunks see of it, and no frame is solved twice.
"""

from dataclasses import dataclass, field

import torch

from .configuration_baichuan_audio import BaichuanAudioFlowMatchingConfig
from .modeling_common import length_mask, position_noise
from .modeling_flow_estimator import AttentionSpan, padding_mask
from .modeling_flow_solver import SolverSettings, integrate
from .streaming_rows import StreamRows


def causal_mask(states: torch.Tensor, past: int) -> torch.Tensor:
    """Additive (1, 1, frames, past + frames) mask in the dtype of `states` (batch, frames, ...): a frame sees the past and itself."""
    frames = states.shape[1]
    mask = torch.full((frames, past + frames), torch.finfo(states.dtype).min, dtype=states.dtype, device=states.device)
    return mask.triu(past + 1)[None, None]


class KeyValueCache:
    """Keys and values of all frames so far, in a buffer that grows by half: what is copied in all stays linear in the frames."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None  # (2, batch, heads, capacity, head_dim)
        self.length = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, frames, head_dim) each -> views of all keys and of all values."""
        start, self.length = self.length, self.length + key.shape[2]
        capacity = 0 if self.buffer is None else self.buffer.shape[3]
        if self.length > capacity:
            batch, heads, _, width = key.shape
            grown = key.new_empty(2, batch, heads, max(self.length, capacity * 3 // 2), width)
            if self.buffer is not None:
                grown[:, :, :, :start] = self.buffer[:, :, :, :start]
            self.buffer = grown
        self.buffer[0, :, :, start : self.length] = key
        self.buffer[1, :, :, start : self.length] = value
        keys, values = self.buffer[:, :, :, : self.length]
        return keys, values


class StageCache:
    """What one U-Net stage keeps: two convolutions' last inputs, and the keys and values of each transformer block."""

    def __init__(self, blocks: int):
        self.resnet: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.attention = [KeyValueCache() for _ in range(blocks)]


class EstimatorCache:
    """What the estimator keeps at one flow time: its stages', and the inputs of the down, up and final convolution."""

    def __init__(self, config: BaichuanAudioFlowMatchingConfig):
        self.stages = [StageCache(config.estimator_blocks) for _ in range(config.estimator_mid_stages + 2)]
        self.convs: tuple[list[torch.Tensor], ...] = ([], [], [])


@dataclass
class FlowMatchingStream:
    """
    Clips on their way through the flow-matching decoder, side by side. It holds every tensor of the stream; dropping it frees them.

    The keys and values of the past are most of it. The released estimator keeps 0.23 MB a frame (float32) for each Euler step, twice
    that under guidance: ten guided steps make 230 MB for each second of a clip, and up to half more lie ready for what follows.

    Args:
        config: of the decoder.
        seeds (`list[int]`): one for each clip, of its noise.
        settings (`SolverSettings`): of the solution.
    """

    config: BaichuanAudioFlowMatchingConfig
    seeds: list[int]
    settings: SolverSettings
    position: int = field(default=0, init=False)  # frames solved
    chunk: int = field(default=0, init=False)  # chunks solved
    pending: torch.Tensor | None = field(default=None, init=False)  # (batch, frames, input_size): of the chunk not yet complete
    shifts: torch.Tensor | None = field(default=None, init=False)  # (steps, stages, channels): the estimator's `time_shifts`

    def __post_init__(self):
        self.rows = StreamRows(len(self.seeds))
        self.prenet: list[list[torch.Tensor]] = [[] for _ in range(self.config.prenet_layers)]
        self.steps = [EstimatorCache(self.config) for _ in range(self.settings.num_steps)]

    @property
    def ended(self) -> list[bool]:
        return self.rows.ended

    def accept(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None, final: bool) -> None:
        """Checks a piece and adds it to `pending`. A piece that is refused leaves the state as it was."""
        batch, width = len(self.seeds), self.config.input_size
        if hidden_states.dim() != 3 or (hidden_states.shape[0], hidden_states.shape[2]) != (batch, width):
            raise ValueError(
                f"`hidden_states` must be ({batch}, frames, {width}) for a stream of {batch} clips, "
                f"got {tuple(hidden_states.shape)}."
            )
        frames = hidden_states.shape[1]
        if lengths is None:
            if frames and self.rows.all_ended:
                raise ValueError(f"`hidden_states` bring {frames} frames, but every clip of the stream has ended.")
            valid = self.rows.whole(frames)
        else:
            valid = [int(length) for length in lengths]
        if len(valid) != batch or min(valid) < 0 or max(valid) > frames:
            raise ValueError(f"`lengths` must be {batch} numbers between 0 and {frames}, the frames of this piece, got {valid}.")
        self.rows.add(frames, valid, final)
        self.pending = hidden_states if self.pending is None else torch.cat([self.pending, hidden_states], dim=1)

    def next_chunk(self) -> tuple[torch.Tensor, int] | None:
        """Hidden states (batch, frames, input_size) of the next chunk if it is complete, and the frame it ends at; takes them out."""
        sizes = self.settings.chunk_sizes
        end = self.position + sizes[min(self.chunk, len(sizes) - 1)]
        total = self.rows.position
        if self.rows.all_ended:
            end = min(end, total)
        if end > total or end == self.position:
            return None
        count = end - self.position
        hidden_states, self.pending = self.pending[:, :count], self.pending[:, count:]
        return hidden_states, end


def push(decoder, hidden_states, state: FlowMatchingStream, lengths=None, final=False):
    """`BaichuanAudioFlowMatchingDecoder.stream`."""
    state.accept(hidden_states, lengths, final)
    config, device = decoder.config, hidden_states.device
    start = state.position
    mel = [torch.empty(len(state.seeds), 0, config.num_mel_bins, device=device)]
    while (chunk := state.next_chunk()) is not None:
        mel.append(solve_chunk(decoder, state, *chunk))
    state.pending = state.pending.clone()  # what is left is less than a chunk, and may be a view of a long piece
    ready = [min(received, state.position) - min(received, start) for received in state.rows.received]
    return torch.cat(mel, dim=1), torch.tensor(ready, device=device), state


def solve_chunk(decoder, state: FlowMatchingStream, hidden_states: torch.Tensor, end: int) -> torch.Tensor:
    """Hidden states of the chunk that ends at frame `end` -> its mel (batch, frames, num_mel_bins); the state moves on."""
    frames, device, dtype = hidden_states.shape[1], hidden_states.device, decoder.estimator.dtype
    condition = decoder.prenet(hidden_states.to(dtype), caches=state.prenet)
    noise = torch.zeros(condition.shape)
    valid = [min(max(received - state.position, 0), frames) for received in state.rows.received]
    for row, seed, length in zip(noise, state.seeds, valid):
        row[:length] = position_noise(
            seed, "flow", state.position, length, decoder.config.num_mel_bins, decoder.config.attention_chunk_size
        )
    if state.shifts is None:
        state.shifts = decoder.estimator.time_shifts(torch.tensor(state.settings.time_grid()[:-1], device=device))
    mask = None
    if min(state.rows.received) < end:
        lengths = torch.tensor(state.rows.received, device=device)
        mask = padding_mask(lengths.repeat(2) if state.settings.guidance else lengths, end, dtype)
    span = [AttentionSpan(0, frames, end, mask)]
    mel = integrate(decoder.estimator, noise.to(device), condition, state.settings, span, state.shifts, state.steps)
    state.position, state.chunk = end, state.chunk + 1
    inside = length_mask(torch.tensor(valid, device=device), frames)
    return mel.masked_fill(~inside[..., None], 0.0)
