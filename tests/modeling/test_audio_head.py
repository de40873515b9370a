import pytest
import torch
from helpers.golden import golden


@torch.no_grad()
def test_frame_by_frame_equals_all_positions_at_once(original_model):
    """The cheap loop with a key/value cache against teacher forcing with the codes it chose."""
    head, tables = original_model.audio_head, original_model.model.audio_embed_layers
    hidden, seen = golden()["audio_head.hidden"], []

    def sample_code(codebook, logits):
        seen.append(logits)
        return logits.argmax(-1)

    codes = head.generate_frame(hidden, lambda codebook, chosen: tables[codebook](chosen), sample_code)
    embedded = torch.stack([table(codes[:, i]) for i, table in enumerate(tables)][:-1], dim=1)
    for codebook, (logits, reference) in enumerate(zip(seen, head(hidden, embedded))):
        assert logits.shape[1] == reference.shape[1] - (codebook > 0)  # only the first may end the audio
        torch.testing.assert_close(logits, reference[:, : logits.shape[1]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_position_runs_once_and_reads_its_own_weights(original_model):
    head, tables = original_model.audio_head, original_model.model.audio_embed_layers
    calls = []
    hooks = [
        mlp.register_forward_hook(lambda module, args, output, key=(number, position): calls.append((*key, args[0].shape[0])))
        for number, layer in enumerate(head.layers)
        for position, mlp in enumerate(layer.mlps)
    ]
    queries = []
    hooks += [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(args[0].shape[1]))
        for layer in head.layers
    ]
    try:
        head.generate_frame(
            golden()["audio_head.hidden"], lambda codebook, chosen: tables[codebook](chosen), lambda _, logits: logits.argmax(-1)
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == [(number, position, 5) for position in range(8) for number in range(len(head.layers))]
    assert queries == [1] * 8 * len(head.layers)


@torch.no_grad()
def test_rows_do_not_influence_one_another(original_model):
    head, tables = original_model.audio_head, original_model.model.audio_embed_layers
    hidden = golden()["audio_head.hidden"]

    def frame(rows):
        return head.generate_frame(rows, lambda codebook, chosen: tables[codebook](chosen), lambda _, logits: logits.argmax(-1))

    together = frame(hidden)
    for row in range(len(hidden)):
        assert torch.equal(frame(hidden[row : row + 1])[0], together[row])


@pytest.mark.parametrize("later", range(1, 8))
@torch.no_grad()
def test_later_codes_do_not_change_earlier_logits(original_model, later):
    head, tables = original_model.audio_head, original_model.model.audio_embed_layers
    frames = golden()["audio_head.frames"].clone()

    def logits():
        embedded = torch.stack([table(frames[:, i]) for i, table in enumerate(tables)][:-1], dim=1)
        return head(golden()["audio_head.hidden"], embedded)

    before = logits()
    frames[:, later - 1] = (frames[:, later - 1] + 1) % 8
    after = logits()
    for codebook in range(8):
        assert torch.equal(before[codebook], after[codebook]) == (codebook < later)
