"""Baichuan-Audio for transformers: importing this package registers it with the Auto classes."""

import os


# In a source checkout these parts lie beside this folder; installed, setup.py puts them inside it.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "processors")):
    __path__ = [*__path__, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from . import _registration
from .configuration_baichuan_audio import (
    BaichuanAudioConfig,
    BaichuanAudioFlowMatchingConfig,
    BaichuanAudioHeadConfig,
    BaichuanAudioTokenizerConfig,
    BaichuanAudioVocoderConfig,
)
from .generation_baichuan_audio import BaichuanAudioGenerateOutput
from .modeling_audio_head import BaichuanAudioHead
from .modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from .modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioModel
from .modeling_flow_matching import BaichuanAudioFlowMatchingDecoder
from .modeling_vocoder import BaichuanAudioVocoder
from .modeling_waveform_decoder import BaichuanAudioWaveformDecoder
from .pipeline_flow_matching_vocoder import FlowMatchingVocoderPipeline
from .pipeline_speech import BaichuanAudioAnyToAnyPipeline, BaichuanAudioTextToAudioPipeline
from .processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from .streaming_baichuan_audio import AudioStreamer, StreamEvent
from .transcript_length import TranscriptLengthCriteria


__version__ = "0.1.0"

_registration.register()

__all__ = [
    "AudioStreamer",
    "BaichuanAudioAnyToAnyPipeline",
    "BaichuanAudioConfig",
    "BaichuanAudioFeatureExtractor",
    "BaichuanAudioFlowMatchingConfig",
    "BaichuanAudioFlowMatchingDecoder",
    "BaichuanAudioForCausalLM",
    "BaichuanAudioGenerateOutput",
    "BaichuanAudioHead",
    "BaichuanAudioHeadConfig",
    "BaichuanAudioModel",
    "BaichuanAudioProcessor",
    "BaichuanAudioTextToAudioPipeline",
    "BaichuanAudioTokenizerConfig",
    "BaichuanAudioTokenizerModel",
    "BaichuanAudioVocoder",
    "BaichuanAudioVocoderConfig",
    "BaichuanAudioWaveformDecoder",
    "FlowMatchingVocoderPipeline",
    "StreamEvent",
    "TranscriptLengthCriteria",
]
