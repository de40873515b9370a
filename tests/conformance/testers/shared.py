"""Tiny configs and inputs that the testers share."""

import torch

from modeling_baichuan_audio import BaichuanAudioForCausalLM, BaichuanAudioModel
from modeling_baichuan_audio.conversion import tiny_config


BATCH, TEXT, FRAMES = 3, 5, 4
# 33 mel frames give 17 encoder frames, and those the four code frames.
MEL_FRAMES, ENCODER_FRAMES = 33, 17
PLAIN_TEXT = 250  # ids below are bytes, not multimodal tokens


class SpeechModelTester:
    """Prompts of text and one short recording per row, for the base model and the model with heads."""

    base_model_class = BaichuanAudioModel
    causal_lm_class = BaichuanAudioForCausalLM
    is_training = True
    batch_size, num_hidden_layers, num_attention_heads, hidden_size = BATCH, 2, 4, 64
    seq_length = TEXT + FRAMES + 2

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        config = tiny_config()
        config.text_config.max_position_embeddings = 512  # tests run past it
        config.vocab_size = config.text_config.vocab_size  # some tests draw their ids from this one
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        text = torch.randint(10, PLAIN_TEXT, (BATCH, TEXT))
        speech = torch.full((BATCH, FRAMES + 2), config.audio_pad_token_id)
        speech[:, 0], speech[:, -1] = config.audio_start_token_id, config.audio_end_token_id
        return config, {
            "input_ids": torch.cat([text[:, :2], speech, text[:, 2:]], dim=1),
            "attention_mask": torch.ones(BATCH, self.seq_length, dtype=torch.long),
            "input_features": torch.randn(BATCH, config.audio_tokenizer_config.num_mel_bins, MEL_FRAMES),
            "input_features_mask": torch.ones(BATCH, MEL_FRAMES, dtype=torch.long),
        }
