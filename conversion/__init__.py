"""Checkpoints: converting the original ones, adding the vocoder, export to the Hub, making small untrained ones."""

from .build import BuildReport, build_checkpoint
from .convert import ConversionReport, convert_checkpoint, find_checkpoint
from .export import export_checkpoint
from .quantize import eight_bit_weights, four_bit_weights
from .tiny import make_tiny_checkpoint, tiny_config, tiny_model, tiny_processor, tiny_tokenizer, untrained_checkpoint
from .vocoder import convert_vocoder, fold_weight_norm, read_vocoder_file


__all__ = [
    "BuildReport",
    "build_checkpoint",
    "ConversionReport",
    "convert_checkpoint",
    "convert_vocoder",
    "eight_bit_weights",
    "export_checkpoint",
    "find_checkpoint",
    "fold_weight_norm",
    "four_bit_weights",
    "make_tiny_checkpoint",
    "read_vocoder_file",
    "tiny_config",
    "tiny_model",
    "tiny_processor",
    "tiny_tokenizer",
    "untrained_checkpoint",
]
