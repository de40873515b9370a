"""A small flow-matching decoder with attention chunks of ten frames."""

import torch

from modeling_baichuan_audio import BaichuanAudioFlowMatchingConfig, BaichuanAudioFlowMatchingDecoder


def small_config() -> BaichuanAudioFlowMatchingConfig:
    return BaichuanAudioFlowMatchingConfig(
        input_size=12,
        num_mel_bins=8,
        prenet_hidden_size=16,
        prenet_layers=2,
        prenet_attention_heads=2,
        prenet_ffn_dim=32,
        estimator_channels=16,
        estimator_blocks=2,
        estimator_mid_stages=2,
        estimator_attention_heads=2,
        estimator_head_dim=8,
        attention_chunk_size=10,
        num_steps=3,
    )


def small_flow(attention: str = "sdpa") -> BaichuanAudioFlowMatchingDecoder:
    """Seeded weights that are large enough for every frame to tell on what follows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = BaichuanAudioFlowMatchingDecoder._from_config(small_config(), attn_implementation=attention).eval()
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape))
    return model
