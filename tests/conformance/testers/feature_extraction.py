"""The feature extractor under transformers' feature-extraction tests."""

import unittest

import numpy as np
from conformance.bridge import with_declared_skips

from modeling_baichuan_audio import BaichuanAudioFeatureExtractor

from ...test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin


class FeatureExtractorTester:
    """Feature sequences (time, feature_size) of rising length, which is what `pad` takes."""

    batch_size, min_seq_length, max_seq_length, feature_size = 7, 400, 2000, 24
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)

    def prepare_feat_extract_dict(self):
        return {"feature_size": self.feature_size, "padding_value": 0.0, "sampling_rate": 16000, "padding_side": "right"}

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        draw = np.random.default_rng(0)
        lengths = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        lengths = [self.max_seq_length] * self.batch_size if equal_length else lengths
        sequences = [draw.random((length, self.feature_size), dtype=np.float32) for length in lengths]
        return sequences if numpify else [sequence.tolist() for sequence in sequences]


@with_declared_skips
class FeatureExtractorTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = BaichuanAudioFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractorTester()
