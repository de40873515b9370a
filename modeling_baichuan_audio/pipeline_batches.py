"""The loop of a transformers pipeline over its inputs, with a way of its own to put them into batches."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator


def iterate_batches(
    pipe: Pipeline,
    collate: Callable[[list[Any]], dict],
    inputs: Any,
    num_workers: int,
    batch_size: int,
    preprocess_params: dict,
    forward_params: dict,
    postprocess_params: dict,
) -> PipelineIterator:
    """
    What `Pipeline.get_iterator` returns. That one pads every batch along time as if it were text.

    Args:
        collate: what `preprocess` gave for each input -> the inputs of `_forward`.
        others: as in `Pipeline.get_iterator`.
    """
    dataset_class = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
    dataset = dataset_class(inputs, pipe.preprocess, preprocess_params)
    loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=collate)
    outputs = PipelineIterator(loader, pipe.forward, forward_params, loader_batch_size=batch_size)
    return PipelineIterator(outputs, pipe.postprocess, postprocess_params)
