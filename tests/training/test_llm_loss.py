"""Losses of the LLM with its audio head, against re-computations with explicit indices."""

import pytest
import torch

from modeling_baichuan_audio import BaichuanAudioForCausalLM
from modeling_baichuan_audio.conversion import tiny_config, tiny_model


SIZES = [64, 32, 16, 16, 16, 16, 16, 16]


def make_row(model, text: list[int], frames: int, more: list[int], seed: int):
    """text, generated audio, text: everything but the first text is learnt."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (frames,), generator=generator) for size in SIZES])
    start, pad, end = config.audiogen_start_token_id, config.audio_pad_token_id, config.audiogen_end_token_id
    ids = torch.tensor([*text, start, *[pad] * frames, end, *more])
    labels = torch.full_like(ids, -100)
    labels[len(text)] = start
    labels[len(ids) - len(more) :] = torch.tensor(more)
    audio_labels = torch.full((8, len(ids)), -100)
    first = len(text) + 1
    audio_labels[:, first : first + frames] = codes
    audio_labels[0, first + frames] = SIZES[0]
    return {"input_ids": ids, "labels": labels, "audio_labels": audio_labels, "audio_codes": codes}


def collate(rows):
    longest, frames = max(len(row["input_ids"]) for row in rows), max(row["audio_codes"].shape[1] for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), -100),
        "audio_labels": torch.full((len(rows), 8, longest), -100),
        "audio_codes": torch.full((len(rows), 8, frames), -1),
    }
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][index, :length] = row["input_ids"]
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, :length] = row["labels"]
        batch["audio_labels"][index, :, :length] = row["audio_labels"]
        batch["audio_codes"][index, :, : row["audio_codes"].shape[1]] = row["audio_codes"]
    return batch


@pytest.fixture
def rows(shared_tiny_model):
    return [
        make_row(shared_tiny_model, [1, 2, 3], 5, [4, 5], seed=0),
        make_row(shared_tiny_model, [7], 2, [8, 9, 10, 11], seed=1),
    ]


@torch.no_grad()
def test_losses_by_hand(shared_tiny_model, rows):
    model, row = shared_tiny_model, rows[0]
    output = model(**collate([row]))
    text = []
    for place in (row["labels"] != -100).nonzero()[:, 0].tolist():
        text.append(-output.logits[0, place - 1].log_softmax(-1)[row["labels"][place]])
    torch.testing.assert_close(output.text_loss, torch.stack(text).mean(), atol=1e-5, rtol=0)

    tables, per_codebook = model.model.audio_embed_layers, [[] for _ in SIZES]
    for place in range(4, 10):  # five frames, then the end of audio
        target = row["audio_labels"][:, place]
        embedded = torch.stack([table.weight[max(int(code), 0)] for table, code in zip(tables, target)][:-1])
        logits = model.audio_head(output.last_hidden_state[0, place - 1][None], embedded[None])
        for codebook, code in enumerate(target.tolist()):
            if code != -100:
                per_codebook[codebook].append(-logits[codebook][0].log_softmax(-1)[code])
    assert [len(values) for values in per_codebook] == [6, 5, 5, 5, 5, 5, 5, 5]
    means = torch.stack([torch.stack(values).mean() for values in per_codebook])
    torch.testing.assert_close(output.codebook_losses, means, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.audio_loss, means.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, output.text_loss + output.audio_loss, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_second_codebook_is_predicted_from_the_first(shared_tiny_model, rows):
    """Teacher forcing feeds the target's own earlier codes: changing the first code changes the second's loss, not its own input."""
    batch = collate([rows[0]])
    before = shared_tiny_model(**batch).codebook_losses
    batch["audio_labels"][0, 0, 4] = (batch["audio_labels"][0, 0, 4] + 1) % 64
    after = shared_tiny_model(**batch).codebook_losses
    assert not torch.isclose(before, after)[:2].any()
    batch = collate([rows[0]])
    batch["audio_labels"][0, 7, 4] = (batch["audio_labels"][0, 7, 4] + 1) % 16
    last = shared_tiny_model(**batch).codebook_losses
    assert torch.equal(before[:7], last[:7]) and before[7] != last[7]


@torch.no_grad()
def test_codebook_and_audio_weights():
    weights = [4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    plain = tiny_model()
    weighted = tiny_model(config=tiny_config(codebook_loss_weights=weights, audio_loss_weight=0.5))
    weighted.load_state_dict(plain.state_dict())
    batch = collate([make_row(plain, [1, 2], 4, [3], seed=2)])
    first, second = plain(**batch), weighted(**batch)
    expected = (first.codebook_losses * torch.tensor(weights)).sum() / sum(weights)
    torch.testing.assert_close(second.audio_loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(second.loss, first.text_loss + 0.5 * expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_and_other_rows_do_not_change_a_rows_losses(shared_tiny_model, rows):
    model = shared_tiny_model
    together = model(**collate(rows))
    alone = [model(**collate([row])) for row in rows]
    counts = torch.stack([(row["audio_labels"] != -100).sum(1) for row in rows])
    sums = sum(output.codebook_losses * count for output, count in zip(alone, counts))
    torch.testing.assert_close(together.codebook_losses, sums / counts.sum(0), atol=1e-5, rtol=0)
    text = torch.tensor([(row["labels"] != -100).sum() for row in rows])
    expected = sum(output.text_loss * count for output, count in zip(alone, text)) / text.sum()
    torch.testing.assert_close(together.text_loss, expected, atol=1e-5, rtol=0)


def test_gradient_accumulation_equals_the_whole_batch(rows):
    gradients = []
    for split in (False, True):
        model = tiny_model()
        batches = [collate([row]) for row in rows] if split else [collate(rows)]
        whole = collate(rows)
        counts = {
            "num_items_in_batch": (whole["labels"] != -100).sum(),
            "num_audio_items_in_batch": (whole["audio_labels"] != -100).sum((0, 2)),
        }
        for batch in batches:
            model(**batch, **counts).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_frames_can_be_sampled_to_save_memory(rows):
    model = tiny_model().train()
    batch = collate(rows)
    seen = []
    hook = model.audio_head.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    torch.manual_seed(0)
    exact = model(**batch).audio_loss
    estimates = torch.stack([model(**batch, audio_loss_frames=3).audio_loss for _ in range(300)])
    assert seen[0] == 9 and set(seen[1:]) == {3}
    # With the counts of the window, a sampled sum stands for all frames: unbiased.
    counts = (batch["audio_labels"] != -100).sum((0, 2))
    scaled = torch.stack([model(**batch, audio_loss_frames=3, num_audio_items_in_batch=counts).audio_loss for _ in range(300)])
    hook.remove()
    assert float(estimates.detach().std()) > 0
    scaled, exact = scaled.detach(), exact.detach()
    assert abs(float(scaled.mean() - exact)) < 4 * float(scaled.std()) / 300**0.5
    assert torch.equal(model.eval()(**batch, audio_loss_frames=3).audio_loss, model(**batch).audio_loss), "evaluation uses all"


def test_batches_without_targets_have_zero_loss_and_touch_every_parameter():
    model = tiny_model().train()
    ids = torch.tensor([[1, 2, 3]])
    ignored = {"labels": torch.full_like(ids, -100), "audio_labels": torch.full((1, 8, 3), -100)}
    output = model(input_ids=ids, **ignored)
    assert float(output.loss.detach()) == 0
    output.loss.backward()
    for part in (model.audio_head, model.model.audio_embed_layers):
        missing = [name for name, p in part.named_parameters() if p.grad is None]
        assert not missing
        assert all(not p.grad.any() for p in part.parameters())


def test_packed_labels_never_cross_into_the_first_token(shared_tiny_model):
    """What stands at position 0 cannot be predicted: it is left out of both losses."""
    batch = collate([make_row(shared_tiny_model, [1], 3, [2], seed=3)])
    reference = shared_tiny_model(**batch)
    batch["labels"][0, 0], batch["audio_labels"][0, :, 0] = 5, 3
    changed = shared_tiny_model(**batch)
    assert torch.equal(reference.text_loss, changed.text_loss) and torch.equal(reference.audio_loss, changed.audio_loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_labels": torch.zeros(1, 7, 3, dtype=torch.long)}, "`audio_labels` must be"),
        ({"audio_labels": torch.zeros(1, 8, 4, dtype=torch.long)}, "`audio_labels` must be"),
        ({"audio_labels": torch.zeros(1, 8, 3, dtype=torch.long), "audio_loss_frames": 0}, "at least 1"),
    ],
)
def test_bad_labels_are_refused(shared_tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        shared_tiny_model(input_ids=torch.tensor([[1, 2, 3]]), **change)


@pytest.mark.parametrize("weights", [[1.0] * 7, [-1.0] + [1.0] * 7, [0.0] * 8])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="codebook_loss_weights"):
        tiny_config(codebook_loss_weights=weights)


def test_loss_without_audio_labels_is_the_text_loss(shared_tiny_model, rows):
    batch = collate(rows)
    batch.pop("audio_labels")
    output = BaichuanAudioForCausalLM.forward(shared_tiny_model, **batch)
    assert output.audio_loss is None and torch.equal(output.loss, output.text_loss)


def test_activation_checkpointing_changes_no_gradient(rows):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            enable = (
                getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            )  # the older name
            enable({"use_reentrant": False})
            assert (
                model.model.language_model.layers[0].gradient_checkpointing and model.audio_head.layers[0].gradient_checkpointing
            )
        model(**collate(rows)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)
