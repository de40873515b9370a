"""The whole model under transformers' tensor-parallel and FSDP tests: gloo processes on the CPU."""

import unittest

from conformance.bridge import with_declared_skips

from modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioModel

from ... import test_fsdp_mixin, test_tensor_parallel_mixin
from .shared import PLAIN_TEXT, SpeechModelTester


# Lists of the library's own models for which it runs these tests; None stands for all.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class TextOnlyForCausalLM(BaichuanAudioForCausalLM):
    """Reads every id as plain text: the tests draw ids from the whole vocabulary, and an audio token needs audio."""

    _auto_class = None  # nothing of this file belongs into a checkpoint

    def forward(self, input_ids=None, **kwargs):
        return super().forward(None if input_ids is None else input_ids % PLAIN_TEXT, **kwargs)


@with_declared_skips
class DistributedTest(test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioModel, BaichuanAudioForCausalLM)
    model_tester = None

    def setUp(self):
        self.model_tester = SpeechModelTester(self)

    def _get_tp_model_class(self):
        return TextOnlyForCausalLM

    def _skip_if_insufficient_devices(self, world_size):
        """The processes are few and small: they may share cores."""
