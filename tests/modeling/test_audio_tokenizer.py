import pytest
import torch
from helpers.golden import clip_keys, golden
from torch import nn

from modeling_baichuan_audio.modeling_common import MaskedGroupNorm, frame_lengths
from modeling_baichuan_audio.modeling_rvq import ResidualVectorQuantizer


@pytest.fixture
def tokenizer(original_model):
    return original_model.audio_tokenizer


def padded_codes(clips: list[str]) -> torch.Tensor:
    codes = [golden()[f"codes.{clip}"] for clip in clips]
    return nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1).transpose(1, 2)


@torch.no_grad()
def test_encoder_clip_alone_equals_clip_in_a_batch(tokenizer):
    features = [golden()[f"features.{clip}"] for clip in clip_keys()]
    lengths = torch.tensor([mel.shape[1] for mel in features])
    padded = nn.utils.rnn.pad_sequence([mel.T for mel in features], batch_first=True, padding_value=7.0).transpose(1, 2)
    together = tokenizer.encode(padded, torch.arange(padded.shape[2]) < lengths[:, None])
    for row, mel in enumerate(features):
        alone = tokenizer.encode(mel[None])
        frames, steps = alone.audio_codes.shape[2], alone.last_hidden_state.shape[1]
        torch.testing.assert_close(together.last_hidden_state[row, :steps], alone.last_hidden_state[0], atol=1e-5, rtol=0)
        assert not together.last_hidden_state[row, steps:].any()
        assert torch.equal(together.audio_codes[row, :, :frames], alone.audio_codes[0])
        assert (together.audio_codes[row, :, frames:] == -1).all()
        assert together.audio_codes_mask[row].sum() == frames


@torch.no_grad()
def test_mel_decoder_clip_alone_equals_clip_in_a_batch(tokenizer):
    together = tokenizer.decode(padded_codes(clip_keys()))
    for row, clip in enumerate(clip_keys()):
        alone = tokenizer.decode(golden()[f"codes.{clip}"].T[None])
        for name, lengths in (("hidden_states", "hidden_lengths"), ("coarse_mel", "mel_lengths"), ("refined_mel", "mel_lengths")):
            length = int(alone[lengths][0])
            assert int(together[lengths][row]) == length
            torch.testing.assert_close(together[name][row, :length], alone[name][0], atol=1e-5, rtol=0)
            assert not together[name][row, length:].any()


@torch.no_grad()
def test_whole_tokenizer(tokenizer):
    features = golden()["features.1.0"][None]
    output = tokenizer(features)
    decoded = tokenizer.decode(output.audio_codes)
    assert torch.equal(output.refined_mel, decoded.refined_mel)
    assert torch.equal(output.audio_codes[0].T, golden()["codes.1.0"])


def test_codebooks_are_used_in_order(tokenizer):
    codes = golden()["codes.1.0"].T[None]
    with torch.no_grad():
        one, all_of_them = tokenizer.decode(codes, num_codebooks=1), tokenizer.decode(codes, num_codebooks=8)
        changed = codes.clone()
        changed[:, 1:] = (changed[:, 1:] + 1) % 8
        other = tokenizer.decode(changed, num_codebooks=1)
    assert torch.equal(one.refined_mel, other.refined_mel)
    assert not torch.equal(one.refined_mel, all_of_them.refined_mel)
    assert torch.equal(all_of_them.refined_mel, tokenizer.decode(codes).refined_mel.detach())


def test_quantiser_finds_the_nearest_entries():
    torch.manual_seed(0)
    quantizer = ResidualVectorQuantizer([11, 7, 5], 6)
    for codebook in quantizer.codebooks:
        codebook.embed.normal_()
    vectors = torch.randn(2, 9, 6)
    codes = quantizer.encode(vectors)
    residual = vectors.double()
    for codebook, chosen in zip(quantizer.codebooks, codes.unbind(1)):
        distances = torch.cdist(residual.reshape(-1, 6), codebook.embed.double())
        assert torch.equal(distances.argmin(-1).reshape(2, 9), chosen)
        residual = residual - codebook.embed.double()[chosen]
    torch.testing.assert_close(quantizer.decode(codes).double(), vectors.double() - residual, atol=1e-5, rtol=0)


def test_codebooks_stay_in_float32(original_folder):
    from modeling_baichuan_audio import BaichuanAudioTokenizerModel

    model = BaichuanAudioTokenizerModel.from_pretrained(original_folder, dtype=torch.bfloat16)
    assert model.encoder.conv1.weight.dtype == torch.bfloat16
    assert all(book.embed.dtype == torch.float32 for book in model.quantizer.codebooks)


def test_masked_group_norm_is_group_norm_of_the_clip_alone():
    torch.manual_seed(0)
    reference, ours = nn.GroupNorm(1, 5), MaskedGroupNorm(5)
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    ours.load_state_dict(reference.state_dict())
    states, lengths = torch.randn(3, 5, 8), torch.tensor([8, 3, 1])
    mask = (torch.arange(8) < lengths[:, None])[:, None]
    normed = ours(states, mask)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(normed[row, :, :length], reference(states[row : row + 1, :, :length])[0], atol=1e-5, rtol=0)
        assert not normed[row, :, length:].any()


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(128, 50), None, "must be"),
        (torch.zeros(1, 80, 50), None, "must be"),
        (torch.zeros(1, 128, 401), None, "400 at most"),
        (torch.zeros(1, 128, 50), torch.ones(1, 49), "input_features_mask"),
    ],
)
def test_bad_features_are_refused(tokenizer, features, mask, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(features, mask)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, 5, dtype=torch.long), "must be integers of shape"),
        (torch.zeros(1, 7, 5, dtype=torch.long), "must be integers of shape"),
        (torch.zeros(1, 8, 5), "must be integers of shape"),
        (torch.full((1, 8, 5), 8), "reach"),
        (torch.full((1, 8, 5), -2), "reach"),
        (torch.zeros(1, 8, 0, dtype=torch.long), "1 to 100 frames"),
        (torch.full((1, 8, 5), -1), "1 to 100 frames"),
        (torch.zeros(1, 8, 101, dtype=torch.long), "1 to 100 frames"),
    ],
)
def test_bad_codes_are_refused(tokenizer, codes, message):
    if "reach" in message:
        codes = codes.clone()
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(codes)


def test_padding_inside_a_clip_is_refused():
    codes = torch.zeros(1, 8, 5, dtype=torch.long)
    codes[..., 2] = -1
    with pytest.raises(ValueError, match="only at the end"):
        frame_lengths(codes)
    codes = torch.zeros(1, 8, 5, dtype=torch.long)
    codes[0, 3, 4] = -1
    with pytest.raises(ValueError, match="all codebooks at once"):
        frame_lengths(codes)


@pytest.mark.parametrize("number", [0, 9])
def test_bad_number_of_codebooks_is_refused(tokenizer, number):
    with pytest.raises(ValueError, match="1 to 8"):
        tokenizer.decode(golden()["codes.0.0"].T[None], num_codebooks=number)
