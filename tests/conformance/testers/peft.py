"""Adapters on the whole model under PEFT's own tests."""

import copy
import shutil
import sys
import tempfile
import types
import unittest

import pytest
import torch
from conformance.bridge import with_declared_skips
from parameterized import parameterized
from peft import LoraConfig

from modeling_baichuan_audio import BaichuanAudioForCausalLM

from .shared import SpeechModelTester


try:
    import diffusers  # noqa: F401
except ImportError:  # named at the top of PEFT's module, for tests of image models alone
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"].__spec__ = None

from peft_tests.testing_common import PeftCommonTester  # noqa: E402


LLM = r"model\.language_model\..*"
ADAPTERS = {
    "qv": {"target_modules": LLM + r"\.[qv]_proj"},
    "llm": {"target_modules": LLM + "_proj"},
    "everywhere": {"target_modules": "all-linear"},
    "dora": {"target_modules": LLM + "_proj", "use_dora": True},
    "rslora": {"target_modules": LLM + "_proj", "use_rslora": True},
    "tokens": {"target_modules": LLM + r"\.[qv]_proj", "trainable_token_indices": [0, 1, 3]},
}
# Those of PEFT's checks that mean something for a generating model and LoRA; the rest are for encoders or other adapters.
CHECKS = """model_attr adapter_name prepare_for_training load_model_low_cpu_mem_usage save_pretrained
save_pretrained_selected_adapters from_pretrained_config_construction load_multiple_adapters merge_layers merge_layers_multi
merge_layers_nan merge_layers_is_idempotent safe_merge generate generate_half_prec training training_gradient_checkpointing
inference_safetensors peft_model_device_map delete_adapter delete_inactive_adapter unload_adapter disable_adapter
weighted_combination_of_adapters get_base_model_state_dict adding_multiple_adapters_with_bias_raises""".split()
# Checks that compare outputs with and without the adapter need one that does something.
NEEDS_RANDOM_ADAPTER = {name for name in CHECKS if "merge" in name or "delete" in name or name.endswith("able_adapter")}
NEEDS_RANDOM_ADAPTER |= {"unload_adapter"}


@with_declared_skips
class PeftTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        torch.manual_seed(0)
        config = SpeechModelTester(cls).get_config()
        # The usual range, not that of our own tests: PEFT compares at 1e-6, which wants logits below one.
        config.initializer_range = config.text_config.initializer_range = 0.02
        BaichuanAudioForCausalLM(config).eval().save_pretrained(cls.folder)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder, ignore_errors=True)

    @parameterized.expand(
        [(check, adapter) for check in CHECKS for adapter in ADAPTERS],
        name_func=lambda function, number, parameters: f"test_{'__'.join(parameters.args)}",
    )
    def test_peft(self, check, adapter):
        torch.manual_seed(0)
        _, inputs = SpeechModelTester(self).prepare_config_and_inputs_for_common()

        class Tester(PeftCommonTester):
            transformers_class = BaichuanAudioForCausalLM
            torch_device = "cpu"

            def prepare_inputs_for_testing(self):
                return copy.deepcopy(inputs)

        settings = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "task_type": None}
        settings |= copy.deepcopy(ADAPTERS[adapter])
        if check in NEEDS_RANDOM_ADAPTER:
            settings["init_lora_weights"] = False
        try:
            getattr(Tester(), f"_test_{check}")(self.folder, LoraConfig, settings)
        except pytest.skip.Exception as skipped:
            self.skipTest(f"PEFT: {skipped}")
