"""Feature extractor and processor of Baichuan-Audio."""

from .feature_extraction_baichuan_audio import BaichuanAudioFeatureExtractor
from .processing_baichuan_audio import BaichuanAudioProcessor


__all__ = ["BaichuanAudioFeatureExtractor", "BaichuanAudioProcessor"]
