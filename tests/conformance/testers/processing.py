"""The processor under transformers' processor tests."""

import unittest

import transformers.testing_utils
from conformance.bridge import with_declared_skips

from modeling_baichuan_audio import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor
from modeling_baichuan_audio.conversion.tiny import tiny_tokenizer


# Some tests ask for librosa, which transformers has no use for any more where soundfile and soxr are installed.
transformers.testing_utils.require_librosa = lambda test: test

from ...test_processing_common import ProcessorTesterMixin, floats_list  # noqa: E402


@with_declared_skips
class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = BaichuanAudioProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_feature_extractor(cls):
        return BaichuanAudioFeatureExtractor()

    def prepare_audio_inputs(self, batch_size=None):
        """Recordings longer than a code frame, which the mixin's 1000 samples are not."""
        recording = floats_list((1, 3000))
        return recording if batch_size is None else recording * batch_size
