"""One training run, from a recipe to a saved model."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoProcessor, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..conversion import find_checkpoint
from .datasets import LengthGroupedSampler, RowReader, SpeechDataset, SpeechStream
from .recipe import LLM_STAGES, Recipe
from .row_sources import load_rows
from .stages import apply_stage, lora_config
from .tasks import LanguageTask, Task, make_task
from .trainer import BaichuanAudioTrainer, JsonLinesCallback, SampleCallback


logger = logging.get_logger(__name__)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `training` section over defaults that suit every stage.

    Raises:
        ValueError: an entry that `TrainingArguments` does not have, or refuses.
    """
    defaults: dict[str, Any] = {
        "report_to": ["tensorboard"],
        "logging_steps": 10,
        "save_total_limit": 3,
        "remove_unused_columns": False,  # rows are objects, not columns
        "prediction_loss_only": True,
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": not torch.accelerator.is_available(),  # unless told so, it refuses `bf16` there
    }
    values = defaults | recipe.training
    if "activation_checkpointing" not in {item.name for item in fields(TrainingArguments)}:  # the older name of the same
        values = {name.replace("activation_checkpointing", "gradient_checkpointing"): value for name, value in values.items()}
    try:
        return TrainingArguments(output_dir=recipe.output, seed=recipe.seed, data_seed=recipe.seed, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The recipe's `training` section is refused: {error}") from error


def make_dataset(recipe: Recipe, task: Task, source, arguments: TrainingArguments):
    """Rows of a data source, as the recipe asks: with random access, or streamed."""
    reader = RowReader(task.reader(), task.builder, recipe.data.max_tokens, recipe.data.on_error)
    rows = load_rows(source, streaming=recipe.data.streaming)
    if not recipe.data.streaming:
        return SpeechDataset(rows, reader)
    return SpeechStream(
        rows,
        reader,
        batch_size=arguments.per_device_train_batch_size,
        buffer_batches=50 if recipe.data.group_by_length else 0,
        seed=recipe.seed,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )


class _RunTrainer(BaichuanAudioTrainer):
    """The trainer with the recipe's order of rows."""

    def __init__(self, *args, group_by_length: bool, **kwargs):
        self.group_by_length = group_by_length
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length or not isinstance(self.train_dataset, SpeechDataset):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(self.train_dataset.lengths, batch, seed=self.args.seed)

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, SpeechStream):  # it gives each rank its own share already
            return DataLoader(
                self.train_dataset,
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )
        return super().get_train_dataloader()


def train(recipe: Recipe, resume: bool = True) -> dict[str, Any]:
    """
    Runs a recipe; called again after an interruption, it goes on from the last checkpoint in `output`.

    Returns:
        The trainer's metrics, the number of trained parameters, the rows skipped by reason, the folder of the result.

    Raises:
        ValueError: settings, data or a checkpoint that do not fit.
    """
    # 1. Settings and random state.
    arguments = training_arguments(recipe)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # how accelerate launch says it, and Trainer too
    if sharded and recipe.stage not in LLM_STAGES:
        raise ValueError(
            f"Stage {recipe.stage} trains under data parallelism only: its part fits on one device. Use the DDP config."
        )
    set_seed(recipe.seed)
    output = Path(recipe.output)

    # 2. The model.
    folder = find_checkpoint(recipe.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation)
    processor = AutoProcessor.from_pretrained(folder)

    # 3. What trains, by name.
    module = None
    if recipe.stage == "lora":
        settings = recipe.lora
        module = get_peft_model(
            model,
            lora_config(model, settings.target, settings.rank, settings.alpha, settings.dropout, settings.modules_to_save),
        )
    else:
        apply_stage(model, recipe.stage, recipe.freeze)
    task = make_task(model, processor, recipe, module, sharded)
    trained = sum(p.numel() for p in task.module.parameters() if p.requires_grad)

    # 4. Data.
    train_rows = make_dataset(recipe, task, recipe.data.train, arguments)
    eval_rows = None if recipe.data.eval is None else make_dataset(recipe, task, recipe.data.eval, arguments)

    # 5. The trainer, and what it writes.
    callbacks = [JsonLinesCallback(output / "metrics.jsonl")]
    if recipe.samples.every and sharded:
        logger.warning("No samples are written under FSDP: one rank cannot run the sharded model alone.")
    elif recipe.samples.every:
        rows = [] if recipe.data.streaming else [train_rows[i] for i in range(min(recipe.samples.clips, len(train_rows)))]
        callbacks.append(SampleCallback(task, rows, output / "samples", recipe.samples.every))
    task.to(arguments.device)
    trainer = _RunTrainer(
        model=task.module,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=task.collate,
        callbacks=callbacks,
        task=task,
        group_by_length=recipe.data.group_by_length,
    )

    # 6. Training, from the last checkpoint if there is one.
    checkpoint = get_last_checkpoint(output) if resume and output.is_dir() else None
    result = trainer.train(resume_from_checkpoint=checkpoint)

    # 7. The result: the whole checkpoint, or the adapter. Sharded parameters are gathered, so every rank takes part.
    final = output / "final"
    report = train_rows.reader.report
    summary = {
        **result.metrics,
        "trained_parameters": trained,
        "rows_skipped": report.skipped,
        "final": str(final),
    }
    if isinstance(task, LanguageTask):
        trainer.save_model(final)
    elif trainer.is_world_process_zero():
        model.save_pretrained(final)
    if trainer.is_world_process_zero():
        processor.save_pretrained(final)
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
