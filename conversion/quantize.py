"""8-bit and 4-bit weights for what is large: the LLM and the audio head. What turns sound into codes and codes into sound stays."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig


# The embeddings and the text head choose words, the other parts are small and sensitive.
KEPT = ("lm_head", "embed_tokens", "audio_embed_layers", "model.audio_tokenizer", "flow_matching", "vocoder")

# bitsandbytes' product for a CPU wants a multiple of 32 rows, which a codebook and its end symbol are not.
KEPT_BY_FOUR_BITS = (*KEPT, "audio_head.heads")


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


def four_bit_weights(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """
    A quantisation config for `from_pretrained`: weights of the LLM's and the audio head's layers as 4-bit NormalFloat with a scale for
    every 64 of them (QLoRA, arXiv 2305.14314, section 3). Adapters can be trained on it.

    ```python
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=four_bit_weights())
    ```

    On a CPU, save such a model before it has computed anything: bitsandbytes then rearranges the scales, and saves them so.

    Args:
        compute_dtype (defaults to bfloat16): in which the products are computed.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("4-bit weights need bitsandbytes: pip install 'baichuan-audio[quantize]'.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(KEPT_BY_FOUR_BITS),  # despite its name, for either width
    )
