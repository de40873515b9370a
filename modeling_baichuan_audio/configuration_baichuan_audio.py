"""Configurations of Baichuan-Audio (arXiv 2502.17239). Every default is the released 7B model's value."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .original_format import is_original_config, translate_config


_CODEBOOK_SIZES = (8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"`{name}` must be positive, got {getattr(config, name)}.")


def _require_divisible(config: PreTrainedConfig, whole: str, part: str) -> None:
    size, count = getattr(config, whole), getattr(config, part)
    _require(count > 0 and size % count == 0, f"`{whole}` ({size}) must be a multiple of `{part}` ({count}).")


def _require_codebooks(sizes: list[int]) -> None:
    _require(
        len(sizes) > 0 and min(sizes) > 1, f"`codebook_sizes` needs at least one codebook of 2 or more entries, got {sizes}."
    )


class _ReadsOriginalFormat:
    """Lets a config class read the flat `config.json` of the released checkpoints wherever it reads its own."""

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # transformers takes every class with "Tokenizer" in its name for a text tokenizer, and names it as (slow, fast).
        if output.get("auto_map"):
            references = output["auto_map"].items()
            output["auto_map"] = {name: one if isinstance(one, str) else one[0] for name, one in references}
        return output

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_original_config(config_dict):
            config_dict = translate_config(config_dict) | {"model_type": BaichuanAudioConfig.model_type}
        if cls.base_config_key and config_dict.get(cls.base_config_key, {}) is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no `{cls.base_config_key}`. The released checkpoints carry no vocoder: "
                "add one with `baichuan-audio convert CHECKPOINT OUTPUT --hift hift.pt`."
            )
        return config_dict, kwargs


@strict
class BaichuanAudioTokenizerConfig(_ReadsOriginalFormat, PreTrainedConfig):
    r"""
    Speech tokenizer: Whisper-style encoder, bridge with residual vector quantiser, mel decoder (paper, section 3.1).

    Args:
        sampling_rate (`int`, defaults to 16000): of the input waveform, in Hz.
        num_mel_bins (`int`, defaults to 128): mel bins of the input features.
        n_fft (`int`, defaults to 400): window of the input features, in samples.
        hop_length (`int`, defaults to 160): hop of the input features, in samples.
        max_audio_seconds (`int`, defaults to 30): longest chunk that is encoded at once.
        hidden_size (`int`, defaults to 1280): width of encoder and mel decoder.
        kernel_size (`int`, defaults to 3): of the encoder's two convolutions.
        stride_size (`int`, defaults to 2): of the encoder's second convolution.
        downsample_factor (`int`, defaults to 4): encoder frames per code frame.
        codebook_sizes (`list[int]`): entries of each codebook, coarse to fine.
        decoder_stride_size (`int`, defaults to 2): mel frames (100 Hz) per decoder frame.
        num_output_mel_bins (`int`, defaults to 80): mel bins of the decoded mel.
        refine_sampling_rate, refine_hop_length, refine_n_fft (`int`): mel analysis that the refined mel follows (62.5 Hz).
        refine_channels, refine_layers (`int`): width and depth of the refine net.

    Training (the methods are the paper's, the values ours):

    Args:
        codebook_decay (`float`, defaults to 0.99): alpha of the running averages that the entries follow, per forward pass.
        codebook_shrinkage (`float`, defaults to 1e-4): beta of the L2 constraint; well below `1 - codebook_decay`, or it pulls entries
            to zero faster than the data pulls them back.
        codebook_restart_threshold (`float`, defaults to 0.05): an entry that fewer frames than this choose per forward pass, in the
            running average, restarts from a frame of the batch; 0 never restarts.
        gumbel_temperature (`float`, defaults to 0.01): of sampling the assignment; relative to the squared distance of the nearest
            entry, so that it fits every codebook; 0 takes the nearest.
        codebook_dropout (`float`, defaults to 0.5): share of the clips that use a random number of codebooks, the first one always.
        reconstruction_weight, text_loss_weight, commitment_weight (`float`, defaults to 1.0, 1.0, 0.25): lambda 1, 2 and 3.
    """

    model_type = "baichuan_audio_tokenizer"
    base_config_key = "audio_tokenizer_config"
    base_model_fsdp_plan = {"encoder.layers.*": "free_full_weight", "mel_decoder.layers.*": "free_full_weight"}

    sampling_rate: int = 16000
    num_mel_bins: int = 128
    n_fft: int = 400
    hop_length: int = 160
    max_audio_seconds: int = 30
    hidden_size: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    kernel_size: int = 3
    stride_size: int = 2
    downsample_factor: int = 4
    codebook_sizes: list[int] | tuple[int, ...] = _CODEBOOK_SIZES
    decoder_layers: int = 8
    decoder_attention_heads: int = 20
    decoder_ffn_dim: int = 5120
    decoder_kernel_size: int = 3
    decoder_stride_size: int = 2
    activation_function: str = "gelu"
    num_output_mel_bins: int = 80
    refine_sampling_rate: int = 16000
    refine_hop_length: int = 256
    refine_n_fft: int = 1024
    refine_channels: int = 256
    refine_layers: int = 4
    codebook_decay: float = 0.99
    codebook_shrinkage: float = 1e-4
    codebook_restart_threshold: float = 0.05
    gumbel_temperature: float = 0.01
    codebook_dropout: float = 0.5
    reconstruction_weight: float = 1.0
    text_loss_weight: float = 1.0
    commitment_weight: float = 0.25
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes)
        super().__post_init__(**kwargs)
        _require_codebooks(self.codebook_sizes)
        _require_positive(self, "sampling_rate", "num_mel_bins", "n_fft", "hop_length", "max_audio_seconds", "stride_size")
        _require_positive(
            self, "downsample_factor", "decoder_stride_size", "refine_channels", "refine_layers", "refine_hop_length"
        )
        _require_divisible(self, "hidden_size", "encoder_attention_heads")
        _require_divisible(self, "hidden_size", "decoder_attention_heads")
        _require(self.hidden_size % 2 == 0, f"`hidden_size` must be even for sinusoidal positions, got {self.hidden_size}.")
        _require(
            self.kernel_size % 2 == 1 and self.kernel_size >= self.stride_size,
            f"`kernel_size` must be odd and at least `stride_size` ({self.stride_size}), got {self.kernel_size}.",
        )
        _require(
            self.decoder_kernel_size >= self.decoder_stride_size,
            f"`decoder_kernel_size` ({self.decoder_kernel_size}) must be at least `decoder_stride_size` ({self.decoder_stride_size}).",
        )
        for name in ("codebook_decay", "codebook_shrinkage"):
            _require(0 <= getattr(self, name) < 1, f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        _require(0 <= self.codebook_dropout <= 1, f"`codebook_dropout` must be in [0, 1], got {self.codebook_dropout}.")
        for name in (
            "codebook_restart_threshold",
            "gumbel_temperature",
            "reconstruction_weight",
            "text_loss_weight",
            "commitment_weight",
        ):
            _require(getattr(self, name) >= 0, f"`{name}` must not be negative, got {getattr(self, name)}.")

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def quantizer_size(self) -> int:
        """Width of a codebook vector: the bridge stacks `downsample_factor` encoder frames."""
        return self.downsample_factor * self.hidden_size

    @property
    def max_mel_frames(self) -> int:
        """Most input mel frames of one chunk."""
        return self.max_audio_seconds * self.sampling_rate // self.hop_length

    @property
    def max_decoder_frames(self) -> int:
        """Longest clip the mel decoder has positions for, in its own frames (50 Hz)."""
        return self.max_mel_frames

    @property
    def frame_rate(self) -> float:
        """Code frames per second (12.5 Hz for the released model)."""
        return self.sampling_rate / (self.hop_length * self.stride_size * self.downsample_factor)


@strict
class BaichuanAudioHeadConfig(_ReadsOriginalFormat, PreTrainedConfig):
    r"""
    Audio head: a depth transformer over the codebooks of one frame (paper, section 3.2).

    Args:
        hidden_size (`int`, defaults to 3584): the LLM's width.
        num_hidden_layers (`int`, defaults to 3): depth-transformer layers.
        num_attention_heads (`int`, *optional*): defaults to `hidden_size // 128`.
        intermediate_size (`int`, *optional*): width of each position's feed-forward part; defaults to `2 * hidden_size`.
        codebook_sizes (`list[int]`): entries of each codebook; every head has one class more, the end of audio.
        rms_norm_eps (`float`, defaults to 1e-6): epsilon of the norms.
    """

    model_type = "baichuan_audio_head"
    base_config_key = "audio_head_config"
    base_model_fsdp_plan = {"layers.*": "free_full_weight", "norm": "keep_full_weight"}

    hidden_size: int = 3584
    num_hidden_layers: int = 3
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    codebook_sizes: list[int] | tuple[int, ...] = _CODEBOOK_SIZES
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.codebook_sizes = list(self.codebook_sizes)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 128)
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        super().__post_init__(**kwargs)
        _require_codebooks(self.codebook_sizes)
        _require_positive(self, "num_hidden_layers", "intermediate_size")
        _require_divisible(self, "hidden_size", "num_attention_heads")

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)


@strict
class BaichuanAudioFlowMatchingConfig(_ReadsOriginalFormat, PreTrainedConfig):
    r"""
    Flow-matching decoder: pre-net and causal U-Net estimator (paper, section 3.1; OT-CFM, arXiv 2302.00482).

    Args:
        input_size (`int`, defaults to 1280): width of the mel decoder's hidden states.
        num_mel_bins (`int`, defaults to 80): mel bins of the result.
        sampling_rate (`int`, defaults to 24000), hop_length (`int`, defaults to 480): mel analysis of the result (50 Hz).
        prenet_* : the transformer that turns hidden states into the mel condition mu.
        estimator_channels (`int`, defaults to 256): width of the U-Net.
        estimator_blocks (`int`, defaults to 4): transformer blocks per stage.
        estimator_mid_stages (`int`, defaults to 12): stages between the down and the up stage.
        attention_chunk_size (`int`, defaults to 100): a frame sees every frame up to the end of its own chunk of this many.
        num_steps (`int`, defaults to 10): Euler steps.
        time_schedule (`"cosine"` or `"linear"`): spacing of the steps.
        guidance (`float`, defaults to 0.7): classifier-free guidance rate; 0 switches it off.
        sigma_min (`float`, defaults to 1e-6): training, width of the flow's end point.
        condition_dropout (`float`, defaults to 0.2): training, share of clips that are trained without their mu.
        prior_loss_weight (`float`, defaults to 1.0): training, weight of mu's L1 distance from the mel.
    """

    model_type = "baichuan_audio_flow_matching"
    base_config_key = "flow_matching_config"
    base_model_fsdp_plan = {"prenet.layers.*": "free_full_weight", "estimator.mid_stages.*": "free_full_weight"}

    input_size: int = 1280
    num_mel_bins: int = 80
    sampling_rate: int = 24000
    hop_length: int = 480
    prenet_hidden_size: int = 512
    prenet_layers: int = 12
    prenet_attention_heads: int = 8
    prenet_ffn_dim: int = 2048
    prenet_hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    estimator_channels: int = 256
    estimator_blocks: int = 4
    estimator_mid_stages: int = 12
    estimator_attention_heads: int = 8
    estimator_head_dim: int = 64
    attention_chunk_size: int = 100
    num_steps: int = 10
    time_schedule: Literal["cosine", "linear"] = "cosine"
    guidance: float = 0.7
    sigma_min: float = 1e-6
    condition_dropout: float = 0.2
    prior_loss_weight: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _require_positive(self, "input_size", "num_mel_bins", "sampling_rate", "hop_length", "num_steps", "attention_chunk_size")
        _require_positive(self, "estimator_channels", "estimator_blocks", "estimator_attention_heads", "estimator_head_dim")
        _require_divisible(self, "prenet_hidden_size", "prenet_attention_heads")
        _require(self.guidance >= 0, f"`guidance` must not be negative, got {self.guidance}.")
        _require(0 <= self.condition_dropout < 1, f"`condition_dropout` must be in [0, 1), got {self.condition_dropout}.")
        _require(0 <= self.sigma_min < 1, f"`sigma_min` must be in [0, 1), got {self.sigma_min}.")
        _require(self.prior_loss_weight >= 0, f"`prior_loss_weight` must not be negative, got {self.prior_loss_weight}.")


@strict
class BaichuanAudioVocoderConfig(_ReadsOriginalFormat, PreTrainedConfig):
    r"""
    HiFT vocoder: neural source filter with an inverse STFT output (arXiv 2309.09493), as CosyVoice 2 ships it.

    Args:
        num_mel_bins (`int`, defaults to 80), sampling_rate (`int`, defaults to 24000): of the log-mel and the waveform.
        base_channels (`int`, defaults to 512): width before the first up-sampling, halved by each.
        upsample_rates, upsample_kernel_sizes (`list[int]`): of the transposed convolutions.
        resblock_kernel_sizes (`list[int]`), resblock_dilations (`list[int]`): of the residual blocks after each up-sampling.
        source_resblock_kernel_sizes (`list[int]`): of the residual block on the source signal at each stage.
        istft_n_fft (`int`, defaults to 16), istft_hop_length (`int`, defaults to 4): of the output's inverse STFT.
        num_harmonics (`int`, defaults to 8): overtones above the fundamental.
        sine_amplitude, noise_std, voiced_threshold: of the source signal (the threshold in Hz).
        f0_channels (`int`, defaults to 512), f0_layers (`int`, defaults to 5): F0 predictor.
        leaky_relu_slope (`float`, defaults to 0.1): between stages. max_magnitude (`float`, defaults to 100): clip of the STFT
            magnitude. audio_limit (`float`, defaults to 0.99): clip of the waveform.
        mel_loss_weight (`float`, defaults to 45), feature_matching_loss_weight (`float`, defaults to 2), adversarial_loss_weight
            (`float`, defaults to 1): training, as HiFi-GAN weighs them (arXiv 2010.05646, section 2.4).
        stft_loss_weight, f0_loss_weight (`float`, default to 1): training, of the multi-resolution STFT loss and, where F0 targets
            are given, of the distance in Hz.
        multi_scale_mel_loss_weight (`float`, defaults to 0): training, of log-mels at six window lengths (arXiv 2306.06546).
    """

    model_type = "baichuan_audio_vocoder"
    base_config_key = "vocoder_config"
    base_model_fsdp_plan = {}  # small: it is sharded as a whole

    num_mel_bins: int = 80
    sampling_rate: int = 24000
    base_channels: int = 512
    upsample_rates: list[int] | tuple[int, ...] = (8, 5, 3)
    upsample_kernel_sizes: list[int] | tuple[int, ...] = (16, 11, 7)
    resblock_kernel_sizes: list[int] | tuple[int, ...] = (3, 7, 11)
    resblock_dilations: list[int] | tuple[int, ...] = (1, 3, 5)
    source_resblock_kernel_sizes: list[int] | tuple[int, ...] = (7, 7, 11)
    istft_n_fft: int = 16
    istft_hop_length: int = 4
    num_harmonics: int = 8
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold: float = 10.0
    f0_channels: int = 512
    f0_layers: int = 5
    leaky_relu_slope: float = 0.1
    max_magnitude: float = 100.0
    audio_limit: float = 0.99
    mel_loss_weight: float = 45.0
    stft_loss_weight: float = 1.0
    multi_scale_mel_loss_weight: float = 0.0
    f0_loss_weight: float = 1.0
    adversarial_loss_weight: float = 1.0
    feature_matching_loss_weight: float = 2.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in (
            "upsample_rates",
            "upsample_kernel_sizes",
            "resblock_kernel_sizes",
            "resblock_dilations",
            "source_resblock_kernel_sizes",
        ):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        stages = len(self.upsample_rates)
        _require(stages > 0, "`upsample_rates` needs at least one stage.")
        for name in ("upsample_kernel_sizes", "source_resblock_kernel_sizes"):
            _require(len(getattr(self, name)) == stages, f"`{name}` must have {stages} entries, as `upsample_rates` has.")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes):
            _require(
                kernel >= rate and (kernel - rate) % 2 == 0,
                f"`upsample_kernel_sizes` must exceed `upsample_rates` by an even number, got {kernel} for rate {rate}.",
            )
        _require(
            all(kernel % 2 == 1 for kernel in [*self.resblock_kernel_sizes, *self.source_resblock_kernel_sizes]),
            "residual block kernel sizes must be odd.",
        )
        _require(
            self.base_channels % 2**stages == 0,
            f"`base_channels` ({self.base_channels}) must be divisible by 2**{stages}: every stage halves it.",
        )
        _require_divisible(self, "istft_n_fft", "istft_hop_length")
        for name in ("mel", "stft", "multi_scale_mel", "f0", "adversarial", "feature_matching"):
            weight = getattr(self, f"{name}_loss_weight")
            _require(weight >= 0, f"`{name}_loss_weight` must not be negative, got {weight}.")

    @property
    def hop_length(self) -> int:
        """Waveform samples per mel frame (480 at the defaults)."""
        samples = self.istft_hop_length
        for rate in self.upsample_rates:
            samples *= rate
        return samples


@strict
class BaichuanAudioConfig(_ReadsOriginalFormat, PreTrainedConfig):
    r"""
    The whole model. `from_pretrained` reads a converted checkpoint and, just as well, an original one (model type "omni", flat config).

    Args:
        text_config: the LLM backbone; any config that `AutoModel` builds a decoder from (Qwen2.5-7B geometry by default).
        audio_tokenizer_config, audio_head_config, flow_matching_config: see those classes.
        vocoder_config (*optional*): `None` for a checkpoint without a vocoder, as the original ones are.
        *_token_id: ids of the special tokens. They differ between checkpoints: never assume them.
        sampling_rate (`int`, defaults to 24000): of the generated waveform, in Hz.
        audio_loss_weight (`float`, defaults to 1.0): of the audio loss beside the text loss, in training.
        codebook_loss_weights (`list[float]`, *optional*): relative weights of the codebooks in the audio loss; equal by default.

    Raises:
        ValueError: settings that contradict one another, in a sentence that names them.

    Example:

    ```python
    >>> from modeling_baichuan_audio import BaichuanAudioConfig
    >>> BaichuanAudioConfig().audio_tokenizer_config.frame_rate
    12.5

    ```
    """

    model_type = "baichuan_audio"
    base_model_fsdp_plan = {}  # the parts have plans of their own
    # Tasks that this process has pipelines for. Where a config names its own, transformers asks for `trust_remote_code` all the same.
    _registered_tasks = ()
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2",
            init_kwargs={
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 8192,
                "rope_theta": 1000000.0,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
        ),
        "audio_tokenizer_config": SubConfigSpec(config_class=BaichuanAudioTokenizerConfig),
        "audio_head_config": SubConfigSpec(config_class=BaichuanAudioHeadConfig),
        "flow_matching_config": SubConfigSpec(config_class=BaichuanAudioFlowMatchingConfig),
        "vocoder_config": SubConfigSpec(config_class=BaichuanAudioVocoderConfig, optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    audio_tokenizer_config: dict | PreTrainedConfig | None = None
    audio_head_config: dict | PreTrainedConfig | None = None
    flow_matching_config: dict | PreTrainedConfig | None = None
    vocoder_config: dict | PreTrainedConfig | None = None
    audio_start_token_id: int = 151657
    audio_end_token_id: int = 151658
    audio_pad_token_id: int = 151659
    audio_delim_token_id: int = 151674
    audiotext_start_token_id: int = 151675
    audiotext_end_token_id: int = 151676
    audiotext_pad_token_id: int = 151677
    audiogen_start_token_id: int = 151678
    audiogen_end_token_id: int = 151679
    sampling_rate: int = 24000
    audio_loss_weight: float = 1.0
    codebook_loss_weights: list[float] | tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        follow_text = self.audio_head_config is None
        pipelines = kwargs.pop("custom_pipelines", {})
        kept = {task: entry for task, entry in pipelines.items() if task not in self._registered_tasks}
        super().__post_init__(**kwargs, **({"custom_pipelines": kept} if kept else {}))
        tokenizer = self.audio_tokenizer_config
        if follow_text:
            self.audio_head_config = BaichuanAudioHeadConfig(
                hidden_size=self.text_config.hidden_size,
                codebook_sizes=tokenizer.codebook_sizes,
                rms_norm_eps=getattr(self.text_config, "rms_norm_eps", 1e-6),
            )
        head, flow, vocoder = self.audio_head_config, self.flow_matching_config, self.vocoder_config
        _require(
            head.hidden_size == self.text_config.hidden_size,
            f"The audio head's `hidden_size` ({head.hidden_size}) must be the LLM's ({self.text_config.hidden_size}).",
        )
        _require(
            list(head.codebook_sizes) == list(tokenizer.codebook_sizes),
            f"The audio head's `codebook_sizes` {head.codebook_sizes} must be the tokenizer's {tokenizer.codebook_sizes}.",
        )
        _require(
            flow.input_size == tokenizer.hidden_size,
            f"The flow-matching `input_size` ({flow.input_size}) must be the tokenizer's `hidden_size` ({tokenizer.hidden_size}).",
        )
        _require(
            self.sampling_rate == flow.sampling_rate,
            f"`sampling_rate` ({self.sampling_rate}) must be the flow-matching mel's ({flow.sampling_rate}).",
        )
        if vocoder is not None:
            _require(
                (vocoder.num_mel_bins, vocoder.sampling_rate, vocoder.hop_length)
                == (flow.num_mel_bins, flow.sampling_rate, flow.hop_length),
                "The vocoder's mel bins, sampling rate and hop "
                f"({vocoder.num_mel_bins}, {vocoder.sampling_rate}, {vocoder.hop_length}) must be the flow-matching decoder's "
                f"({flow.num_mel_bins}, {flow.sampling_rate}, {flow.hop_length}).",
            )
        weights = self.codebook_loss_weights
        _require(
            weights is None or (len(weights) == tokenizer.num_codebooks and min(weights) >= 0 and sum(weights) > 0),
            f"`codebook_loss_weights` needs {tokenizer.num_codebooks} weights, none negative and not all zero, got {weights}.",
        )
        _require(self.audio_loss_weight >= 0, f"`audio_loss_weight` must not be negative, got {self.audio_loss_weight}.")
        ids = self.special_token_ids
        _require(len(set(ids)) == len(ids), f"Two special tokens share an id: {ids}.")
        _require(
            max(ids) < self.text_config.vocab_size,
            f"Special token id {max(ids)} lies outside the vocabulary of {self.text_config.vocab_size}.",
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if is_original_config(config_dict):
            config_dict = translate_config(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def special_token_ids(self) -> list[int]:
        """The nine multimodal special tokens, none of which is ever sampled as text except `audiogen_start`."""
        return [
            self.audio_start_token_id,
            self.audio_end_token_id,
            self.audio_pad_token_id,
            self.audio_delim_token_id,
            self.audiotext_start_token_id,
            self.audiotext_end_token_id,
            self.audiotext_pad_token_id,
            self.audiogen_start_token_id,
            self.audiogen_end_token_id,
        ]


__all__ = [
    "BaichuanAudioConfig",
    "BaichuanAudioFlowMatchingConfig",
    "BaichuanAudioHeadConfig",
    "BaichuanAudioTokenizerConfig",
    "BaichuanAudioVocoderConfig",
]
