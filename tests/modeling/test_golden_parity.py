"""Every golden tensor, against models loaded from the original and from the converted form of the same checkpoint.

Tolerances: 1e-4 absolute for floats, 1e-3 for waveforms, integers equal.
"""

import pytest
import torch
from helpers.golden import clip_keys, golden, golden_json

from modeling_baichuan_audio import BaichuanAudioFeatureExtractor


CLIPS = clip_keys()
USED: set[str] = set()


def gold(name: str) -> torch.Tensor:
    USED.add(name)
    return golden()[name]


@pytest.fixture(params=["original", "converted"])
def model(request):
    return request.getfixturevalue(f"{request.param}_model")


@pytest.mark.parametrize("wave", [0, 1, 2])
def test_features(wave, check_parity):
    extractor = BaichuanAudioFeatureExtractor(max_audio_seconds=4)
    features = extractor(gold(f"wave.{wave}").numpy(), return_tensors="pt")
    assert len(features["input_features"]) == int(gold(f"wave.{wave}.num_chunks"))
    for chunk, (mel, mask) in enumerate(zip(features["input_features"], features["input_features_mask"])):
        length, _, _ = gold(f"lengths.{wave}.{chunk}").tolist()
        assert int(mask.sum()) == length
        check_parity("features", mel[:, :length], gold(f"features.{wave}.{chunk}"))


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_encoder_and_codes(model, clip, check_parity):
    _, encoder_length, frames = gold(f"lengths.{clip}").tolist()
    encoded = model.audio_tokenizer.encode(gold(f"features.{clip}")[None])
    assert encoded.last_hidden_state.shape[1] == encoder_length
    assert encoded.audio_codes.shape[2] == frames
    check_parity("encoder", encoded.last_hidden_state[0], gold(f"encoder.{clip}"))
    check_parity("codes", encoded.audio_codes[0].T, gold(f"codes.{clip}"), tolerance=0)


def test_codes_of_a_batch(model, check_parity):
    features = [gold(f"features.{clip}") for clip in CLIPS]
    lengths = torch.tensor([mel.shape[1] for mel in features])
    padded = torch.nn.utils.rnn.pad_sequence([mel.T for mel in features], batch_first=True).transpose(1, 2)
    codes = model.get_audio_codes(padded, torch.arange(padded.shape[2]) < lengths[:, None])
    # The original leaks conv1's bias over the right edge of clips of odd length in a batch; alone, every clip is right (test above).
    alone = torch.cat([gold(f"codes.{clip}") for clip in CLIPS])
    flat = codes.transpose(1, 2)[(codes >= 0).all(1)]
    check_parity("codes in a batch", flat, alone, tolerance=0)
    theirs = gold("codes.batched_flat")
    assert torch.equal(theirs, flat)


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_dequantised(model, clip, check_parity):
    vectors = model.audio_tokenizer.quantizer.decode(gold(f"codes.{clip}").T[None])
    check_parity("rvq_sum", vectors[0], gold(f"rvq_sum.{clip}"))
    check_parity("dequantized", model.audio_tokenizer.mel_decoder.in_proj(vectors)[0], gold(f"dequantized.{clip}"))


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_mel_decoder(model, clip, check_parity):
    decoded = model.audio_tokenizer.decode(gold(f"codes.{clip}").T[None])
    assert decoded.mel_lengths.tolist() == gold(f"mel_length.{clip}").tolist()
    check_parity("decoder_hidden", decoded.hidden_states[0], gold(f"decoder_hidden.{clip}"))
    check_parity("coarse_mel", decoded.coarse_mel[0], gold(f"coarse_mel.{clip}"))
    check_parity("refined_mel", decoded.refined_mel[0], gold(f"refined_mel.{clip}"))


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_flow_matching(model, clip, check_parity):
    flow = model.flow_matching
    hidden_states = gold(f"decoder_hidden.{clip}")[None]
    output = flow(hidden_states, noise=gold(f"z.{clip}").T[None])
    assert output.mel_lengths.tolist() == gold(f"flow_mel_length.{clip}").tolist()
    check_parity("prenet_mu", output.condition[0], gold(f"prenet_mu.{clip}"))
    check_parity("flow_mel", output.mel[0], gold(f"flow_mel.{clip}"))
    mask = flow.estimator.chunk_mask(output.mel_lengths, hidden_states.shape[1], torch.float32)
    noisy = gold(f"unet_in.{clip}").T[None]
    velocity = flow.estimator(noisy, torch.tensor([0.3]), gold(f"prenet_mu.{clip}")[None], mask)
    check_parity("unet_out", velocity[0].T, gold(f"unet_out_t0.3.{clip}"))


@pytest.mark.parametrize("clip", ["0.0", "1.0"])
@torch.no_grad()
def test_vocoder(converted_model, clip, check_parity):
    output = converted_model.vocoder(gold(f"vocoder_mel.{clip}").T[None], source=gold(f"vocoder_source.{clip}"))
    check_parity("vocoder_f0", output.f0[0], gold(f"vocoder_f0.{clip}"))
    check_parity("vocoder_wave", output.waveform[0], gold(f"vocoder_wave.{clip}"), tolerance=1e-3)


@pytest.mark.parametrize("clip", ["0.0", "1.0"])
@torch.no_grad()
def test_vocoder_source(converted_model, clip):
    """The golden source was drawn from 60 x F0 with unknown phases and noise: fit the phases, what is left must be the noise.

    A sine of unknown phase is a mix of two known ones, a quarter turn apart. In voiced frames the fit must leave residuals of the
    noise's size (0.003 per harmonic, mixed by the linear layer), find every harmonic's amplitude, and no phase in the fundamental.
    """
    source, config = converted_model.vocoder.source, converted_model.config.vocoder_config
    f0 = 60 * gold(f"vocoder_f0.{clip}")[None]
    zero, quarter = torch.zeros(1, 9), torch.full((1, 9), torch.pi / 2)
    basis = torch.cat([source.harmonics(f0, zero), source.harmonics(f0, quarter)], dim=-1)[0] * config.sine_amplitude
    voiced = (f0 > config.voiced_threshold).repeat_interleave(config.hop_length, dim=1)[0]
    assert voiced.sum() > 1000
    weight, bias = source.linear.weight[0], source.linear.bias
    target = torch.atanh(gold(f"vocoder_source.{clip}")[0].double()) - bias.double()
    solution = torch.linalg.lstsq(basis[voiced].double(), target[voiced, None]).solution[:, 0]
    residual = target[voiced] - basis[voiced].double() @ solution
    expected = config.noise_std * float(weight.square().sum().sqrt())
    assert 0.7 * expected < float(residual.std()) < 1.3 * expected
    amplitude = (solution[:9].square() + solution[9:].square()).sqrt()
    assert torch.allclose(amplitude, weight.abs().double(), atol=0.1 * float(weight.abs().max()))
    assert abs(float(solution[9])) < 0.05 * float(weight.abs().max())


@torch.no_grad()
def test_language_model(model, check_parity):
    prompt, features = gold("llm.prompt"), gold("features.1.0")[None]
    output = model(input_ids=prompt, input_features=features)
    embeds = model.get_input_embeddings()(prompt)
    codes = model.model.resolve_audio_codes(prompt, features)
    mask = model.model.get_placeholder_mask(prompt)
    embeds[mask] = model.model.embed_codes(codes[0].T)
    check_parity("llm.embeds", embeds[0], gold("llm.embeds"))
    check_parity("llm.last_hidden", output.last_hidden_state[0], gold("llm.last_hidden"))
    check_parity("llm.logits", output.logits[0], gold("llm.logits"))


@torch.no_grad()
def test_audio_head(model, check_parity):
    frames, hidden = gold("audio_head.frames"), gold("audio_head.hidden")
    tables = model.model.audio_embed_layers
    embedded = torch.stack([table(frames[:, i]) for i, table in enumerate(tables)][:-1], dim=1)
    for i, logits in enumerate(model.audio_head(hidden, embedded)):
        check_parity("audio_head.logits", logits, gold(f"audio_head.logits.{i}"))


@pytest.mark.parametrize(("key", "penalty"), [("generate_text", 1.0), ("generate_text_rep2.0", 2.0)])
def test_generated_text(model, key, penalty, check_parity):
    expected = gold(f"{key}.sequences")
    prompt = gold("llm.prompt")
    sequences = model.generate(
        prompt,
        input_features=gold("features.1.0")[None],
        do_sample=False,
        repetition_penalty=penalty,
        max_new_tokens=len(expected) - prompt.shape[1],
    )
    check_parity("generated tokens and codes", sequences[0], expected, tolerance=0)


def generate_frames(model, prompt, penalty, frames, **kwargs):
    return model.generate(
        prompt,
        generation_mode="audio",
        output_audio=False,
        do_sample=False,
        audio_repetition_penalty=penalty,
        max_new_tokens=frames,
        **kwargs,
    )


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_generated_audio(model, penalty, check_parity):
    expected = gold(f"generate_audio_rep{penalty}.codes")[:-1]  # the last row is an end that is always appended
    result = generate_frames(model, gold("generate_audio.prompt")[None], penalty, len(expected))
    check_parity("generated tokens and codes", result.audio_codes[0].T, expected, tolerance=0)
    sequences = gold(f"generate_audio_rep{penalty}.sequences")
    check_parity("generated tokens and codes", result.sequences[0], sequences, tolerance=0)


def test_generated_audio_in_a_batch(model, check_parity):
    expected = gold("generate_audio_batch.codes")[:, :-1]
    mask = gold("generate_audio_batch.attention_mask")
    result = generate_frames(model, gold("generate_audio_batch.prompt"), 1.0, expected.shape[1], attention_mask=mask)
    check_parity("generated tokens and codes", result.audio_codes.transpose(1, 2), expected, tolerance=0)


def test_audio_ends_by_itself(model, check_parity):
    expected = gold("generate_audio_eos.codes")
    end = golden_json()["config"]["audio_config"]["vq_config"]["codebook_sizes"][0]
    frames = expected[:-2]
    assert int(expected[-2, 0]) == end and not (frames[:, 0] == end).any()
    bias = model.audio_head.heads[0].bias
    before = bias.detach().clone()  # other tests share the model
    with torch.no_grad():
        bias[end] += float(gold("generate_audio_eos.bias_added"))
    try:
        result = generate_frames(model, gold("generate_audio.prompt")[None], 1.0, 40, max_text_tokens=None)
    finally:
        with torch.no_grad():
            bias.copy_(before)
    audio = [part["audio_codes"] for part in result.segments[0] if part["type"] == "audio"]
    check_parity("generated tokens and codes", audio[0].T, frames, tolerance=0)
    # The original leaves an audio_pad in the place of the end-of-audio frame; here it is audiogen_end at once.
    sequences = gold("generate_audio_eos.sequences")[:-1]
    check_parity("generated tokens and codes", result.sequences[0, : len(sequences)], sequences, tolerance=0)
    assert int(result.sequences[0, len(sequences)]) == model.config.audiogen_end_token_id


def test_interleaved(model, check_parity):
    """Audio, then forced text and audio again: as one call from the first audio's end on."""
    after = gold("interleaved.after_audio.sequences")
    second_codes, second = gold("interleaved.second_audio.codes")[:-1], gold("interleaved.second_audio.sequences")
    first = gold("generate_audio_rep2.0.codes")[:-1]
    config = model.config
    prompt = after[: len(gold("generate_audio_rep2.0.sequences"))].clone()
    assert int(prompt[-1]) == config.audiogen_end_token_id
    history = first[: int((prompt == config.audio_pad_token_id).sum())]
    text_tokens = len(after) - len(prompt)
    result = model.generate(
        prompt[None],
        audio_codes=history.T[None],
        generation_mode="audio",
        output_audio=False,
        do_sample=False,
        repetition_penalty=1.0,
        suppress_tokens=[config.audiogen_start_token_id],  # the switch comes from the limit
        max_text_tokens=text_tokens,
        audio_repetition_penalty=1.0,
        max_new_tokens=len(second) - len(prompt),
    )
    assert int(second[len(after)]) == config.audiogen_start_token_id
    check_parity("generated tokens and codes", result.sequences[0], second, tolerance=0)
    check_parity("generated tokens and codes", result.audio_codes[0].T, second_codes, tolerance=0)
    assert result.segments[0][0]["token_ids"].tolist() == after[len(prompt) :].tolist()


def test_every_golden_tensor_was_compared(request):
    ran = {item.originalname for item in request.session.items if item.path == request.node.path}
    if len(ran) < 16:
        pytest.skip("only a part of this file runs")
    assert set(golden()) == USED
