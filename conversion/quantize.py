"""8-bit weights for what is large: the LLM and the audio head. What turns sound into codes and codes into sound stays as it is."""

from transformers import TorchAoConfig


# The embeddings and the text head choose words, the other parts are small and sensitive.
KEPT = ("lm_head", "embed_tokens", "audio_embed_layers", "model.audio_tokenizer", "flow_matching", "vocoder")


def eight_bit_weights() -> TorchAoConfig:
    """
    A quantisation config for `from_pretrained`: weights of the LLM's and the audio head's products in 8 bits, with a scale for each
    output channel; computed in the dtype that the model is loaded in.

    ```python
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=eight_bit_weights())
    ```

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("8-bit weights need torchao: pip install 'baichuan-audio[quantize]'.") from error
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(KEPT))
