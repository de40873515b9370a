"""Makes transformers' Auto classes know this package. Runs once, when the package is imported."""

import json
import os

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForTextToSpectrogram,
    AutoModelForTextToWaveform,
    AutoProcessor,
    FeatureExtractionMixin,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Split, WeightConverter, WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file

from .configuration_baichuan_audio import (
    BaichuanAudioConfig,
    BaichuanAudioFlowMatchingConfig,
    BaichuanAudioHeadConfig,
    BaichuanAudioTokenizerConfig,
    BaichuanAudioVocoderConfig,
)
from .modeling_audio_head import BaichuanAudioHead
from .modeling_audio_tokenizer import BaichuanAudioTokenizerModel
from .modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioModel, TokenizerOfCheckpoint
from .modeling_flow_matching import BaichuanAudioFlowMatchingDecoder
from .modeling_vocoder import BaichuanAudioVocoder
from .modeling_waveform_decoder import BaichuanAudioWaveformDecoder
from .original_format import KEY_RENAMES, KEY_SPLITS, ORIGINAL_MODEL_TYPE, is_original_config
from .pipeline_flow_matching_vocoder import CUSTOM_PIPELINES as VOCODER_PIPELINES
from .pipeline_flow_matching_vocoder import TASK, FlowMatchingVocoderPipeline
from .pipeline_speech import CUSTOM_PIPELINES as SPEECH_PIPELINES
from .pipeline_speech import BaichuanAudioAnyToAnyPipeline, BaichuanAudioTextToAudioPipeline
from .processors import BaichuanAudioFeatureExtractor, BaichuanAudioProcessor


PARTS = {
    BaichuanAudioTokenizerConfig: BaichuanAudioTokenizerModel,
    BaichuanAudioHeadConfig: BaichuanAudioHead,
    BaichuanAudioFlowMatchingConfig: BaichuanAudioFlowMatchingDecoder,
    BaichuanAudioVocoderConfig: BaichuanAudioVocoder,
}


def weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """The tensor names of `original_format` as transformers' on-the-fly conversion."""
    conversions = [WeightRenaming(pattern, replacement) for pattern, replacement in KEY_RENAMES]
    for ending, pieces, dim in KEY_SPLITS:
        operation = Split(dim=dim) if "W_pack" in ending else Chunk(dim=dim)
        conversions.append(WeightConverter(ending, pieces, operations=[operation]))
    return conversions


def _read_original_feature_extractors() -> None:
    """Lets `AutoFeatureExtractor` read original folders, which have no preprocessor file.

    It asks `FeatureExtractionMixin` for that file before it looks at the config, and gives up without one. There is no hook, so the
    function that reads the file is wrapped: where it fails, the settings come from an original `config.json`, if there is one.
    """
    read = FeatureExtractionMixin.get_feature_extractor_dict.__func__
    if getattr(read, "reads_original_format", False):
        return

    def get_feature_extractor_dict(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return read(cls, pretrained_model_name_or_path, **kwargs)
        except OSError:
            hub = {
                key: kwargs[key] for key in ("cache_dir", "token", "revision", "local_files_only", "subfolder") if kwargs.get(key)
            }
            path = cached_file(pretrained_model_name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
            if path is None or not os.path.isfile(path):
                raise
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            if not is_original_config(config) or "audio_config" not in config:
                raise
            return BaichuanAudioFeatureExtractor.settings_from_original(config["audio_config"]), {}

    get_feature_extractor_dict.reads_original_format = True
    FeatureExtractionMixin.get_feature_extractor_dict = classmethod(get_feature_extractor_dict)


def _register_pipelines() -> None:
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=FlowMatchingVocoderPipeline, pt_model=AutoModelForTextToSpectrogram, type="audio"
        )
    # There is no hook for a model's own variety of a task. These classes leave every other model to the ones they stand for.
    for task, pipeline_class in {
        "any-to-any": BaichuanAudioAnyToAnyPipeline,
        "text-to-audio": BaichuanAudioTextToAudioPipeline,
    }.items():
        PIPELINE_REGISTRY.supported_tasks[task] = PIPELINE_REGISTRY.supported_tasks[task] | {"impl": pipeline_class}
    BaichuanAudioConfig._registered_tasks = (*VOCODER_PIPELINES, *SPEECH_PIPELINES)


def register() -> None:
    """Registers configs, models, processors, pipelines and the original checkpoints' tensor names. Safe to call again."""
    for config_class, model_class in PARTS.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    AutoConfig.register(BaichuanAudioConfig.model_type, BaichuanAudioConfig, exist_ok=True)
    # Original checkpoints: the same config class reads their flat form.
    CONFIG_MAPPING.register(ORIGINAL_MODEL_TYPE, BaichuanAudioConfig, exist_ok=True)
    AutoModel.register(BaichuanAudioConfig, BaichuanAudioModel, exist_ok=True)
    AutoModelForAudioTokenization.register(BaichuanAudioTokenizerConfig, BaichuanAudioTokenizerModel, exist_ok=True)
    AutoModelForAudioTokenization.register(BaichuanAudioConfig, TokenizerOfCheckpoint, exist_ok=True)
    AutoModelForTextToSpectrogram.register(BaichuanAudioConfig, BaichuanAudioWaveformDecoder, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForTextToWaveform):
        auto_class.register(BaichuanAudioConfig, BaichuanAudioForCausalLM, exist_ok=True)
    AutoFeatureExtractor.register(BaichuanAudioConfig, BaichuanAudioFeatureExtractor, exist_ok=True)
    AutoProcessor.register(BaichuanAudioConfig, BaichuanAudioProcessor, exist_ok=True)
    _read_original_feature_extractors()

    for config_class in (BaichuanAudioConfig, *PARTS):
        register_checkpoint_conversion_mapping(config_class.model_type, weight_conversions(), overwrite=True)
    _register_pipelines()
