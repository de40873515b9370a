"""Every part that is a model of its own under transformers' model tests: tokenizer, audio head, flow matching, vocoder."""

import unittest

import torch
from conformance.bridge import declare_roles, with_declared_skips

from modeling_baichuan_audio import (
    BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioHead,
    BaichuanAudioTokenizerModel,
    BaichuanAudioVocoder,
)
from modeling_baichuan_audio.conversion import tiny_config

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin
from .shared import BATCH, ENCODER_FRAMES, MEL_FRAMES


PARTS = (BaichuanAudioTokenizerModel, BaichuanAudioHead, BaichuanAudioFlowMatchingDecoder, BaichuanAudioVocoder)
declare_roles({part.config_class.model_type: part.__name__ for part in PARTS}, {})


class PartTester:
    """Config and inputs of one part; a subclass says which, and makes the inputs."""

    is_training = False  # what trains a part are losses of its own, which tests/training covers
    batch_size, seq_length, num_hidden_layers, num_attention_heads = BATCH, 16, 2, 2
    part: str

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return getattr(tiny_config(), f"{self.part}_config")

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, self.make_inputs(config)


class PartTestMixin(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    make_tester: type
    common_properties: list

    def setUp(self):
        self.model_tester = self.make_tester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=self.all_model_classes[0].config_class,
            has_text_modality=False,
            common_properties=list(self.common_properties),
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class TokenizerTester(PartTester):
    part, hidden_size, seq_length = "audio_tokenizer", 32, ENCODER_FRAMES

    def make_inputs(self, config):
        mask = torch.ones(BATCH, MEL_FRAMES, dtype=torch.long)
        return {"input_features": torch.randn(BATCH, config.num_mel_bins, MEL_FRAMES), "input_features_mask": mask}


@with_declared_skips
class TokenizerTest(PartTestMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioTokenizerModel,)
    make_tester = TokenizerTester
    common_properties = ["hidden_size"]


class HeadTester(PartTester):
    part, hidden_size = "audio_head", 64

    def make_inputs(self, config):
        embeddings = torch.randn(BATCH, config.num_codebooks - 1, config.hidden_size)
        return {"hidden_states": torch.randn(BATCH, config.hidden_size), "code_embeddings": embeddings}


@with_declared_skips
class HeadTest(PartTestMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioHead,)
    has_attentions = False
    make_tester = HeadTester
    common_properties = ["hidden_size", "num_attention_heads", "num_hidden_layers"]


class FlowMatchingTester(PartTester):
    part, hidden_size = "flow_matching", 32
    image_size = patch_size = 1  # see `_prepare_for_class`

    def make_inputs(self, config):
        lengths = torch.full((BATCH,), self.seq_length)
        states = torch.randn(BATCH, self.seq_length, config.input_size)
        noise = torch.randn(BATCH, self.seq_length, config.num_mel_bins)
        return {"hidden_states": states, "lengths": lengths, "noise": noise, "num_steps": 2}


@with_declared_skips
class FlowMatchingTest(PartTestMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioFlowMatchingDecoder,)
    make_tester = FlowMatchingTester
    common_properties = []

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if inputs["noise"].dim() == 2:  # where a model takes `noise`, a test thinks of the patches of a masked autoencoder
            rows, frames = inputs["hidden_states"].shape[:2]
            inputs["noise"] = torch.zeros(rows, frames, tiny_config().flow_matching_config.num_mel_bins)
        return inputs


class VocoderTester(PartTester):
    part = "vocoder"

    def make_inputs(self, config):
        lengths = torch.full((BATCH,), self.seq_length)
        return {"mel": torch.randn(BATCH, self.seq_length, config.num_mel_bins), "lengths": lengths, "seed": 0}


@with_declared_skips
class VocoderTest(PartTestMixin, unittest.TestCase):
    all_model_classes = (BaichuanAudioVocoder,)
    make_tester = VocoderTester
    common_properties = []
    has_attentions = False
