import pytest
import torch
from helpers.golden import golden
from torch import nn

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import tiny_config


def prompt_with(model, text: list[int], frames: int, more: list[int]) -> list[int]:
    config = model.config
    return [*text, config.audio_start_token_id, *[config.audio_pad_token_id] * frames, config.audio_end_token_id, *more]


def left_padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def test_prompt_alone_equals_prompt_in_a_padded_batch(original_model):
    model = original_model
    clips = ["0.0", "1.0", "2.0"]
    features = [golden()[f"features.{clip}"] for clip in clips]
    frames = [6, 15, 50]
    rows = [prompt_with(model, [5, 6][: i + 1], count, [9, 8, 7][:i]) for i, count in enumerate(frames)]
    ids, mask = left_padded(rows, pad=123)
    lengths = torch.tensor([mel.shape[1] for mel in features])
    mels = nn.utils.rnn.pad_sequence([mel.T for mel in features], batch_first=True).transpose(1, 2)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        input_features=mels,
        input_features_mask=torch.arange(mels.shape[2]) < lengths[:, None],
    )
    for row, (text, mel) in enumerate(zip(rows, features)):
        alone = model(input_ids=torch.tensor([text]), input_features=mel[None])
        torch.testing.assert_close(together.logits[row, -len(text) :], alone.logits[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_codes_and_features_are_the_same_input(original_model):
    model, features = original_model, golden()["features.1.0"][None]
    ids = golden()["llm.prompt"]
    reference = model(input_ids=ids, input_features=features).logits
    codes = model.get_audio_codes(features)
    assert torch.equal(model(input_ids=ids, audio_codes=codes).logits, reference)
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == model.config.audio_pad_token_id] = model.get_audio_features(features).pooler_output
    assert torch.equal(model(inputs_embeds=embeds).logits, reference)
    kept = model(input_ids=ids, input_features=features, logits_to_keep=3).logits
    torch.testing.assert_close(kept, reference[:, -3:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_codes_and_features_mixed_in_one_batch(original_model):
    """Row 0: codes, then features; row 1: features alone. Codes at -1 are filled in prompt order."""
    model = original_model
    short, long = golden()["features.0.0"], golden()["features.1.0"]
    history = golden()["codes.2.1"].T[:, :4]
    row0 = prompt_with(model, [1], 4, prompt_with(model, [2], 15, [3]))
    row1 = prompt_with(model, [4], 6, [])
    ids, mask = left_padded([row0, row1])
    codes = torch.full((2, 8, 19), -1)
    codes[0, :, :4] = history
    mels = nn.utils.rnn.pad_sequence([long.T, short.T], batch_first=True).transpose(1, 2)
    feature_mask = torch.arange(mels.shape[2]) < torch.tensor([[long.shape[1]], [short.shape[1]]])
    resolved = model.model.resolve_audio_codes(ids, mels, feature_mask, codes)
    assert torch.equal(resolved[0, :, :4], history)
    assert torch.equal(resolved[0, :, 4:], golden()["codes.1.0"].T)
    assert torch.equal(resolved[1, :, :6], golden()["codes.0.0"].T)
    assert (resolved[1, :, 6:] == -1).all()
    assert (codes[0, :, 4:] == -1).all(), "the caller's tensor is left alone"


@pytest.mark.parametrize(
    ("frames", "given", "message"),
    [
        (5, {"input_features": "0.0"}, "5 audio tokens without codes, but `input_features` gives 6 frames"),
        (7, {"input_features": "0.0"}, "7 audio tokens without codes"),
        (0, {"input_features": "0.0"}, "0 audio tokens without codes"),
        (5, {}, "5 audio tokens without codes, but `input_features` gives 0 frames"),
        (5, {"audio_codes": 4}, "cannot fill"),
        (4, {"audio_codes": 4, "input_features": "0.0"}, "0 audio tokens without codes"),
    ],
)
def test_audio_that_does_not_match_is_refused(original_model, frames, given, message):
    kwargs = {}
    if "input_features" in given:
        kwargs["input_features"] = golden()[f"features.{given['input_features']}"][None]
    if "audio_codes" in given:
        kwargs["audio_codes"] = torch.zeros(1, 8, given["audio_codes"], dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        original_model(input_ids=torch.tensor([prompt_with(original_model, [1], frames, [2])]), **kwargs)


def test_ids_and_embeddings_together_are_refused(original_model):
    with pytest.raises(ValueError, match="exactly one"):
        original_model(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 256))
    with pytest.raises(ValueError, match="exactly one"):
        original_model()


@torch.no_grad()
def test_audio_beside_embeddings_takes_the_places_of_the_audio_token(original_model):
    model, features = original_model, golden()["features.1.0"][None]
    ids = golden()["llm.prompt"]
    embeds = model.get_input_embeddings()(ids)
    reference = model(input_ids=ids, input_features=features).logits
    assert torch.equal(model(inputs_embeds=embeds, input_features=features).logits, reference)
    assert torch.equal(model(inputs_embeds=embeds, audio_codes=model.get_audio_codes(features)).logits, reference)
    with pytest.raises(ValueError, match="15 audio tokens without codes"):
        model(inputs_embeds=embeds, input_features=features[..., :64])


@torch.no_grad()
def test_audio_logits_are_the_heads_on_the_hidden_state_before_each_frame(original_model):
    model = original_model
    rows = [prompt_with(model, [1, 2, 3], 6, [4]), prompt_with(model, [5], 4, [])]
    ids, mask = left_padded(rows)
    codes = torch.full((2, 8, 6), -1)
    codes[0], codes[1, :, :4] = golden()["codes.0.0"].T, golden()["codes.2.1"].T[:, :4]
    output = model(input_ids=ids, attention_mask=mask, audio_codes=codes, output_audio_logits=True)
    for row, count in enumerate([6, 4]):
        places = (ids[row] == model.config.audio_pad_token_id).nonzero()[:, 0]
        before = output.last_hidden_state[row, places - 1]
        frames = codes[row, :, :count].T
        tables = model.model.audio_embed_layers
        embedded = torch.stack([table(frames[:, i]) for i, table in enumerate(tables)][:-1], dim=1)
        for ours, reference in zip(output.audio_logits, model.audio_head(before, embedded)):
            torch.testing.assert_close(ours[row, :count], reference, atol=1e-5, rtol=0)
            assert not ours[row, count:].any()


def test_text_loss_and_gradients():
    torch.manual_seed(0)
    model = BaichuanAudioForCausalLM(tiny_config())
    row = prompt_with(model, [1, 2], 3, [4, 5, 6])
    ids = torch.tensor([row])
    codes = torch.randint(0, 16, (1, 8, 3))
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = ids[0, -3:]
    output = model(input_ids=ids, audio_codes=codes, labels=labels)
    logits = output.logits[0, -4:-1].log_softmax(-1)
    expected = -logits[torch.arange(3), ids[0, -3:]].mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    output.loss.backward()
    assert model.model.audio_embed_layers[7].weight.grad.abs().sum() > 0
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.audio_tokenizer.parameters())


@torch.no_grad()
def test_cached_steps_equal_one_pass(original_model):
    ids, features = golden()["llm.prompt"], golden()["features.1.0"][None]
    whole = original_model(input_ids=ids, input_features=features).logits
    first = original_model(input_ids=ids[:, :25], input_features=features, use_cache=True)
    rest = original_model(input_ids=ids[:, 25:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 25:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_decode_audio(converted_model):
    clips = [golden()[f"codes.{clip}"].T for clip in ("0.0", "1.0", "2.1")]
    together = converted_model.decode_audio(clips, seed=[1, 2, 3])
    padded = nn.utils.rnn.pad_sequence([clip.T for clip in clips], batch_first=True, padding_value=-1).transpose(1, 2)
    from_tensor = converted_model.decode_audio(padded, seed=[1, 2, 3], batch_size=2)
    for row, clip in enumerate(clips):
        alone = converted_model.decode_audio(clip[None], seed=row + 1)[0]
        assert alone.dtype == torch.float32 and alone.shape == ((4 * clip.shape[1] - 1) * 480,)
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(from_tensor[row], alone, atol=1e-5, rtol=0)


def test_waveforms_need_a_vocoder(original_model):
    codes = golden()["codes.0.0"].T[None]
    with pytest.raises(ValueError, match="--hift hift.pt"):
        original_model.decode_audio(codes)
    with pytest.raises(ValueError, match="--hift hift.pt"):
        original_model.generate(torch.tensor([[1, 2]]), generation_mode="audio")


@torch.no_grad()
def test_eager_attention_gives_the_same(original_folder, original_model):
    eager = BaichuanAudioForCausalLM.from_pretrained(original_folder, attn_implementation="eager")
    assert eager.flow_matching.config._attn_implementation == "eager"
    assert original_model.flow_matching.config._attn_implementation == "sdpa"
    ids, features = golden()["llm.prompt"], golden()["features.1.0"][None]
    results = []
    for model in (eager, original_model):
        output = model(input_ids=ids, input_features=features, output_audio_logits=True)
        decoded = model.audio_tokenizer.decode(golden()["codes.2.0"].T[None])
        flow = model.flow_matching(decoded.hidden_states, seed=0)
        results.append(
            [output.logits, *output.audio_logits, decoded.hidden_states, decoded.refined_mel, flow.condition, flow.mel]
        )
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_any_language_model_can_be_the_backbone():
    settings = {
        "model_type": "llama",
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = BaichuanAudioForCausalLM(tiny_config(text_config=settings)).eval()
    assert type(model.model.language_model).__name__ == "LlamaModel"
    result = model.generate(torch.tensor([[1, 2, 3]]), generation_mode="audio", max_new_tokens=12, max_text_tokens=3, seed=0)
    assert result.audio_codes.shape[2] > 0 and result.audio[0].isfinite().all()
