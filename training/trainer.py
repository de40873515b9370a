"""transformers' Trainer, with losses that are means over real targets however batches are split, and what it writes on the way."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from .rows import Row
from .tasks import Task


class BaichuanAudioTrainer(Trainer):
    """
    Trains one part of the model on one task.

    A step's loss is a mean over all real targets of its accumulation window, on all ranks: targets are counted before the window
    runs, and every micro-batch divides its sums by those counts.

    Args:
        task: makes the model's inputs from a batch, counts its targets, and names the losses to log.
        the others: as for [`~transformers.Trainer`].
    """

    # The counts make the sum of the micro-batches' losses the mean already.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, task: Task, **kwargs):
        super().__init__(*args, **kwargs)
        self.task = task
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, float] = defaultdict(float)
        self._windows = self._batches = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = []
        for _, batch in zip(range(num_batches), epoch_iterator):
            batches.append(batch)
        if not batches:
            return batches, None
        self._windows += 1
        counts = torch.stack([self.task.count_targets(batch) for batch in batches]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = num_items_in_batch if torch.is_tensor(num_items_in_batch) and num_items_in_batch.dim() == 1 else None
        self.task.step = self.state.global_step
        outputs = model(**self.task.model_inputs(inputs, counts))
        loss = self.task.loss(outputs)
        if model.training:
            self._batches += 1
            for name, value in self.task.metrics(outputs).items():
                self._sums[name] += float(value)
            for name, value in self.task.averages(outputs).items():
                self._means[name] += float(value)
        if counts is not None:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients, the counts are of all ranks
        return (loss, outputs) if return_outputs else loss

    def _drain(self, values: dict[str, float], count: int) -> dict[str, float]:
        """The collected values of all ranks over `count`; empties them."""
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], device=self.args.device)
        if self.args.world_size > 1 and names:
            sums = self.accelerator.gather(sums[None]).sum(0)
        values.clear()
        return {name: round(value / count, 6) for name, value in zip(names, sums.tolist())}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._windows:
            # Losses are shares of the window's mean, to be added up; averages are of each micro-batch on its own.
            logs = logs | self._drain(self._sums, self._windows) | self._drain(self._means, self._batches * self.args.world_size)
            self._windows = self._batches = 0
        super().log(logs, *args, **kwargs)


class JsonLinesCallback(TrainerCallback):
    """Appends every log entry to a file, one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class SampleCallback(TrainerCallback):
    """Writes audio of the model in training every so many steps."""

    def __init__(self, task: Task, rows: list[Row], folder: Path, every: int):
        self.task, self.rows, self.folder, self.every = task, rows, folder, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self.task.write_samples(self.folder / f"step-{state.global_step:07d}", self.rows)
