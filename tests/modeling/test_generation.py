import pytest
import torch
from helpers.golden import golden
from torch import nn
from transformers import (
    GenerationConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import tiny_model
from modeling_baichuan_audio.generation_baichuan_audio import (
    REPLY_DEFAULTS,
    TEXT_DEFAULTS,
    PaddedRepetitionPenalty,
    join_waveforms,
)
from modeling_baichuan_audio.generation_sampling import SamplingColumns, SamplingSettings, choose_tokens


EOS = 256


def left_padded(rows: list[list[int]], pad: int = EOS) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def reply(model, inputs, **kwargs):
    options = {"generation_mode": "audio", "output_audio": False, "seed": 0, "max_new_tokens": 40, "eos_token_id": EOS}
    options |= {"max_text_tokens": 6, "max_audio_frames": 8, "pad_token_id": EOS}
    if isinstance(inputs, list):
        inputs = left_padded(inputs)
    return model.generate(**inputs, **(options | kwargs))


def check_layout(model, result, prompt_length: int) -> None:
    """Sequences, segments and codes of a reply tell the same story, and only tokens that make sense appear."""
    config = model.config
    for row, segments in enumerate(result.segments):
        tokens = result.sequences[row, prompt_length:].tolist()
        rebuilt, in_audio = [], int(result.sequences[row, prompt_length - 1]) == config.audiogen_start_token_id
        for segment in segments:
            if segment["type"] == "text":
                rebuilt += segment["token_ids"].tolist()
                assert not set(segment["token_ids"].tolist()) & (set(config.special_token_ids) | {EOS})
            else:
                start = [] if in_audio else [config.audiogen_start_token_id]
                rebuilt += [*start, *[config.audio_pad_token_id] * segment["audio_codes"].shape[1], config.audiogen_end_token_id]
                sizes = torch.tensor(config.audio_tokenizer_config.codebook_sizes)[:, None]
                assert (segment["audio_codes"] < sizes).all() and (segment["audio_codes"] >= 0).all()
            in_audio = False
        # A limit may cut the last piece before its end token, or after a switch that no frame followed.
        shared = min(len(rebuilt), len(tokens))
        assert tokens[:shared] == rebuilt[:shared]
        assert set(tokens[shared:]) <= {EOS, config.audiogen_start_token_id, config.audiogen_end_token_id}
        frames = [part["audio_codes"] for part in segments if part["type"] == "audio"]
        joined = torch.cat(frames, dim=1) if frames else torch.empty(8, 0, dtype=torch.long)
        assert torch.equal(result.audio_codes[row, :, : joined.shape[1]], joined)
        assert (result.audio_codes[row, :, joined.shape[1] :] == -1).all()


# --- replies -------------------------------------------------------------------------------------------------------------------


def test_rows_in_different_modes_equal_themselves_alone(shared_tiny_model):
    """A text prompt, a prompt that begins in audio, one with a script, one with earlier speech; sampled, in one padded batch."""
    model = shared_tiny_model
    start, pad, end = (getattr(model.config, f"{name}_token_id") for name in ("audiogen_start", "audio_pad", "audiogen_end"))
    rows = [[10, 11, 12], [20, 21, start], [30, 31, 32, 33, 34], [40, start, pad, pad, pad, end, 41]]
    scripts = [None, None, [[50, 51, 52], [53]], None]
    codes = torch.full((4, 8, 3), -1)
    codes[3] = torch.arange(24).reshape(8, 3) % 16
    inputs = left_padded(rows)
    together = reply(model, inputs, seed=[1, 2, 3, 4], forced_text_ids=scripts, audio_codes=codes)
    check_layout(model, together, inputs["input_ids"].shape[1])
    modes = [[part["type"] for part in segments] for segments in together.segments]
    assert modes[1][0] == "audio" and modes[0][0] == "text"
    for row, prompt in enumerate(rows):
        alone = reply(
            model,
            [prompt],
            seed=row + 1,
            forced_text_ids=[scripts[row]],
            **({"audio_codes": codes[row : row + 1]} if row == 3 else {}),
        )
        assert len(alone.segments[0]) == len(together.segments[row])
        for ours, theirs in zip(alone.segments[0], together.segments[row]):
            assert ours["type"] == theirs["type"]
            key = "token_ids" if ours["type"] == "text" else "audio_codes"
            assert torch.equal(ours[key], theirs[key])


def test_greedy_rows_equal_themselves_alone(shared_tiny_model):
    rows = [[10, 11], [20, 21, 22, 23], [30]]
    together = reply(shared_tiny_model, rows, do_sample=False)
    for row, prompt in enumerate(rows):
        alone = reply(shared_tiny_model, [prompt], do_sample=False)
        frames = alone.audio_codes.shape[2]
        assert torch.equal(alone.audio_codes[0], together.audio_codes[row, :, :frames])
        assert torch.equal(
            alone.sequences[0, len(prompt) :], together.sequences[row, 4 : 4 + alone.sequences.shape[1] - len(prompt)]
        )


def test_rows_end_at_different_times(shared_tiny_model):
    model = shared_tiny_model
    scripts = [[[60]], [[61, 62], [63, 64], [65]]]
    result = reply(model, [[10], [20]], forced_text_ids=scripts, max_new_tokens=200)
    ended = [int((row == model.config.audiogen_end_token_id).nonzero()[-1]) for row in result.sequences]
    assert ended[0] < ended[1] == result.sequences.shape[1] - 1
    assert (result.sequences[0, ended[0] + 1 :] == EOS).all()
    assert result.audio_codes[0, 0, -1] == -1 and result.audio_codes[1, 0, -1] >= 0
    check_layout(model, result, 1)


def test_waveforms_of_rows(shared_tiny_model):
    result = reply(
        shared_tiny_model, [[10, 11], [20]], forced_text_ids=[[[60], [61]], [[62]]], max_new_tokens=80, output_audio=True
    )
    for row, segments in enumerate(result.segments):
        frames = [part["audio_codes"].shape[1] for part in segments if part["type"] == "audio"]
        assert result.audio[row].dtype == torch.float32
        assert result.audio[row].shape == (sum((4 * count - 1) * 480 for count in frames) - 240 * (len(frames) - 1),)
        pieces = [part["audio_codes"][None] for part in segments if part["type"] == "audio"]
        first = shared_tiny_model.decode_audio(pieces[0], seed=0)[0]
        torch.testing.assert_close(result.audio[row][: len(first) - 240], first[:-240], atol=5e-5, rtol=0)
    for row, timings in zip(result.sequences, result.timings):
        kinds = ("prefill", "decode", "language", "audio_head", "waveform")
        assert set(timings) == {*(f"{kind}_seconds" for kind in kinds), "steps"}
        assert 0 < timings["language_seconds"] + timings["audio_head_seconds"] <= timings["decode_seconds"]
        ended = int((row == shared_tiny_model.config.audiogen_end_token_id).nonzero()[-1])
        assert timings["steps"] == ended + 1 - 2  # the prompt is two tokens long


def test_text_is_never_overwritten_at_a_switch(shared_tiny_model):
    """Whatever makes the switch, the tokens before it are those of a reply without that switch."""
    model = shared_tiny_model
    free = reply(
        model, [[10, 11, 12]], max_text_tokens=None, suppress_tokens=[model.config.audiogen_start_token_id], max_new_tokens=12
    )
    text = free.segments[0][0]["token_ids"]
    assert len(text) == 12
    by_length = reply(model, [[10, 11, 12]], max_text_tokens=5, suppress_tokens=[model.config.audiogen_start_token_id])
    assert torch.equal(by_length.segments[0][0]["token_ids"], text[:5])
    token = int(text[3])
    first = text.tolist().index(token)
    by_token = reply(
        model,
        [[10, 11, 12]],
        max_text_tokens=None,
        audio_switch_token_ids=[token],
        suppress_tokens=[model.config.audiogen_start_token_id],
    )
    assert torch.equal(by_token.segments[0][0]["token_ids"], text[: first + 1])
    assert int(by_token.sequences[0, 3 + first + 1]) == model.config.audiogen_start_token_id


def test_limits(shared_tiny_model):
    result = reply(shared_tiny_model, [[10]], max_audio_frames=3, max_text_tokens=2, max_new_tokens=50)
    assert result.sequences.shape[1] == 51
    assert all(len(p["token_ids"]) <= 2 for p in result.segments[0] if p["type"] == "text")
    assert all(p["audio_codes"].shape[1] <= 3 for p in result.segments[0] if p["type"] == "audio")
    assert result.timings[0]["steps"] == 50


def boosted(model: BaichuanAudioForCausalLM, tokens: list[int]) -> BaichuanAudioForCausalLM:
    """Makes the text head prefer `tokens` whatever the hidden state is: their rows point where all hidden states are shifted to."""
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(1.0)
        direction = torch.ones(model.config.text_config.hidden_size)
        model.model.language_model.norm.register_forward_hook(lambda module, args, output: output + 50 * direction)
        model.lm_head.weight[tokens] = direction
    return model


def test_special_tokens_are_never_sampled_where_they_make_no_sense(tiny):
    """The original crashes on a sampled audio_pad."""
    config = tiny.config
    boosted(tiny, config.special_token_ids)
    for _ in range(2):
        text = tiny.generate(torch.tensor([[10, 11]]), max_new_tokens=10, do_sample=True, eos_token_id=EOS)
        assert not set(text[0, 2:].tolist()) & set(config.special_token_ids)
        assert text.shape[1] > 2
    result = reply(tiny, [[10, 11], [12]], max_text_tokens=None)
    check_layout(tiny, result, 2)
    # Only audiogen_start is left of them, and not before there is text to speak.
    assert result.segments[0][0]["type"] == "text" and len(result.segments[0][0]["token_ids"]) == 1
    assert result.segments[0][1]["type"] == "audio"


def test_end_of_text_ends_the_reply(tiny):
    boosted(tiny, [EOS])
    result = reply(tiny, [[10, 11]])
    assert result.sequences.shape[1] == 3 and int(result.sequences[0, -1]) == EOS
    assert result.segments == [[]] and result.audio_codes.shape == (1, 8, 0)
    assert reply(tiny, [[10, 11]], output_audio=True).audio[0].shape == (0,)


def test_audio_that_ends_at_once_is_no_piece(tiny):
    with torch.no_grad():
        tiny.audio_head.heads[0].bias[-1] = 1e4
    result = reply(tiny, [[10, tiny.config.audiogen_start_token_id]], max_new_tokens=3)
    assert int(result.sequences[0, 2]) == tiny.config.audiogen_end_token_id
    assert [part["type"] for part in result.segments[0]] == ["text"]


def test_a_reply_goes_on_from_its_own_history(shared_tiny_model):
    """Feeding back the sequence and codes of a reply gives the hidden state that the reply itself went on from."""
    model = shared_tiny_model
    whole = reply(model, [[10, 11, 12]], do_sample=False, max_new_tokens=30)
    cut = 3 + 20
    prompt = whole.sequences[:, :cut]
    frames = int((prompt == model.config.audio_pad_token_id).sum())
    with torch.no_grad():
        logits = model(input_ids=prompt, audio_codes=whole.audio_codes[:, :, :frames], output_audio_logits=True)
    for place in (prompt[0] == model.config.audio_pad_token_id).nonzero()[:3, 0].tolist():
        index = int((prompt[0, :place] == model.config.audio_pad_token_id).sum())
        scores = logits.audio_logits[0][0, index].clone()
        earlier = whole.audio_codes[0, 0, :index][
            -(place - int((prompt[0, :place] == model.config.audiogen_start_token_id).nonzero()[-1]) - 1) or index :
        ]
        seen = torch.zeros_like(scores, dtype=torch.bool)
        seen[earlier] = True
        scores = torch.where(seen, torch.where(scores < 0, scores * 1.3, scores / 1.3), scores)
        assert int(scores.argmax()) == int(whole.audio_codes[0, 0, index])


def test_seeds(shared_tiny_model):
    same = [reply(shared_tiny_model, [[10, 11]], seed=4).sequences for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], reply(shared_tiny_model, [[10, 11]], seed=5).sequences)
    torch.manual_seed(9)
    first = reply(shared_tiny_model, [[10, 11]], seed=None).sequences
    torch.manual_seed(9)
    assert torch.equal(first, reply(shared_tiny_model, [[10, 11]], seed=None).sequences)
    texts = [shared_tiny_model.generate(torch.tensor([[10]]), seed=3, max_new_tokens=8) for _ in range(2)]
    assert torch.equal(*texts)


# --- plain text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_text_prompt_alone_equals_prompt_in_a_padded_batch(original_model, penalty):
    config, clips = original_model.config, ["0.0", "1.0", "2.1"]
    features = [golden()[f"features.{clip}"] for clip in clips]
    rows = [
        [7, config.audio_start_token_id, *[config.audio_pad_token_id] * count, config.audio_end_token_id, 5]
        for count in (6, 15, 12)
    ]
    lengths = torch.tensor([mel.shape[1] for mel in features])
    mels = nn.utils.rnn.pad_sequence([mel.T for mel in features], batch_first=True).transpose(1, 2)
    mask = torch.arange(mels.shape[2]) < lengths[:, None]
    options = {"do_sample": False, "repetition_penalty": penalty, "max_new_tokens": 8}
    inputs = left_padded(rows, pad=11)
    together = original_model.generate(**inputs, input_features=mels, input_features_mask=mask, **options)
    for row, prompt in enumerate(rows):
        alone = original_model.generate(torch.tensor([prompt]), input_features=features[row][None], **options)
        assert torch.equal(together[row, -8:], alone[0, -8:])


def test_beams_and_several_sequences(original_model):
    """Features are turned into codes once, so that whole rows can be repeated."""
    prompt, features = golden()["llm.prompt"], golden()["features.1.0"][None]
    beams = original_model.generate(prompt, input_features=features, num_beams=3, do_sample=False, max_new_tokens=5)
    assert beams.shape == (1, prompt.shape[1] + 5)
    several = original_model.generate(
        prompt.repeat(2, 1), input_features=features.repeat(2, 1, 1), num_return_sequences=2, do_sample=True, max_new_tokens=3
    )
    assert several.shape == (4, prompt.shape[1] + 3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_text_without_a_cache(original_model, use_cache):
    sequences = original_model.generate(
        golden()["llm.prompt"],
        input_features=golden()["features.1.0"][None],
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=12,
        use_cache=use_cache,
    )
    assert torch.equal(sequences[0], golden()["generate_text.sequences"])


def test_text_goes_on_from_a_cache(original_model):
    """The second call feeds the rest of the prompt only; its audio tokens take the last frames."""
    prompt, codes = golden()["llm.prompt"], golden()["codes.1.0"].T[None]
    cut = 15
    fed = int((prompt[:, :cut] == original_model.config.audio_pad_token_id).sum())
    assert 0 < fed < codes.shape[2]
    with torch.no_grad():
        cache = original_model(input_ids=prompt[:, :cut], audio_codes=codes[:, :, :fed], use_cache=True).past_key_values
    sequences = original_model.generate(
        prompt, audio_codes=codes, past_key_values=cache, do_sample=False, repetition_penalty=1.0, max_new_tokens=12
    )
    assert torch.equal(sequences[0], golden()["generate_text.sequences"])


def test_padded_repetition_penalty():
    torch.manual_seed(0)
    ids, scores = torch.tensor([[9, 9, 3, 4], [5, 6, 3, 4]]), torch.randn(2, 12)
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    ours = PaddedRepetitionPenalty(1.7, mask)(ids, scores)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)
    torch.testing.assert_close(ours[0], theirs(ids[:1, 2:], scores[:1])[0])
    torch.testing.assert_close(ours[1], theirs(ids[1:], scores[1:])[0])


# --- drawing tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(1.0, 0, 1.0, 1.0), (0.5, 0, 1.0, 1.0), (1.0, 3, 1.0, 1.0), (1.0, 0, 0.6, 1.0), (0.8, 5, 0.85, 1.3), (2.0, 1, 0.1, 1.0)],
)
def test_draws_follow_the_distribution_of_transformers_warpers(temperature, top_k, top_p, penalty):
    torch.manual_seed(1)
    logits, history = torch.randn(1, 9) * 2, torch.tensor([[2, 5]])
    scores = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone()) if penalty != 1 else logits.clone()
    scores = TemperatureLogitsWarper(temperature)(history, scores)
    scores = TopKLogitsWarper(top_k)(history, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(history, scores) if top_p < 1 else scores
    expected = scores.softmax(-1)[0]
    count = 4000
    uniforms = (torch.arange(count) + 0.5) / count  # evenly spaced: the frequencies are the probabilities
    seen = torch.zeros(count, 9, dtype=torch.bool)
    seen[:, history[0]] = True
    settings = SamplingColumns.of([SamplingSettings(temperature, top_k, top_p, penalty)] * count)
    drawn = choose_tokens(logits.expand(count, -1), settings, seen, uniforms, do_sample=True)
    frequencies = torch.bincount(drawn, minlength=9) / count
    torch.testing.assert_close(frequencies, expected, atol=2e-3, rtol=0)
    assert not frequencies[expected == 0].any()


def test_draws_at_the_edges_stay_allowed():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]]).repeat(2, 1)
    settings = SamplingColumns.of([SamplingSettings(1.0, 0, 1.0, 1.0)] * 2)
    drawn = choose_tokens(logits, settings, torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0.0, 1.0 - 1e-7]), True)
    assert drawn.tolist() == [2, 0]


def test_rows_have_settings_of_their_own():
    logits = torch.tensor([[3.0, 2.9, 0.0]]).repeat(2, 1)
    settings = SamplingColumns.of([SamplingSettings(1.0, 1, 1.0, 1.0), SamplingSettings(1.0, 2, 1.0, 5.0)])
    seen = torch.tensor([[True, False, False]] * 2)
    assert choose_tokens(logits, settings, seen, torch.zeros(2), do_sample=False).tolist() == [0, 1]


@pytest.mark.parametrize(
    "settings", [(0.0, 5, 0.9, 1.0), (1.0, -1, 0.9, 1.0), (1.0, 5, 0.0, 1.0), (1.0, 5, 1.1, 1.0), (1.0, 5, 0.9, 0.0)]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="Sampling needs"):
        SamplingSettings(*settings)


def test_the_audio_penalty_looks_at_this_piece_and_this_codebook():
    """With a huge penalty no codebook repeats a code within a piece, though different codebooks share numbers."""
    model = tiny_model()
    result = reply(model, [[10]], audio_repetition_penalty=1e6, do_sample=False, max_audio_frames=10, max_new_tokens=60)
    pieces = [part["audio_codes"] for part in result.segments[0] if part["type"] == "audio"]
    assert len(pieces) >= 2
    positive = 0
    for piece in pieces:
        for codebook in piece:
            positive += len(set(codebook.tolist())) == len(codebook)
    assert positive >= 0.9 * 8 * len(pieces)


def test_defaults_are_the_originals(shared_tiny_model):
    config = shared_tiny_model.generation_config
    for name, value in (TEXT_DEFAULTS | REPLY_DEFAULTS).items():
        assert getattr(config, name) == value
    assert (config.temperature, config.top_k, config.top_p, config.repetition_penalty) == (0.8, 20, 0.85, 1.1)
    assert (config.later_text_temperature, config.later_text_repetition_penalty) == (0.3, 1.05)
    assert (config.audio_temperature, config.audio_top_k, config.audio_top_p, config.audio_repetition_penalty) == (
        0.5,
        5,
        0.85,
        1.3,
    )


def test_settings_survive_saving(tiny, tmp_path):
    tiny.generation_config.audio_temperature = 0.25
    tiny.save_pretrained(tmp_path)
    again = BaichuanAudioForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.audio_temperature == 0.25
    assert again.generation_config.max_audio_frames == 500


def test_a_generation_config_of_ones_own(shared_tiny_model):
    config = GenerationConfig(max_new_tokens=9, do_sample=False)
    result = shared_tiny_model.generate(
        torch.tensor([[10, 11]]), generation_config=config, generation_mode="audio", output_audio=False, seed=0
    )
    assert result.sequences.shape == (1, 11)
    assert not hasattr(config, "audio_temperature"), "the caller's object is left alone"


# --- joining, refusing ---------------------------------------------------------------------------------------------------------


def test_joined_pieces_fade_into_one_another():
    ones, twos = torch.ones(1000), 2 * torch.ones(600)
    joined = join_waveforms([ones, twos], 24000)
    assert joined.shape == (1360,)
    assert (joined[:760] == 1).all() and (joined[1000:] == 2).all()
    assert (joined[760:1000].diff() > 0).all() and joined[760] == 1 and joined[999] == 2
    assert torch.equal(join_waveforms([ones], 24000), ones)
    assert join_waveforms([ones, torch.ones(100)], 24000).shape == (1000,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_mode": "speech"}, 'must be "text" or "audio"'),
        ({"generation_mode": "audio", "num_beams": 2}, "num_beams=1"),
        ({"generation_mode": "audio", "streamer": object()}, "`AudioStreamer`"),
        ({"generation_mode": "audio", "logits_processor": [1]}, "`logits_processor`"),
        ({"generation_mode": "audio", "forced_text_ids": []}, "one entry per row"),
        ({"generation_mode": "audio", "forced_text_ids": [[]]}, "nothing to speak"),
        ({"generation_mode": "audio", "forced_text_ids": [[["a"]]]}, "text token ids"),
        ({"generation_mode": "audio", "forced_text_ids": [[[99999]]]}, "text token ids"),
        ({"generation_mode": "audio", "max_audio_frames": 0}, "at least 1"),
        ({"generation_mode": "audio", "audio_temperature": 0.0}, "temperature > 0"),
        ({"generation_mode": "audio", "seed": [1, 2]}, "`seed` must be"),
        ({"generation_mode": "text", "forced_text_ids": [[[1]]]}, 'generation_mode="audio"'),
        ({"output_audio": True}, 'generation_mode="audio"'),
    ],
)
def test_what_cannot_be_done_is_refused(shared_tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        shared_tiny_model.generate(torch.tensor([[10, 11]]), max_new_tokens=4, **options)


def test_special_tokens_in_a_script_are_refused(shared_tiny_model):
    script = [[[shared_tiny_model.config.audio_pad_token_id]]]
    with pytest.raises(ValueError, match="text token ids"):
        shared_tiny_model.generate(torch.tensor([[10]]), generation_mode="audio", forced_text_ids=script)


def test_audio_that_does_not_match_the_prompt_is_refused(original_model):
    with pytest.raises(ValueError, match="audio tokens without codes"):
        original_model.generate(torch.tensor([[1, 2]]), input_features=golden()["features.0.0"][None])
