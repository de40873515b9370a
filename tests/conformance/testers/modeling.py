"""The base model and the model with its heads under transformers' model and training tests."""

import unittest

from conformance.bridge import declare_roles, with_declared_skips

from modeling_baichuan_audio import BaichuanAudioConfig, BaichuanAudioForCausalLM, BaichuanAudioModel

from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin
from ...test_training_mixin import TrainingTesterMixin
from .shared import PLAIN_TEXT, SpeechModelTester


declare_roles(
    {BaichuanAudioConfig.model_type: "BaichuanAudioModel"}, {BaichuanAudioConfig.model_type: "BaichuanAudioForCausalLM"}
)
# An audio token in a prompt stands for a frame of audio, and one without audio is refused: random prompts are text.
draw_ids = test_modeling_common.ids_tensor
test_modeling_common.ids_tensor = lambda shape, vocab_size, **kwargs: draw_ids(shape, min(vocab_size, PLAIN_TEXT), **kwargs)


@with_declared_skips
class SpeechModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioModel, BaichuanAudioForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # the test looks for a copyright year in the source
    _is_composite = True
    # A loss of the LLM reaches neither tokenizer nor flow matching nor vocoder: they train on losses of their own.
    test_all_params_have_gradient = False
    model_tester = None

    def setUp(self):
        self.model_tester = SpeechModelTester(self)
        self.config_tester = ConfigTester(self, config_class=BaichuanAudioConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "input_ids" in inputs and "input_features" not in inputs:  # a test that took the ids alone
            inputs["input_ids"] = inputs["input_ids"] % PLAIN_TEXT
        return inputs

    def _audio_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.audio_config = config.audio_tokenizer_config  # the name under which the test looks for its width
        return config, {name: inputs[name] for name in ("input_features", "input_features_mask")}
