"""Losses and targets of the tokenizer against numpy, gradients, and one clip learnt by heart."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from modeling_baichuan_audio import BaichuanAudioFeatureExtractor, BaichuanAudioTokenizerConfig, BaichuanAudioTokenizerModel
from modeling_baichuan_audio.conversion import tiny_config
from modeling_baichuan_audio.training.mel_targets import target_lengths, tokenizer_mel_targets
from modeling_baichuan_audio.training.recipe import read_recipe
from modeling_baichuan_audio.training.rows import Row, Segment, Turn
from modeling_baichuan_audio.training.tasks import TokenizerTask
from modeling_baichuan_audio.training.tokenizer_training import (
    CTCTextLoss,
    FrozenLLMTextLoss,
    ReplacementSchedule,
    TokenizerForTraining,
    count_code_frames,
)


RATE = 16000


def speech_like(seconds: float, pitch: float = 120.0) -> np.ndarray:
    """Harmonics of a gliding fundamental under two moving formants, in syllables: float32 (samples,)."""
    time = np.arange(int(RATE * seconds)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch + 30 * np.sin(2 * np.pi * 1.3 * time)) / RATE
    formants = [500 + 250 * np.sin(4 * np.pi * time), 1500 + 500 * np.cos(3 * np.pi * time)]
    wave = np.zeros_like(time)
    for harmonic in range(1, 40):
        envelope = 0.01 + sum(np.exp(-(((harmonic * pitch - formant) / 180) ** 2)) for formant in formants)
        wave += envelope * np.sin(harmonic * phase)
    wave *= 0.55 + 0.45 * np.sin(6 * np.pi * time)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def batch_of(waveforms: list[np.ndarray], config) -> dict[str, torch.Tensor]:
    features = BaichuanAudioFeatureExtractor()(waveforms, sampling_rate=RATE, return_tensors="pt")
    return {
        "input_features": features["input_features"],
        "input_features_mask": features["input_features_mask"],
        **tokenizer_mel_targets(waveforms, config),
    }


@pytest.fixture
def waveforms():
    return [speech_like(1.0), speech_like(0.37, 180.0), speech_like(0.71, 90.0)]


@pytest.fixture
def model() -> BaichuanAudioTokenizerModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BaichuanAudioTokenizerModel(tiny_config().audio_tokenizer_config)


def quantiser_buffers(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.quantizer.state_dict().items()}


def numpy_log_mel(wave: np.ndarray, n_fft: int, hop: int, frames: int) -> np.ndarray:
    """Frame by frame, with a mel filter bank written from the slaney scale: linear to 1 kHz, 27 steps per factor 6.4 above."""
    before = wave[1 : n_fft // 2 + 1][::-1]
    padded = np.concatenate([before, wave, np.zeros(n_fft + hop * frames)]).astype(np.float64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    power = np.stack([np.abs(np.fft.rfft(window * padded[i * hop : i * hop + n_fft])) ** 2 for i in range(frames)])

    step = np.log(6.4) / 27
    top = 15 + np.log(RATE / 2 / 1000) / step
    mels = np.linspace(0, top, 82)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    bins = np.arange(n_fft // 2 + 1) * RATE / n_fft
    filters = np.zeros((len(bins), 80))
    for index in range(80):
        low, centre, high = edges[index : index + 3]
        triangle = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
        filters[:, index] = np.maximum(0, triangle) * 2 / (high - low)
    mel = np.log10(np.maximum(power @ filters, 1e-10))
    return (np.maximum(mel, mel.max() - 8) + 4) / 4


# Targets


def test_targets_against_numpy(waveforms, model):
    targets = tokenizer_mel_targets(waveforms, model.config)
    for row, wave in enumerate(waveforms):
        _, coarse, refined = target_lengths(len(wave), model.config)
        np.testing.assert_allclose(targets["coarse_labels"][row, :coarse], numpy_log_mel(wave, 400, 160, coarse), atol=2e-4)
        np.testing.assert_allclose(targets["mel_labels"][row, :refined], numpy_log_mel(wave, 1024, 256, refined), atol=2e-4)
        assert not targets["coarse_labels"][row, coarse:].any()
        assert not targets["mel_labels"][row, refined:].any()


def test_a_target_alone_equals_the_target_in_a_batch(waveforms, model):
    together = tokenizer_mel_targets(waveforms, model.config)
    alone = tokenizer_mel_targets(waveforms[1:2], model.config)
    for name, target in alone.items():
        assert torch.equal(together[name][1, : target.shape[1]], target[0])


@torch.no_grad()
@pytest.mark.parametrize("samples", [1000, 1280, 5919, 5920, 5921, 16000, 16159])
def test_target_lengths_are_the_decoders(samples, model):
    wave = speech_like(2.0)[:samples]
    batch = batch_of([wave], model.config)
    output = model.eval()(**batch)
    frames, coarse, refined = target_lengths(samples, model.config)
    assert output.audio_codes.shape[2] == frames == int(count_code_frames(batch["input_features_mask"], model))
    assert batch["coarse_labels"].shape[1] == coarse == 8 * frames - 2
    assert batch["mel_labels"].shape[1] == refined == output.refined_mel.shape[1] == int(output.mel_lengths[0])


@torch.no_grad()
def test_targets_of_a_full_chunk(model):
    wave = np.zeros(30 * RATE, dtype=np.float32)
    wave[:RATE] = speech_like(1.0)
    targets = tokenizer_mel_targets([wave], model.config)
    decoded = model.decode(torch.zeros(1, 8, target_lengths(len(wave), model.config)[0], dtype=torch.long))
    assert targets["coarse_labels"].shape == decoded.full_rate_mel.shape
    assert targets["mel_labels"].shape == decoded.refined_mel.shape
    np.testing.assert_allclose(targets["mel_labels"][0], numpy_log_mel(wave, 1024, 256, 1873), atol=2e-4)


@pytest.mark.parametrize("waveforms", [[], [np.zeros((2, 16000))], [np.zeros(300)], [np.zeros(30 * RATE + 1)]])
def test_bad_waveforms_are_refused(waveforms, model):
    with pytest.raises(ValueError, match="waveform"):
        tokenizer_mel_targets(waveforms, model.config)


def test_targets_need_one_sampling_rate():
    config = BaichuanAudioTokenizerConfig(refine_sampling_rate=24000, refine_hop_length=480)
    with pytest.raises(ValueError, match="refine_sampling_rate"):
        tokenizer_mel_targets([speech_like(0.5)], config)


# Losses


def l1_plus_l2(prediction: torch.Tensor, target: torch.Tensor) -> float:
    difference = prediction.detach().double().numpy() - target.double().numpy()
    return np.abs(difference).mean() + (difference**2).mean()


def test_every_loss_against_numpy(model, waveforms):
    """In evaluation mode, each clip by itself through `encode` and `decode`, averaged over code frames by hand."""
    config = model.config
    config.reconstruction_weight, config.commitment_weight = 0.7, 0.3
    model.eval()
    batch = batch_of(waveforms, config)
    with torch.no_grad():
        output = model(**batch)
    sums = dict.fromkeys(("coarse_loss", "resampled_loss", "refined_loss"), 0.0)
    commitment, frames_in_all = np.zeros(8), 0
    for wave in waveforms:
        alone = batch_of([wave], config)
        with torch.no_grad():
            codes = model.encode(alone["input_features"]).audio_codes
            decoded = model.decode(codes)
            residual = model.bridge(model.encoder(alone["input_features"], alone["input_features_mask"].sum(-1))[0])
        frames = codes.shape[2]
        residual = residual[0, :frames].double().numpy()
        sums["coarse_loss"] += frames * l1_plus_l2(decoded.full_rate_mel, alone["coarse_labels"])
        sums["resampled_loss"] += frames * l1_plus_l2(decoded.coarse_mel, alone["mel_labels"])
        sums["refined_loss"] += frames * l1_plus_l2(decoded.refined_mel, alone["mel_labels"])
        for level, book in enumerate(model.quantizer.codebooks):
            residual = residual - book.embed.double().numpy()[codes[0, level].numpy()]
            commitment[level] += frames * (residual**2).mean()
        frames_in_all += frames
    for name, value in sums.items():
        assert output[name].item() == pytest.approx(value / frames_in_all, abs=1e-5), name
    np.testing.assert_allclose(output.codebook_commitment, commitment / frames_in_all, atol=1e-5)
    reconstruction = sum(sums.values()) / frames_in_all
    assert output.reconstruction_loss.item() == pytest.approx(reconstruction, abs=1e-5)
    assert output.commitment_loss.item() == pytest.approx(commitment.sum() / frames_in_all, abs=1e-5)
    assert output.loss.item() == pytest.approx(0.7 * reconstruction + 0.3 * commitment.sum() / frames_in_all, abs=1e-5)
    assert output.text_loss is None
    overridden = model(**batch, commitment_weight=2.0)
    assert (overridden.loss - 0.7 * overridden.reconstruction_loss).item() == pytest.approx(
        2 * output.commitment_loss.item(), rel=1e-4
    )


def test_full_rate_mel_is_what_is_resampled(model, waveforms):
    """100 Hz to 62.5 Hz by nearest neighbour, recomputed."""
    model.eval()
    with torch.no_grad():
        decoded = model.decode(model.encode(batch_of(waveforms[:1], model.config)["input_features"]).audio_codes)
    source, target = int(decoded.full_rate_lengths[0]), int(decoded.mel_lengths[0])
    picked = [int(step * source / target) for step in range(target)]
    assert torch.equal(decoded.coarse_mel[0], decoded.full_rate_mel[0, picked])


@pytest.mark.parametrize("training", [False, True])
def test_a_clips_loss_alone_equals_its_loss_in_a_batch(model, waveforms, training):
    """The batch's pieces are the clips' own, weighted by frames; statistics of the quantiser frozen."""
    model.train(training)
    model.quantizer.eval()
    torch.manual_seed(0)
    text_loss = FrozenLLMTextLoss(tiny_llm(), model.config.quantizer_size, prompt_ids=[3, 1])
    labels = torch.tensor([[5, 6, 7, 8], [9, -100, -100, -100], [4, 4, 2, -100]])
    batch = batch_of(waveforms, model.config)
    # What lies in the padding must not matter, whatever it is.
    batch["input_features"] = batch["input_features"].masked_fill(batch["input_features_mask"][:, None] == 0, 1e3)
    for name, lengths in (("coarse_labels", 1), ("mel_labels", 2)):
        for row, wave in enumerate(waveforms):
            batch[name][row, target_lengths(len(wave), model.config)[lengths] :] = float("nan")
    together = model(**batch, text_labels=labels, text_loss=text_loss)
    together.loss.backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    names = ("loss", "coarse_loss", "resampled_loss", "refined_loss", "commitment_loss", "text_loss")
    total, frames_in_all = dict.fromkeys(names, 0.0), sum(target_lengths(len(wave), model.config)[0] for wave in waveforms)
    for wave, label in zip(waveforms, labels):
        alone = batch_of([wave], model.config)
        output = model(**alone, text_labels=label[None][:, : int((label >= 0).sum())], text_loss=text_loss)
        share = target_lengths(len(wave), model.config)[0] / frames_in_all
        (output.loss * share).backward()
        for name in names:
            total[name] += output[name].item() * share
    for name in names:
        assert together[name].item() == pytest.approx(total[name], abs=1e-5), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-5, rtol=1e-4, msg=name)


def test_accumulated_batches_equal_the_whole_batch(model, waveforms):
    model.train()
    model.quantizer.eval()
    whole = model(**batch_of(waveforms, model.config))
    whole.loss.backward()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    halves = [batch_of(waveforms[:1], model.config), batch_of(waveforms[1:], model.config)]
    frames = sum(count_code_frames(half["input_features_mask"], model) for half in halves)
    losses = [model(**half, num_items_in_batch=frames) for half in halves]
    sum(output.loss for output in losses).backward()
    for name in ("loss", "reconstruction_loss", "commitment_loss", "refined_loss"):
        assert sum(output[name] for output in losses).item() == pytest.approx(whole[name].item(), abs=1e-5), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_reach_every_parameter(model, waveforms):
    model.train()
    model(**batch_of(waveforms, model.config), generator=torch.Generator().manual_seed(0)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


def test_reconstruction_reaches_the_encoder_straight_through(model, waveforms):
    """The encoder's gradient through the quantiser is the one at its output, were the quantiser the identity there."""
    model.train()
    model.quantizer.eval()
    batch = batch_of(waveforms[:1], model.config)
    kept = {}

    def keep(module, inputs, output):
        kept["into"], kept["out"] = inputs[0], output.vectors
        kept["into"].retain_grad()
        kept["out"].retain_grad()

    with model.quantizer.register_forward_hook(keep):
        model(**batch, commitment_weight=0.0).loss.backward()
    assert kept["out"].grad.any()
    assert torch.equal(kept["into"].grad, kept["out"].grad)


def test_replaced_clips_are_decoded_from_codes_and_the_others_are_not(model, waveforms):
    batch = batch_of(waveforms, model.config)
    config = model.config
    model.train()
    model.quantizer.gumbel_temperature = model.quantizer.dropout = 0.0
    with torch.no_grad():
        codes = model.encode(batch["input_features"], batch["input_features_mask"]).audio_codes
        from_codes = model.decode(codes).refined_mel
        vectors, frames, _ = model._encode_continuous(batch["input_features"], batch["input_features_mask"])
        continuous = model.mel_decoder(vectors[:, : codes.shape[2]], frames).refined_mel
        for seed in range(20):
            before = quantiser_buffers(model)
            output = model(**batch, replacement_share=0.5, generator=torch.Generator().manual_seed(seed))
            model.quantizer.load_state_dict(before)
            expected = torch.where(output.replaced[:, None, None], from_codes, continuous)
            torch.testing.assert_close(output.refined_mel, expected, atol=1e-5, rtol=0)
            if output.replaced.any() and not output.replaced.all():
                break
        else:
            pytest.fail("no batch mixed replaced and continuous clips")
    assert config.commitment_weight * output.commitment_loss > 0  # of all clips, whether replaced or not


def test_draws_come_from_the_generator_given(model, waveforms):
    batch, before, state = batch_of(waveforms * 4, model.config), quantiser_buffers(model), torch.get_rng_state()
    model.train()
    runs = []
    for seed in (0, 0, 1):
        model.quantizer.load_state_dict(before)
        with torch.no_grad():
            output = model(**batch, replacement_share=0.5, generator=torch.Generator().manual_seed(seed))
        runs.append((output.audio_codes, output.replaced, quantiser_buffers(model)["codebooks.0.embed"]))
    for first, again, other in zip(*runs):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# What training must leave alone


def test_evaluation_is_bitwise_what_it_was(model, waveforms):
    model.eval()
    batch = batch_of(waveforms, model.config)
    features = {name: batch[name] for name in ("input_features", "input_features_mask")}
    before, state = quantiser_buffers(model), torch.get_rng_state()
    with torch.no_grad():
        encoded = model.encode(**features)
        decoded = model.decode(encoded.audio_codes)
        plain, labelled = model(**features), model(**batch, replacement_share=0.0)
    for output in (plain, labelled):
        assert torch.equal(output.audio_codes, encoded.audio_codes)
        assert torch.equal(output.audio_codes_mask, encoded.audio_codes_mask)
        assert torch.equal(output.coarse_mel, decoded.coarse_mel)
        assert torch.equal(output.refined_mel, decoded.refined_mel)
    assert plain.loss is None
    assert list(plain) == ["audio_codes", "audio_codes_mask", "coarse_mel", "refined_mel", "mel_lengths"]
    assert labelled.replaced.all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.quantizer.state_dict().items())


def test_only_a_training_forward_with_labels_updates_the_codebooks(model, waveforms):
    model.train()
    batch = batch_of(waveforms, model.config)
    features = {name: batch[name] for name in ("input_features", "input_features_mask")}
    before, state = quantiser_buffers(model), torch.get_rng_state()
    codes = model(**features).audio_codes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.quantizer.state_dict().items())
    assert (codes >= 0).any()
    model(**batch)
    after = model.quantizer.state_dict()
    assert all(not torch.equal(after[f"codebooks.{level}.embed"], before[f"codebooks.{level}.embed"]) for level in range(8))


def test_labels_that_do_not_fit_are_refused(model, waveforms):
    batch = batch_of(waveforms, model.config)
    features = {name: batch[name] for name in ("input_features", "input_features_mask")}
    with pytest.raises(ValueError, match="together"):
        model(**features, mel_labels=batch["mel_labels"])
    with pytest.raises(ValueError, match="coarse_labels"):
        model(**batch | {"coarse_labels": batch["coarse_labels"][:, :-1]})
    with pytest.raises(ValueError, match="mel_labels"):
        model(**batch | {"mel_labels": batch["mel_labels"][..., :-1]})
    with pytest.raises(ValueError, match="text_loss"):
        model(**batch, text_labels=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="coarse_labels"):
        model(**features, text_labels=torch.zeros(3, 2, dtype=torch.long), text_loss=lambda *args: None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("codebook_decay", 1.0),
        ("codebook_shrinkage", -0.1),
        ("codebook_restart_threshold", -1.0),
        ("gumbel_temperature", -0.5),
        ("codebook_dropout", 1.1),
        ("commitment_weight", -1.0),
    ],
)
def test_bad_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        BaichuanAudioTokenizerConfig(**{name: value})


def test_settings_reach_the_quantiser():
    part = tiny_config().audio_tokenizer_config
    part.codebook_decay, part.codebook_shrinkage, part.codebook_restart_threshold = 0.5, 0.25, 3.0
    part.gumbel_temperature, part.codebook_dropout = 0.125, 0.75
    quantizer = BaichuanAudioTokenizerModel(part).quantizer
    assert (quantizer.decay, quantizer.shrinkage, quantizer.restart_threshold) == (0.5, 0.25, 3.0)
    assert (quantizer.gumbel_temperature, quantizer.dropout) == (0.125, 0.75)


# Text loss of a frozen LLM


def tiny_llm() -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
        return Qwen2ForCausalLM(config)


TEXT = torch.tensor([[5, 6, 7, 8], [9, -100, -100, -100], [-100, -100, -100, -100]])
PROMPT = [3, 1]


@pytest.fixture
def text_loss(model):
    torch.manual_seed(2)
    return FrozenLLMTextLoss(tiny_llm(), model.config.quantizer_size, PROMPT)


@torch.no_grad()
def test_text_loss_against_the_llms_own(text_loss, model):
    vectors, frames = torch.randn(3, 7, model.config.quantizer_size), torch.tensor([7, 2, 5])
    losses = text_loss(vectors, frames, TEXT)
    llm = text_loss.llm
    for row in range(2):
        words = TEXT[row][TEXT[row] >= 0]
        audio = text_loss.projection(vectors[row, : frames[row]])
        embedded = llm.get_input_embeddings()
        inputs = torch.cat([embedded(torch.tensor(PROMPT)), audio, embedded(words)])[None]
        log_probs = llm(inputs_embeds=inputs).logits[0].log_softmax(-1)
        expected = -np.mean([log_probs[i - 1 - len(words), word].item() for i, word in enumerate(words.tolist())])
        assert losses[row].item() == pytest.approx(expected, abs=1e-5)
    assert losses[2] == 0


def test_text_loss_reaches_encoder_and_projection_but_not_the_llm(model, waveforms, text_loss):
    model.train()
    text_loss.train()
    batch = batch_of(waveforms, model.config)
    output = model(**batch, text_labels=TEXT, text_loss=text_loss, generator=torch.Generator().manual_seed(0))
    output.text_loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in text_loss.projection.parameters())
    assert all(parameter.grad is None for parameter in text_loss.llm.parameters())
    assert not text_loss.llm.training
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"encoder", "bridge"}
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name.startswith(("encoder", "bridge")))


def test_text_loss_enters_the_loss_with_its_weight(model, waveforms, text_loss):
    model.eval()
    model.config.text_loss_weight = 0.4
    with torch.no_grad():
        batch = batch_of(waveforms, model.config)
        without, with_text = model(**batch), model(**batch, text_labels=TEXT, text_loss=text_loss)
    assert (with_text.loss - without.loss).item() == pytest.approx(0.4 * with_text.text_loss.item(), abs=1e-5)
    assert with_text.text_loss > 0


def test_the_frozen_llm_is_not_saved_and_not_needed_to_load(model, text_loss):
    wrapped = TokenizerForTraining(model, ReplacementSchedule(10), text_loss)
    state = wrapped.state_dict()
    assert not [name for name in state if "llm" in name or "prompt" in name]
    torch.manual_seed(5)
    other = TokenizerForTraining(
        BaichuanAudioTokenizerModel(model.config),
        ReplacementSchedule(10),
        FrozenLLMTextLoss(tiny_llm(), model.config.quantizer_size, PROMPT),
    )
    llm = {name: value.clone() for name, value in other.text_loss.llm.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(value, llm[name]) for name, value in other.text_loss.llm.state_dict().items())
    del state["text_loss.projection.1.bias"]
    with pytest.raises(RuntimeError, match="projection.1.bias"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), r"\(3, tokens\)"),
        (torch.tensor([[1, 2], [-100, 2], [1, 2]]), "right"),
        (torch.tensor([[1, 2], [1, 40], [1, 2]]), "below 40"),
        (torch.tensor([[1, 2], [1, -1], [1, 2]]), "below 40"),
    ],
)
def test_bad_text_labels_are_refused(text_loss, model, labels, message):
    with pytest.raises(ValueError, match=message):
        text_loss(torch.zeros(3, 4, model.config.quantizer_size), torch.tensor([4, 2, 1]), labels)


# Schedule and wrapper


def test_schedule_rises_from_a_tenth_to_everything_and_the_commitment_follows():
    schedule = ReplacementSchedule(ramp_steps=90)
    assert [round(schedule.share(step), 6) for step in (0, 1, 45, 90, 1000)] == [0.1, 0.11, 0.55, 1.0, 1.0]
    assert [round(schedule.commitment(step, 0.5), 6) for step in (0, 45, 90, 1000)] == [0.05, 0.275, 0.5, 0.5]
    part = ReplacementSchedule(ramp_steps=10, start_share=0.2, end_share=0.8)
    assert (part.share(5), part.share(10), part.commitment(10, 1.0)) == (
        pytest.approx(0.5),
        pytest.approx(0.8),
        pytest.approx(1.0),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"ramp_steps": 0},
        {"start_share": 0.9, "end_share": 0.5},
        {"start_share": -0.1},
        {"end_share": 1.1},
        {"start_share": 0.0, "end_share": 0.0},
        {"commitment_weight": -1.0},
    ],
)
def test_bad_schedules_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ReplacementSchedule(**({"ramp_steps": 10} | settings))


def test_wrapper_takes_share_and_weight_from_the_step(model, waveforms, text_loss):
    batch = batch_of(waveforms * 20, model.config)
    schedule = ReplacementSchedule(ramp_steps=10)
    wrapped = TokenizerForTraining(model, schedule).train()
    for step in (0, 5, 10):
        with torch.no_grad():
            output = wrapped(step, **batch, generator=torch.Generator().manual_seed(3))
        assert output.replaced.float().mean().item() == pytest.approx(schedule.share(step), abs=0.2 if step < 10 else 0)
        assert (output.loss - output.reconstruction_loss).item() == pytest.approx(
            schedule.commitment(step, model.config.commitment_weight) * output.commitment_loss.item(), rel=1e-3
        )
    heavier = TokenizerForTraining(model, ReplacementSchedule(ramp_steps=10, commitment_weight=2.0))(10, **batch)
    assert (heavier.loss - heavier.reconstruction_loss).item() == pytest.approx(2 * heavier.commitment_loss.item(), rel=1e-3)
    with pytest.raises(ValueError, match="text_labels"):
        TokenizerForTraining(model, schedule, text_loss)(0, **batch)


# Learning


@pytest.mark.slow
def test_a_tiny_tokenizer_learns_one_clip_by_heart():
    config = BaichuanAudioTokenizerConfig(
        hidden_size=64,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        codebook_sizes=[32, 16, 16, 16],
        refine_channels=32,
        codebook_decay=0.9,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BaichuanAudioTokenizerModel(config)
    batch = batch_of([speech_like(1.5)], config)
    target = batch["mel_labels"]

    def evaluate():
        model.eval()
        with torch.no_grad():
            output = model(**batch)
        model.train()
        return output, (output.refined_mel - target).abs().mean().item()

    steps, generator = 250, torch.Generator().manual_seed(0)
    training = TokenizerForTraining(model, ReplacementSchedule(ramp_steps=steps // 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    _, before = evaluate()
    for step in range(steps):
        optimizer.zero_grad()
        training(step, **batch, generator=generator).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    output, after = evaluate()
    assert after < 0.3 * before
    # The sound is in the codes, not in the decoder's biases: better than the best constant frame, and lost with the order of the codes.
    assert after < 0.3 * (target - target.median(1, keepdim=True).values).abs().mean().item()
    with torch.no_grad():
        reversed_codes = model.eval().decode(output.audio_codes.flip(2)).refined_mel
    assert (reversed_codes - target).abs().mean().item() > 3 * after
    assert (output.perplexity > 1.5).all()
    assert (output.usage * torch.tensor(config.codebook_sizes) > 1).all()


# CTC in place of the LLM


def test_ctc_text_loss_is_the_sum_over_all_paths():
    loss = CTCTextLoss(input_size=6, vocab_size=3, blank=2)
    vectors = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2], [1, 2, -100]])  # as the task makes them: the blank ends a transcript, and is left out
    values = loss(vectors, torch.tensor([4, 3]), labels)
    for row, (frames, text) in enumerate(((4, [0, 1]), (3, [1]))):
        probabilities = loss.projection(vectors[row, :frames]).softmax(-1).detach()
        total = 0.0
        for path in itertools.product(range(3), repeat=frames):
            said = [token for token, before in zip(path, (2, *path)) if token not in (before, 2)]
            if said == text:
                total += math.prod(float(probabilities[step, token]) for step, token in enumerate(path))
        assert float(values[row].detach()) == pytest.approx(-math.log(total) / len(text), rel=1e-4)


def test_ctc_text_loss_leaves_out_what_has_no_room():
    loss = CTCTextLoss(input_size=6, vocab_size=3, blank=2)
    vectors = torch.randn(2, 4, 6, requires_grad=True)
    values = loss(vectors, torch.tensor([1, 4]), torch.tensor([[0, 1], [0, 1]]))
    values.sum().backward()
    assert float(values[0].detach()) == 0 < float(values[1].detach()) and not vectors.grad[0].any() and vectors.grad[1].any()


def test_ctc_makes_codes_say_their_text(tiny, processor):
    recipe = read_recipe("tiny/tokenizer", ["loss={text_ctc: true}", "data.train=nowhere.jsonl"])
    task = TokenizerTask(tiny, processor, recipe)
    noise = [np.random.default_rng(seed).normal(size=16_000).astype(np.float32) * 0.1 for seed in range(2)]
    rows = [Row("asr", [Turn(None, [Segment(waveform=wave), Segment(text=text)])]) for wave, text in zip(noise, ("yes", "no"))]
    batch = task.collate(rows)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        task.step = step
        outputs = task.module.train()(**task.model_inputs(batch, None))
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(float(outputs.text_loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("loss", ["{text_ctc: 3}", "{text_ctc: true, text_llm: somewhere}"])
def test_ctc_is_on_or_off_and_alone(tiny, processor, loss):
    with pytest.raises(ValueError, match="text_ctc"):
        TokenizerTask(tiny, processor, read_recipe("tiny/tokenizer", [f"loss={loss}", "data.train=nowhere.jsonl"]))
