"""Solving the flow: time schedules, a solution's settings, Euler steps with guidance."""

import math
from dataclasses import dataclass
from itertools import repeat

import torch


def flow_time(share: float, schedule: str) -> float:
    """
    Share of the Euler steps in [0, 1] -> flow time in [0, 1].

    Args:
        schedule: `"cosine"`, `"linear"`, or sway sampling (F5-TTS, arXiv 2410.06885): `"sway"`, or `"sway:S"` with a
            coefficient S in [-1, 2 / (pi - 2)] instead of -1. Below 0 the early steps are the small ones; -1 is the cosine, 0 linear.

    Raises:
        ValueError: another name, or a coefficient out of range.
    """
    name, _, coefficient = schedule.partition(":")
    if schedule == "cosine":
        return 1 - math.cos(share * math.pi / 2)
    if schedule == "linear":
        return share
    try:
        sway = float(coefficient or -1)
    except ValueError:
        sway = math.nan
    if name != "sway" or not -1 <= sway <= 2 / (math.pi - 2):  # beyond these, time would run backwards
        raise ValueError(
            f"`time_schedule` must be 'cosine', 'linear', 'sway' or 'sway:S' with S in [-1, {2 / (math.pi - 2):.2f}], "
            f"got {schedule!r}."
        )
    return share + sway * (math.cos(share * math.pi / 2) - 1 + share)


@dataclass
class SolverSettings:
    """
    Settings of one solution.

    Args:
        num_steps: Euler steps. guidance: rate of classifier-free guidance, 0 for none. time_schedule: see `flow_time`.
        chunk_sizes: frames of the attention chunks, the last one repeated.

    Raises:
        ValueError: a setting out of range.
    """

    num_steps: int
    guidance: float
    time_schedule: str
    chunk_sizes: list[int]

    def __post_init__(self):
        if not isinstance(self.num_steps, int) or self.num_steps < 1 or self.guidance < 0:
            raise ValueError(
                f"`num_steps` must be an integer of at least 1 and `guidance` not negative, got {self.num_steps} and {self.guidance}."
            )
        if not self.chunk_sizes or not all(isinstance(size, int) and size > 0 for size in self.chunk_sizes):
            raise ValueError(f"`chunk_sizes` must be one or more positive integers, got {self.chunk_sizes}.")
        self.time_grid()  # refuses an unknown schedule

    def time_grid(self) -> list[float]:
        """Flow times t_0 = 0 .. t_n = 1 of the Euler steps."""
        return [flow_time(step / self.num_steps, self.time_schedule) for step in range(self.num_steps + 1)]


def integrate(estimator, noise, condition, settings: SolverSettings, attention, shifts=None, caches=None) -> torch.Tensor:
    """
    Euler steps from noise to mel. Under guidance the estimator runs once at twice the batch: with the condition, and without.

    Args:
        noise, condition (`(batch, frames, num_mel_bins)`).
        attention: the estimator's `visibility`, of twice the batch under guidance.
        shifts (`(steps, stages, channels)`, *optional*): the estimator's `time_shifts` of the steps, where they are known already.
        caches (`list[EstimatorCache]`, *optional*): for each step the frames before; these are added.

    Returns:
        `(batch, frames, num_mel_bins)` float32.
    """
    guidance, grid = settings.guidance, settings.time_grid()
    if shifts is None:
        shifts = estimator.time_shifts(torch.tensor(grid[:-1], device=condition.device))
    if guidance:
        condition = torch.cat([condition, torch.zeros_like(condition)])
    mel = noise.float()
    for start, end, shift, cache in zip(grid, grid[1:], shifts, caches or repeat(None)):
        state = mel.repeat(2, 1, 1) if guidance else mel
        velocity = estimator(state, shift[None], condition, attention, cache).float()
        if guidance:
            with_condition, without = velocity.chunk(2)
            velocity = (1 + guidance) * with_condition - guidance * without
        mel = mel + (end - start) * velocity
    return mel
