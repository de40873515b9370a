"""The vocoder piece by piece: what every layer keeps of a stream's past, and how a push moves it on.

Each layer keeps its own left context and hands on whatever no later frame can change, so that nothing is computed twice and the
waveform is that of the whole clip. Zeros and reflections stand only at the true start and end. Sums of branches wait for the slowest
branch: how far the sound stays behind the mel follows from the kernels alone (`vocoder_delay`).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from .configuration_baichuan_audio import BaichuanAudioVocoderConfig
from .modeling_common import draw_seeds, position_noise
from .streaming_rows import StreamRows


def masked_from(states: torch.Tensor, start: int, ends: list[int]) -> torch.Tensor:
    """(batch, ..., time) at absolute positions `start`, `start + 1`, ... -> the same, zero from each clip's end on."""
    time = states.shape[-1]
    if min(ends) >= start + time:
        return states
    limits = torch.tensor(ends, device=states.device).view(-1, *[1] * (states.dim() - 1)) - start
    return states.masked_fill(torch.arange(time, device=states.device) >= limits, 0.0)


class ConvStream:
    """Inputs of one convolution that later outputs still need. It begins with the zeros that the whole clip is padded with."""

    def __init__(self):
        self.context: torch.Tensor | None = None  # (batch, channels, time)
        self.position = 0  # outputs so far

    def push(self, conv: nn.Conv1d, states: torch.Tensor, ends: list[int], final: bool) -> torch.Tensor:
        """(batch, in_channels, new inputs) -> (batch, out_channels, outputs now complete), zero from `ends` (in outputs) on."""
        batch, channels = states.shape[:2]
        zeros = states.new_zeros(batch, channels, conv.padding[0])
        states = torch.cat([zeros if self.context is None else self.context, states, *([zeros] if final else [])], dim=2)
        stride, reach = conv.stride[0], conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
        count = max(0, (states.shape[2] - reach) // stride + 1)
        self.context = states[..., count * stride :].clone()  # not a view, which would hold the whole piece
        if count == 0:
            return states.new_empty(batch, conv.out_channels, 0)
        weight, bias = conv.weight.float(), conv.bias.float()
        outputs = nn.functional.conv1d(states, weight, bias, stride=stride, dilation=conv.dilation)
        outputs = masked_from(outputs, self.position, ends)
        self.position += count
        return outputs


class ConvTransposeStream:
    """Sums at the right edge of one transposed convolution that later inputs still add to."""

    def __init__(self):
        self.overlap: torch.Tensor | None = None  # (batch, out_channels, kernel - stride)
        self.position = 0

    def push(self, conv: nn.ConvTranspose1d, states: torch.Tensor, ends: list[int], final: bool) -> torch.Tensor:
        """As `ConvStream.push`; kernel - stride outputs, half of them, are cropped at each end of the clip."""
        count, stride, crop = states.shape[2], conv.stride[0], conv.padding[0]
        if self.overlap is None:
            self.overlap = states.new_zeros(states.shape[0], conv.out_channels, conv.kernel_size[0] - stride)
            self.position = -crop
        sums = self.overlap
        if count:
            sums = nn.functional.conv_transpose1d(states, conv.weight.float(), stride=stride)
            sums[..., : self.overlap.shape[2]] += self.overlap
        stop = count * stride + (crop if final else 0)
        self.overlap = sums[..., count * stride :].clone()
        outputs = sums[..., max(0, -self.position) : stop] + conv.bias.float()[:, None]
        outputs = masked_from(outputs, max(0, self.position), ends)
        self.position += stop
        return outputs


class Join:
    """Branches that are added: what has come out of one and waits for the others."""

    def __init__(self):
        self.waiting: list[torch.Tensor] | None = None

    def push(self, *branches: torch.Tensor) -> list[torch.Tensor]:
        """New outputs of each branch (batch, channels, any) -> as many of each as all have."""
        if self.waiting is not None:
            branches = [
                torch.cat([old, new], dim=2) if old.shape[2] else new for old, new in zip(self.waiting, branches, strict=True)
            ]
        count = min(branch.shape[2] for branch in branches)
        self.waiting = [branch[..., count:].clone() for branch in branches]
        return [branch[..., :count] for branch in branches]


class ResBlockStream:
    """A `VocoderResBlock`."""

    def __init__(self, pairs: int):
        self.convs = [(ConvStream(), ConvStream(), Join()) for _ in range(pairs)]

    def push(self, block, states: torch.Tensor, ends: list[int], final: bool) -> torch.Tensor:
        layers = zip(block.convs1, block.convs2, block.activations1, block.activations2)
        for (stream1, stream2, join), (conv1, conv2, snake1, snake2) in zip(self.convs, layers):
            hidden = stream1.push(conv1, snake1(states), ends, final)
            hidden = stream2.push(conv2, snake2(hidden), ends, final)
            states, hidden = join.push(states, hidden)
            states = states + hidden
        return states


class StageStream:
    """A `VocoderStage`."""

    def __init__(self, config: BaichuanAudioVocoderConfig):
        pairs = len(config.resblock_dilations)
        self.upsample, self.source_down = ConvTransposeStream(), ConvStream()
        self.source_resblock = ResBlockStream(pairs)
        self.resblocks = [ResBlockStream(pairs) for _ in config.resblock_kernel_sizes]
        self.fusion, self.mean = Join(), Join()
        self.reflected = False
        self.held: torch.Tensor | None = None  # the first output of the last stage, until there is a second one to put before it

    def reflect_left(self, states: torch.Tensor) -> torch.Tensor:
        """One position more in front of the clip, a copy of its second one."""
        if self.reflected:
            return states
        if self.held is not None:
            states = torch.cat([self.held, states], dim=2)
        self.reflected = states.shape[2] > 1
        if self.reflected:
            self.held = None
            return torch.cat([states[..., 1:2], states], dim=2)
        self.held = states
        return states[..., :0]

    def push(self, stage, states, source_stft, ends: list[int], final: bool) -> torch.Tensor:
        """(batch, 2 * channels, any), (batch, n_fft + 2, any), ends in outputs of the up-sampling -> (batch, channels, any)."""
        states = self.upsample.push(stage.upsample, states, ends, final)
        if stage.is_last:
            states, ends = self.reflect_left(states), [end + 1 for end in ends]
        source = self.source_down.push(stage.source_down, source_stft, ends, final)
        source = self.source_resblock.push(stage.source_resblock, source, ends, final)
        states, source = self.fusion.push(states, source)
        states = states + source
        branches = [stream.push(block, states, ends, final) for stream, block in zip(self.resblocks, stage.resblocks)]
        return sum(self.mean.push(*branches)) / len(branches)


class SourceStream:
    """The source signal: where its sines stand, and the block of noise that the next sample lies in."""

    def __init__(self, seeds: list[int]):
        self.seeds = seeds
        self.position = 0  # frames
        self.phases: torch.Tensor | None = None  # (batch, harmonics)
        self.turns: torch.Tensor | None = None  # (batch, harmonics) int64, see `HarmonicSource.turns`
        self.blocks: list[tuple[int, torch.Tensor] | None] = [None] * len(seeds)

    def noise(self, row: int, start: int, stop: int, width: int, size: int) -> torch.Tensor:
        """Rows `start` to `stop` of the clip's `position_noise` (blocks of `size`), drawing no block twice: (rows, width)."""
        pieces = []
        for index in range(start // size, -(-stop // size)):
            if self.blocks[row] is None or self.blocks[row][0] != index:
                self.blocks[row] = index, position_noise(self.seeds[row], "source", index * size, size, width, size)
            pieces.append(self.blocks[row][1][max(0, start - index * size) : stop - index * size])
        return torch.cat(pieces)

    def push(self, source, f0: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """(batch, frames) in Hz -> (batch, frames * hop_length)."""
        config, frames = source.config, f0.shape[1]
        if frames == 0:
            return f0
        if self.phases is None:
            self.phases = source.draw_phases(self.seeds).to(f0.device)
        start, width = self.position * config.hop_length, config.num_harmonics + 1
        noise = torch.zeros(f0.shape[0], frames * config.hop_length, width)
        for row, end in enumerate(ends):
            stop = min(end, self.position + frames) * config.hop_length
            if stop > start:
                noise[row, : stop - start] = self.noise(row, start, stop, width, config.sampling_rate)
        signal = source(f0, self.phases, noise.to(f0.device), self.turns)
        self.turns = source.turns(f0, self.turns)[:, -1].clone()
        self.position += frames
        return signal


class StftStream:
    """`BaichuanAudioVocoder.stft`: samples that later frames still read."""

    def __init__(self):
        self.samples: torch.Tensor | None = None  # (batch, time) from absolute sample `start`
        self.start = 0
        self.position = 0  # frames

    def push(self, signal: torch.Tensor, ends: list[int], final: bool, size: int, hop: int) -> torch.Tensor:
        """(batch, new samples), ends in samples -> (batch, size + 2, frames): real then imaginary part."""
        half = size // 2
        signal = signal if self.samples is None else torch.cat([self.samples, signal], dim=1)
        known = self.start + signal.shape[1]
        # The first frames also read `half` samples, reflected at the start.
        count = known // hop + 1 if final else (known - half) // hop + 1 if known > half else 0
        if count <= self.position:
            self.samples = signal
            return signal.new_empty(signal.shape[0], size + 2, 0)
        steps = torch.arange(self.position * hop - half, (count - 1) * hop + half, device=signal.device).abs()
        steps = steps.expand(len(ends), -1)
        if min(ends) < known + half:
            last = torch.tensor(ends, device=signal.device)[:, None] - 1
            steps = torch.where(steps > last, 2 * last - steps, steps)
        frames = signal.gather(1, (steps - self.start).clamp(min=0)).unfold(1, size, hop)
        spectrum = torch.fft.rfft(frames * torch.hann_window(size, device=signal.device)).transpose(1, 2)
        outputs = torch.cat([spectrum.real, spectrum.imag], dim=1)
        outputs = masked_from(outputs, self.position, [end // hop + 1 for end in ends])
        # A frame more than the next one reads: what the end reflects reaches that far.
        start = max(self.start, (count - 1) * hop - half)
        self.samples = signal[:, start - self.start :].clone()
        self.start, self.position = start, count
        return outputs


class InverseStftStream:
    """`BaichuanAudioVocoder.istft`: the sums of signal and of window that later frames still add to."""

    def __init__(self):
        self.overlap: torch.Tensor | None = None  # (batch, 2, size - hop)
        self.position = 0  # frames

    def push(self, magnitude, phase, ends: list[int], final: bool, size: int, hop: int) -> torch.Tensor:
        """(batch, bins, new frames) twice, ends in frames -> (batch, samples now complete)."""
        batch, _, count = magnitude.shape
        if count == 0:
            return magnitude.new_empty(batch, 0)
        window = torch.hann_window(size, device=magnitude.device)
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=size) * window
        columns = torch.cat([frames.transpose(1, 2), window.square()[:, None].expand(batch, -1, count)], dim=1)
        # Frames past a clip's end count neither as signal nor as window.
        columns = masked_from(columns, self.position, ends)
        total = (count - 1) * hop + size
        sums = nn.functional.fold(columns, (1, total), (1, size), stride=(1, hop))[:, :, 0]
        if self.overlap is not None:
            sums[..., : size - hop] += self.overlap
        # The outermost size / 2 samples are cropped.
        start = max(0, size // 2 - self.position * hop)
        stop = count * hop + (size // 2 - hop if final else 0)
        self.overlap = sums[..., count * hop :].clone()
        self.position += count
        signal, weight = sums[..., start:stop].unbind(1)
        return signal / weight.clamp(min=1e-11)


@dataclass
class VocoderStream:
    """
    Clips on their way through the vocoder, side by side. It holds every tensor of the stream, of a size that does not grow with it.

    Args:
        config: of the vocoder.
        seeds (`list[int]`): one for each clip, of its source phases and noise.
    """

    config: BaichuanAudioVocoderConfig
    seeds: list[int]
    position: int = field(default=0, init=False)  # samples handed out
    flushed: bool = field(default=False, init=False)  # whether every clip's last sample is out

    def __post_init__(self):
        config = self.config
        self.rows = StreamRows(len(self.seeds))
        self.f0_convs = [ConvStream() for _ in range(config.f0_layers)]
        self.source, self.stft, self.istft = SourceStream(self.seeds), StftStream(), InverseStftStream()
        self.conv_pre, self.conv_post = ConvStream(), ConvStream()
        self.stages = [StageStream(config) for _ in config.upsample_rates]


def push(vocoder, mel: torch.Tensor, state: VocoderStream, lengths, final: bool):
    """`BaichuanAudioVocoder.stream`."""
    config, rows = vocoder.config, state.rows
    if mel.dim() != 3 or (mel.shape[0], mel.shape[2]) != (rows.batch, config.num_mel_bins):
        raise ValueError(
            f"`mel` must be ({rows.batch}, frames, {config.num_mel_bins}) for a stream of {rows.batch} clips, got {tuple(mel.shape)}."
        )
    start = rows.position
    used = rows.accept("mel", mel.shape[1], lengths, final)
    waveform = mel.new_empty(rows.batch, 0, dtype=torch.float32)
    if rows.position and not state.flushed:
        mel = masked_from(mel[:, :used].float().transpose(1, 2), start, rows.ends)
        waveform = decode(vocoder, mel, state, rows.ends, rows.all_ended)
    state.flushed = rows.all_ended
    start, state.position = state.position, state.position + waveform.shape[1]
    ready = rows.ready(start, state.position, config.hop_length)
    return waveform, torch.tensor(ready, device=mel.device), state


def decode(vocoder, mel: torch.Tensor, state: VocoderStream, ends: list[int], final: bool) -> torch.Tensor:
    """(batch, num_mel_bins, new frames), zero past `ends` (in frames) -> (batch, samples now complete)."""
    config = vocoder.config
    size, hop = config.istft_n_fft, config.istft_hop_length
    samples = [end * config.hop_length for end in ends]

    f0 = f0_of(vocoder.f0_predictor, mel, state.f0_convs, ends, final)
    source = state.source.push(vocoder.source, f0, ends)
    source_stft = state.stft.push(source, samples, final, size, hop)

    states = state.conv_pre.push(vocoder.conv_pre, mel, ends, final)
    for stage, stream in zip(vocoder.stages, state.stages):
        states = nn.functional.leaky_relu(states, config.leaky_relu_slope)
        ends = [end * stage.rate for end in ends]
        states = stream.push(stage, states, source_stft, ends, final)
    frame_ends = [end + 1 for end in ends]
    states = state.conv_post.push(vocoder.conv_post, nn.functional.leaky_relu(states), frame_ends, final)
    bins = size // 2 + 1
    magnitude, phase = states[:, :bins].exp().clamp(max=config.max_magnitude), states[:, bins:].sin()
    waveform = state.istft.push(magnitude, phase, frame_ends, final, size, hop)
    return masked_from(waveform.clamp(-config.audio_limit, config.audio_limit), state.position, samples)


def f0_of(predictor, mel: torch.Tensor, streams: list[ConvStream], ends: list[int], final: bool) -> torch.Tensor:
    """The F0 predictor: (batch, num_mel_bins, new frames) -> (batch, frames now complete) in Hz."""
    for conv, stream in zip(predictor.convs, streams):
        mel = nn.functional.elu(stream.push(conv, mel, ends, final))
    f0 = nn.functional.linear(mel.transpose(1, 2), predictor.classifier.weight.float(), predictor.classifier.bias.float())
    return masked_from(f0[..., 0].abs(), streams[-1].position - f0.shape[1], ends)


def vocoder_delay(config: BaichuanAudioVocoderConfig) -> int:
    """
    How many samples the sound of a stream stays behind its mel: half of every kernel on the longest way through the network.

    The longest way leads through the F0 predictor, the source signal and the first stage, where a kernel spans most time.
    """
    size, hop = config.istft_n_fft, config.istft_hop_length
    spans = sum(dilation + 1 for dilation in config.resblock_dilations)
    # Each figure is in positions of its own layer: samples, STFT frames, frames of the mel or of a stage.
    source = config.f0_layers * config.hop_length
    source_stft = -(-(source + size // 2) // hop) - 1
    behind = 3
    for index, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes)):
        later = math.prod(config.upsample_rates[index + 1 :])
        is_last = index == len(config.upsample_rates) - 1
        behind = behind * rate + (kernel - rate) // 2 - is_last
        reach, padding = (1, 0) if later == 1 else (2 * later, later // 2)
        fused = -(-(source_stft + reach - padding) // later) - 1
        behind = max(behind, fused + config.source_resblock_kernel_sizes[index] // 2 * spans)
        behind += max(config.resblock_kernel_sizes) // 2 * spans
    return (behind + 3) * hop + size // 2


class VocoderStreamingMixin:
    """`start_stream` and `stream`, for the vocoder."""

    @property
    def stream_delay(self) -> int:
        """Mel frames that the sound of a stream stays behind at most: after T of them, at least T - delay frames of sound are out."""
        return -(-vocoder_delay(self.config) // self.config.hop_length)

    def start_stream(self, seeds: list[int]) -> VocoderStream:
        """
        The state before a stream's first frame; see [`~BaichuanAudioVocoder.stream`].

        Args:
            seeds: one for each clip, of its source phases and noise.

        Raises:
            ValueError: no seeds, or not integers.
        """
        if isinstance(seeds, int) or not seeds:
            raise ValueError(f"`seeds` must be a list of one integer for each clip, got {seeds!r}.")
        return VocoderStream(self.config, draw_seeds(seeds, len(seeds)))

    @torch.no_grad()
    def stream(
        self, mel: torch.Tensor, state: VocoderStream, lengths: torch.Tensor | None = None, final: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, VocoderStream]:
        """
        Pushes the next frames; sound comes out `stream_delay` frames later, and is what `forward` gives for the whole clip.

        Args:
            mel (`(batch, frames, num_mel_bins)`): natural-log mel at 50 Hz; any number of frames, 0 too.
            state: from `start_stream` or the last call; it moves on in place.
            lengths (`(batch,)`, *optional*): valid frames of this piece. A clip with fewer than `frames` has ended and takes no more;
                its last sound comes out in step with the clips that go on. By default clips that have not ended have all of them.
            final: whether this is the last piece of every clip.

        Returns:
            Waveform `(batch, ready_samples)`, float32, zero past a clip's end; the valid samples in it, `(batch,)` int64; the state.

        Raises:
            ValueError: mel of another shape, lengths out of range, frames for a clip that has ended, or a piece after the final one.
        """
        return push(self, mel, state, lengths, final)
