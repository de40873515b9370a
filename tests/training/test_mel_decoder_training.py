"""The mel decoder on codes that stay, alone and with flow matching: its losses are the tokenizer's own, clips are encoded once."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import find_batch_size

from modeling_baichuan_audio.training.audio_codes import AudioCodeEncoder, RememberedCodes
from modeling_baichuan_audio.training.mel_decoder_training import MelAndFlowForTraining, MelDecoderForTraining
from modeling_baichuan_audio.training.mel_targets import tokenizer_mel_targets
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.tasks import make_task


RATE = 16000


@pytest.fixture
def waveforms() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.standard_normal(int(RATE * seconds))).astype(np.float32) for seconds in (0.9, 0.4, 0.7)]


@pytest.fixture
def codes_of(tiny, processor):
    return AudioCodeEncoder(tiny.audio_tokenizer, processor.feature_extractor)


def losses(module, codes, waveforms, codebooks, **options):
    labels = tokenizer_mel_targets(waveforms, module.config)
    return module(codes, torch.tensor(codebooks), labels["coarse_labels"], labels["mel_labels"], **options)


def test_with_all_codebooks_the_loss_is_the_tokenizers(tiny, processor, codes_of, waveforms):
    tokenizer = tiny.audio_tokenizer.eval()
    module, features = MelDecoderForTraining(tokenizer), processor.feature_extractor(waveforms, return_tensors="pt")
    whole = tokenizer(
        features["input_features"],
        features["input_features_mask"],
        **tokenizer_mel_targets(waveforms, tokenizer.config),
    )
    ours = losses(module, RememberedCodes(codes_of)(waveforms), waveforms, [8, 8, 8])
    for name in ("coarse_loss", "resampled_loss", "refined_loss"):
        torch.testing.assert_close(ours[name], whole[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours["loss"], whole.reconstruction_loss, atol=1e-6, rtol=1e-5)
    accumulated = losses(module, RememberedCodes(codes_of)(waveforms), waveforms, [8, 8, 8], num_items_in_batch=1000)
    frames = int(whole.audio_codes_mask.sum())
    torch.testing.assert_close(accumulated["loss"], whole.reconstruction_loss * frames / 1000, atol=1e-6, rtol=1e-5)


def test_a_clip_may_be_decoded_from_its_first_codebooks(tiny, codes_of, waveforms):
    tokenizer = tiny.audio_tokenizer.eval()
    codes = RememberedCodes(codes_of)(waveforms[:1])
    labels = tokenizer_mel_targets(waveforms[:1], tokenizer.config)
    ours = losses(MelDecoderForTraining(tokenizer), codes, waveforms[:1], [3])
    difference = tokenizer.decode(codes, num_codebooks=3).refined_mel - labels["mel_labels"]
    expected = difference.abs().mean() + difference.square().mean()
    torch.testing.assert_close(ours["refined_loss"], expected, atol=1e-6, rtol=1e-5)


def test_only_the_mel_decoder_is_in_the_checkpoint_and_learns(tiny, codes_of, waveforms):
    module = MelDecoderForTraining(tiny.audio_tokenizer)
    assert all(name.startswith("mel_decoder.") for name in module.state_dict())
    losses(module, RememberedCodes(codes_of)(waveforms), waveforms, [8, 1, 4])["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    learnt = {name for name, parameter in tiny.named_parameters() if parameter.grad is not None}
    assert learnt and all(name.startswith("model.audio_tokenizer.mel_decoder.") for name in learnt)


def together(model, codes, waveforms, codebooks, **options):
    """The joint module's losses, with labels that are as long as the mel decoder's states."""
    labels = tokenizer_mel_targets(waveforms, model.audio_tokenizer.config)
    torch.manual_seed(0)
    mel = torch.randn(len(waveforms), 4 * codes.shape[2] - 1, 80)
    module = MelAndFlowForTraining(model.audio_tokenizer, model.flow_matching)
    seeds = list(range(len(waveforms)))
    return module(codes, torch.tensor(codebooks), labels["coarse_labels"], labels["mel_labels"], mel, seed=seeds, **options), mel


def test_losses_of_both_are_those_of_either(tiny, codes_of, waveforms):
    codes = RememberedCodes(codes_of)(waveforms)
    ours, mel = together(tiny, codes, waveforms, [8, 8, 8])
    alone = losses(MelDecoderForTraining(tiny.audio_tokenizer), codes, waveforms, [8, 8, 8])
    decoded = tiny.audio_tokenizer.decode(codes)
    flow = tiny.flow_matching(decoded.hidden_states, decoded.hidden_lengths, seed=[0, 1, 2], labels=mel)
    for name in ("coarse_loss", "resampled_loss", "refined_loss"):
        torch.testing.assert_close(ours[name], alone[name])
    torch.testing.assert_close(ours["flow_loss"], flow.flow_loss)
    torch.testing.assert_close(ours["prior_loss"], flow.prior_loss)
    torch.testing.assert_close(ours["loss"], alone["loss"] + flow.loss)
    # Code frames divide the one's sums, mel frames the other's.
    scaled, _ = together(tiny, codes, waveforms, [8, 8, 8], num_items_in_batch=1000, num_mel_items_in_batch=5000)
    code_frames, mel_frames = int((codes[:, 0] >= 0).sum()), int(decoded.hidden_lengths.sum())
    torch.testing.assert_close(scaled["refined_loss"], ours["refined_loss"] * code_frames / 1000)
    torch.testing.assert_close(scaled["flow_loss"], ours["flow_loss"] * mel_frames / 5000)


def test_what_flow_matching_lacks_reaches_the_mel_decoder(tiny, codes_of, waveforms):
    codes = RememberedCodes(codes_of)(waveforms)
    losses_of_both, _ = together(tiny, codes, waveforms, [8, 1, 4])
    (losses_of_both["flow_loss"] + losses_of_both["prior_loss"]).backward()
    assert all(parameter.grad.any() for parameter in tiny.audio_tokenizer.mel_decoder.layers.parameters())
    assert all(parameter.grad.any() for parameter in tiny.flow_matching.parameters())
    heard = ("model.audio_tokenizer.mel_decoder.", "flow_matching.")
    assert all(name.startswith(heard) for name, parameter in tiny.named_parameters() if parameter.grad is not None)


def test_with_a_frozen_estimator_only_mu_is_learnt(tiny, codes_of, waveforms):
    codes = RememberedCodes(codes_of)(waveforms)
    whole, _ = together(tiny, codes, waveforms, [8, 1, 4], num_mel_items_in_batch=700)
    tiny.flow_matching.estimator.requires_grad_(False)
    ours, _ = together(tiny, codes, waveforms, [8, 1, 4], num_mel_items_in_batch=700)
    assert set(whole) - set(ours) == {"flow_loss"}
    torch.testing.assert_close(ours["prior_loss"], whole["prior_loss"])
    torch.testing.assert_close(ours["loss"], whole["loss"] - whole["flow_loss"])
    ours["loss"].backward()
    assert all(parameter.grad.any() for parameter in tiny.flow_matching.prenet.parameters())
    assert all(parameter.grad is None for parameter in tiny.flow_matching.estimator.parameters())
    with pytest.raises(ValueError, match="`labels` must be"):
        MelAndFlowForTraining(tiny.audio_tokenizer, tiny.flow_matching)(
            codes,
            torch.tensor([8, 8, 8]),
            **tokenizer_mel_targets(waveforms, tiny.audio_tokenizer.config),
            labels=torch.zeros(3, 2, 80),
        )


def test_codes_and_targets_of_a_joint_batch_fit(tiny, processor, waveforms):
    """What the task makes of recordings at 24 kHz goes through the module as it is, a batch's counts with it."""
    task = make_task(tiny, processor, read_recipe("tiny/mel_and_flow", ["data.train=train.jsonl"]))
    wide = [np.resize(waveform, len(waveform) * 3 // 2 + extra) for waveform, extra in zip(waveforms, (0, 77, 239))]
    batch = task.collate([Row("asr", [Turn(None, [Segment(waveform=wave)])]) for wave in wide])
    counts = task.count_targets(batch)
    assert counts[1] == 4 * counts[0] - len(waveforms)  # a state fewer than four for each code frame, in every clip
    torch.manual_seed(0)
    counted = task.module(**task.model_inputs(batch, counts), seed=[1, 2, 3])
    torch.manual_seed(0)
    own = task.module(**task.model_inputs(batch, None), seed=[1, 2, 3])
    for name, value in own.items():
        torch.testing.assert_close(counted[name], value, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_share_of_clips_with_fewer_codebooks(tiny, dropout):
    tiny.audio_tokenizer.config.codebook_dropout = dropout
    torch.manual_seed(0)
    drawn = MelDecoderForTraining(tiny.audio_tokenizer).draw_codebooks(4000)
    assert drawn.min() >= 1 and drawn.max() == 8
    # One draw of eight keeps all codebooks.
    assert float((drawn < 8).float().mean()) == pytest.approx(dropout * 7 / 8, abs=0.02)


def test_clips_are_encoded_once(codes_of, waveforms):
    encoded = []

    def counted(clips):
        encoded.extend(clips)
        return codes_of(clips)

    remembered = RememberedCodes(counted)
    first, twice = remembered(waveforms[:2]), remembered([waveforms[2], waveforms[0], waveforms[0].copy()])
    assert len(encoded) == 3
    for row, codes in zip([*first, *twice], codes_of([waveforms[i] for i in (0, 1, 2, 0, 0)])):
        assert row.dtype == torch.int64 and np.array_equal(row[:, : codes.shape[1]].numpy(), codes)
        assert (row[:, codes.shape[1] :] == -1).all()


@pytest.mark.parametrize("stage", ["tokenizer", "mel_decoder", "flow_matching", "mel_and_flow", "vocoder"])
def test_the_trainer_counts_a_batchs_rows(stage, tiny, processor, waveforms):
    """Its evaluation weighs a batch's loss by the length of what comes first in it."""
    task = make_task(tiny, processor, read_recipe(f"tiny/{stage}", ["data.train=train.jsonl"]))
    rate = task.sampling_rate or RATE
    speech = [np.resize(waveform, len(waveform) * rate // RATE) for waveform in waveforms]
    assert find_batch_size(task.collate([Row("asr", [Turn(None, [Segment(waveform=wave)])]) for wave in speech])) == len(
        waveforms
    )
