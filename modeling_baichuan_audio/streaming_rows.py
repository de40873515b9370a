"""Clips side by side in a stream: how much each has brought, and which have ended."""

from dataclasses import dataclass, field

import torch


# The end of a clip that goes on: past every position, yet a number that int64 holds.
NOT_ENDED = 2**40


@dataclass
class StreamRows:
    """
    The clips of a stream move in step: a piece brings the same frames to all, and a clip that brings fewer has ended with it.

    Args:
        batch (`int`): clips.
    """

    batch: int
    position: int = field(default=0, init=False)  # frames of the longest clip so far
    received: list[int] = field(init=False)  # valid frames of each clip
    ended: list[bool] = field(init=False)
    closed: bool = field(default=False, init=False)  # whether a piece came with `final`

    def __post_init__(self):
        self.received = [0] * self.batch
        self.ended = [False] * self.batch

    @property
    def all_ended(self) -> bool:
        return all(self.ended)

    @property
    def ends(self) -> list[int]:
        """Length in frames of each clip that has ended, `NOT_ENDED` of the others."""
        return [received if ended else NOT_ENDED for received, ended in zip(self.received, self.ended)]

    def accept(self, name: str, frames: int, lengths: torch.Tensor | list[int] | None, final: bool) -> int:
        """
        Counts a piece in. A piece that is refused leaves everything as it was.

        Args:
            name: of the argument that brings the piece, for messages.
            frames: time steps of the piece.
            lengths (`(batch,)`, *optional*): valid frames; by default every clip that has not ended brings all of them.
            final: whether every clip ends with this piece.

        Returns:
            Frames of the piece that any clip uses.

        Raises:
            ValueError: lengths of the wrong number or range, frames for a clip that has ended, or anything after a final piece.
        """
        if self.closed:
            raise ValueError(
                f"`{name}` brings {frames} frames after the piece with `final=True`: that was the last one; start a new stream."
            )
        if lengths is None:
            if frames and self.all_ended:
                raise ValueError(f"`{name}` brings {frames} frames, but every clip of the stream has ended: start a new stream.")
            valid = self.whole(frames)
        else:
            valid = [int(length) for length in lengths]
        if len(valid) != self.batch or min(valid) < 0 or max(valid) > frames:
            raise ValueError(f"`lengths` must be {self.batch} numbers from 0 to {frames}, the frames of this piece, got {valid}.")
        self.add(frames, valid, final)
        self.closed = final
        return max(valid)

    def whole(self, frames: int) -> list[int]:
        """Valid frames of a piece of so many that comes without lengths."""
        return [0 if ended else frames for ended in self.ended]

    def add(self, frames: int, valid: list[int], final: bool) -> None:
        """
        Counts in a piece of `frames` time steps, of which each clip brings `valid`; `final` ends them all.

        Raises:
            ValueError: frames for a clip that has ended; nothing has changed then.
        """
        late = [row for row, length in enumerate(valid) if length and self.ended[row]]
        if late:
            raise ValueError(f"`lengths` must be 0 for clips that have ended, got {valid[late[0]]} frames for clip {late[0]}.")
        self.received = [before + length for before, length in zip(self.received, valid)]
        self.ended = [final or ended or length < frames for ended, length in zip(self.ended, valid)]
        self.position = max(self.received)

    def ready(self, start: int, stop: int, rate: int = 1, extra: int = 0) -> list[int]:
        """Of the output positions from `start` to `stop`, those inside each clip; F > 0 frames make F * rate + extra positions."""
        limits = [end * rate + extra if end else 0 for end in self.ends]
        return [max(0, min(limit, stop) - start) for limit in limits]
