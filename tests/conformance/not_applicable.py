"""Why some of the libraries' tests do not apply: the one table, in code. Every reason here appears in docs/conformance.md.

Entries of `NOT_APPLICABLE` name a test, or the common beginning of a parametrised one. `python -m tests.conformance --try-skips` runs
them all the same: what passes then no longer needs its entry.
"""

_CLASSIFIERS = "The test is for models with a classification head."
_OWN_NAMES = "Checkpoints are always written with our own tensor names: the original layout is read, never written back."
_CODEBOOKS = (
    "Codebook entries are buffers with random first values, which training moves by running averages: two models differ in them."
)
_OTHER_MODALITIES = "The model has no images, no videos and no text encoder of its own."
_NO_EMBEDDINGS = "The part reads features, not token ids: it has no token embeddings."
_NO_AUDIO_FEATURES = "`get_audio_features` belongs to the whole model: the part does not turn audio into what an LLM reads."
_NO_GENERATION = "The part does not generate text."
_ONE_CLASS = "The part has no base model beside it: it is one class."
_TUPLE = "The audio head returns one tensor of logits per codebook, of different widths: a tuple, not a `ModelOutput`."
_CONVOLUTIONS = "A convolutional network without layers of one width, without attention: it has no hidden states to return."
_INTEGER_CODES = "The first output is integer codes: no gradient passes them, and training goes through the losses instead."
_NO_GRAD_SOLVER = "The first output is solved for without gradients: training goes through the flow-matching loss instead."
_BOOL_MASK = "The test subtracts outputs from one another, and a mask of bools among ours cannot be subtracted."
_NO_OPTIMIZER_STATE = (
    "The test trains on text alone and asks for the optimizer's state of every parameter: those of the audio parts have none then. "
    "Two sharded replicas against one device are compared by the test of gradient accumulation."
)
_FLOAT8 = (
    "Float8 has one scale per tensor, and half a layer another than the whole: the greedy paths of a random model part early. In full "
    "precision the same test passes."
)
_ROUNDING = (
    "PEFT compares merged and unmerged logits at 1e-6, which holds with few layers adapted. With all of them the roundings add up to a "
    "little more; tests/training/test_adapters.py checks them at 1e-5."
)
_OTHER_LOSSES = (
    "`all-linear` adapts tokenizer, flow matching and audio head too, and the test's loss, of text logits, does not reach them."
)
_NO_IMAGES = "The processor takes text and audio, no images."

_EVERYWHERE = {
    "test_can_load_ignoring_mismatched_shapes": _CLASSIFIERS,
    "test_load_with_mismatched_shapes": _CLASSIFIERS,
    "test_problem_types": _CLASSIFIERS,
    "test_reverse_loading_mapping": _OWN_NAMES,
    "test_get_image_features": _OTHER_MODALITIES,
    "test_get_video_features": _OTHER_MODALITIES,
    "test_get_text_features": _OTHER_MODALITIES,
}
_PARTS = _EVERYWHERE | {
    "test_get_audio_features": _NO_AUDIO_FEATURES,
    "test_model_get_set_embeddings": _NO_EMBEDDINGS,
    "test_model_base_model_prefix": _NO_GENERATION,
    "test_torch_save_load": _ONE_CLASS,
}

NOT_APPLICABLE = {
    "SpeechModelTest": _EVERYWHERE | {"test_init_weights_can_init_buffers": _CODEBOOKS},
    "TokenizerTest": _PARTS
    | {
        "test_init_weights_can_init_buffers": _CODEBOOKS,
        "test_model_outputs_equivalence": _BOOL_MASK,
        "test_retain_grad_hidden_states_attentions": _INTEGER_CODES,
    },
    "HeadTest": _PARTS
    | {
        "test_batching_equivalence": _TUPLE,
        "test_hidden_states_output": _TUPLE,
        "test_model_outputs_equivalence": _TUPLE,
        "test_retain_grad_hidden_states_attentions": _TUPLE,
    },
    "FlowMatchingTest": _PARTS | {"test_retain_grad_hidden_states_attentions": _NO_GRAD_SOLVER},
    "VocoderTest": _PARTS
    | {
        "test_gradient_checkpointing_backward_compatibility": _CONVOLUTIONS,
        "test_gradient_checkpointing_enable_disable": _CONVOLUTIONS,
        "test_peft_gradient_checkpointing_enable_disable": _CONVOLUTIONS,
        "test_hidden_states_output": _CONVOLUTIONS,
        "test_retain_grad_hidden_states_attentions": _CONVOLUTIONS,
    },
    "DistributedTest": {"test_fsdp2_plan_vs_ddp": _NO_OPTIMIZER_STATE, "test_tp_generation_quantized": _FLOAT8},
    "PeftTest": {
        **{f"test_safe_merge__{adapter}": _ROUNDING for adapter in ("dora", "everywhere", "llm", "rslora")},
        **{f"test_{check}__everywhere": _OTHER_LOSSES for check in ("training", "training_gradient_checkpointing")},
    },
    "ProcessorTest": {"test_get_num_multimodal_tokens_matches_processor_call": _NO_IMAGES},
}

# Tests of configs and signatures: they pass without building a model, rightly.
NEEDS_NO_MODEL = (
    "test_config",
    "test_config_attn_implementation_setter",
    "test_generation_tester_mixin_inheritance",
    "test_model_main_input_name",
    "test_num_layers_is_small",
)

# What the tests skip by themselves: a pattern of their reason, and ours.
SKIPPED_BY_THE_TESTS = (
    (r"requires (multiple )?accelerators?$|requires MPS", "Needs a GPU, or several, where this run had none."),
    (r"requires (Flash Attention|the kernels library|deepspeed|Torchcodec)", "Needs a library that this package does not use."),
    (r"(image|video)_processor attribute not present|no video processor|accept videos|support images with text", _NO_IMAGES),
    (r"doesn't support `_get_num_multimodal_tokens` yet", "The test looks at replaced image and video placeholders only."),
    (r"Chat template does not support tools", "The released chat layout has no tools."),
    (r"does not support attentions", "The part has no attention, or returns none beside its logits (the audio head)."),
    (r"does not (support output_attentions|output attentions)", "The part returns no attention weights."),
    (
        r"does not support SDPA|not (a )?composite|No subconfigs",
        "The test is for the other kind: models of several configs, or of one.",
    ),
    (
        r"cannot test composite SDPA dispatch",
        "The test finds audio towers by names that ours does not have; test_interfaces.py checks it.",
    ),
    (r"does not support grouped_mm|no sparse experts|output_router_logits|MoE|expert parallel", "The model has no experts."),
    (r"support sliding window", "No part has a sliding window."),
    (
        r"axial RoPE|partial rope|support RoPE|not have RoPE",
        "Rotary positions are the LLM's, and plain; the audio parts have none.",
    ),
    (r"not have position embeddings", "Positions are computed, not learnt."),
    (r"doesn't use `inputs_embeds`|test_resize_embeddings is set", _NO_EMBEDDINGS),
    (r"not have a TP plan", "The part is small enough to be copied to every device."),
    (r"not configured to run training tests", "Parts train with losses and labels of their own, which tests/training checks."),
    (r"PEFT: .*trainable tokens|PEFT: Trainable tokens", "PEFT has no such check for adapters with trainable tokens."),
    (r"No (decoder-only|sequence-to-sequence) language modeling head", "The model or part has no such head."),
    (r"has no _keep_in_fp32|class has no _keep_in_fp32", "Nothing in this class is kept in float32."),
    (
        r"usage of the `capture_outputs` decorator|Cannot capture hidden states",
        "The part returns no hidden states (audio head, vocoder).",
    ),
)
