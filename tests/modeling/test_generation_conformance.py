"""What transformers' generation tests check of every model, which are not distributed: text generation in all its forms.

Spoken replies and what is special about our prompts are in test_generation.py.
"""

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
    set_seed,
)

from modeling_baichuan_audio.conversion import tiny_model


GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 8, "pad_token_id": 256}
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def prompt(model):
    """Two rows of text and speech, as token ids and the codes of their audio tokens."""
    config = model.config
    speech = [config.audio_start_token_id, *[config.audio_pad_token_id] * 4, config.audio_end_token_id]
    ids = torch.tensor([[11, 12, *speech, 13, 14], [21, *speech, 22, 23, 24]])
    codes = torch.stack([torch.arange(32).reshape(8, 4) % 16, torch.arange(32).flip(0).reshape(8, 4) % 16])
    return {"input_ids": ids, "audio_codes": codes}


def padded(prompt: dict, width: int = 3) -> dict:
    ids = torch.cat([prompt["input_ids"].new_full((2, width), 256), prompt["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :width] = 0
    return {"input_ids": ids, "attention_mask": mask, "audio_codes": prompt["audio_codes"]}


@torch.no_grad()
def argmax_loop(model, prompt: dict, steps: int) -> torch.Tensor:
    """Greedy search in a few lines: the whole sequence every time, no cache, multimodal tokens left out."""
    ids = prompt["input_ids"]
    for _ in range(steps):
        logits = model(input_ids=ids, audio_codes=prompt["audio_codes"], use_cache=False).logits[:, -1]
        logits[:, model.config.special_token_ids] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def close_scores(ours, reference, skip: int = 0) -> None:
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference):
        torch.testing.assert_close(one[skip:], other[skip:], atol=1e-4, rtol=1e-4)


# --- greedy search and caches --------------------------------------------------------------------------------------------------


def test_greedy_search_is_an_argmax_loop(model, prompt):
    assert torch.equal(model.generate(**prompt, **GREEDY), argmax_loop(model, prompt, 8))


def test_padding_on_the_left_changes_nothing(model, prompt):
    plain, shifted = (model.generate(**inputs, **GREEDY, **DETAILS) for inputs in (prompt, padded(prompt)))
    assert torch.equal(plain.sequences, shifted.sequences[:, 3:])
    close_scores(shifted.scores, plain.scores)


@pytest.mark.parametrize(
    "kwargs", [{"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}]
)
def test_every_cache_gives_the_same(model, prompt, kwargs):
    reference = model.generate(**padded(prompt), **GREEDY, **DETAILS)
    other = model.generate(**padded(prompt), **GREEDY, **DETAILS, **kwargs)
    assert torch.equal(reference.sequences, other.sequences)
    close_scores(other.scores, reference.scores)
    if kwargs.get("cache_implementation") == "static":
        assert isinstance(other.past_key_values, StaticCache)


def test_a_cache_of_ones_own(model, prompt):
    cache = DynamicCache(config=model.config.get_text_config())
    result = model.generate(**prompt, **GREEDY, **DETAILS, past_key_values=cache)
    assert result.past_key_values is cache
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 7
    assert torch.equal(result.sequences, model.generate(**prompt, **GREEDY))


def test_goes_on_from_the_cache_it_returned(model, prompt):
    whole = model.generate(**prompt, **GREEDY)
    first = model.generate(**prompt, **(GREEDY | {"max_new_tokens": 3}), **DETAILS)
    inputs = {"input_ids": first.sequences, "audio_codes": prompt["audio_codes"]}
    rest = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 5}), past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


def test_prefill_in_chunks(model, prompt):
    """Of text. Chunks of prompts with audio would take wrong frames, so they are refused."""
    text = {"input_ids": torch.arange(11, 31).reshape(2, 10)}
    assert torch.equal(model.generate(**text, **GREEDY, prefill_chunk_size=4), model.generate(**text, **GREEDY))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**prompt, **GREEDY, prefill_chunk_size=4)


def test_embeddings_instead_of_ids(model, prompt):
    """Only the new tokens come back, as there are no ids to put before them."""
    ids = prompt["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().clone()
    frames = prompt["audio_codes"].transpose(1, 2).reshape(-1, 8)
    embeddings[ids == model.config.audio_pad_token_id] = model.model.embed_codes(frames).detach()
    new = model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(new, model.generate(**prompt, **GREEDY)[:, ids.shape[1] :])


# --- what comes back -----------------------------------------------------------------------------------------------------------


def test_scores_logits_and_hidden_states(model, prompt):
    rows, length = prompt["input_ids"].shape
    result = model.generate(**prompt, **GREEDY, **DETAILS, output_hidden_states=True)
    vocabulary = model.config.text_config.vocab_size
    for tensors in (result.scores, result.logits):
        assert [tuple(step.shape) for step in tensors] == [(rows, vocabulary)] * 8
    assert torch.equal(torch.stack(result.scores, 1).argmax(-1), result.sequences[:, length:])
    assert torch.stack(result.scores, 1)[..., model.config.special_token_ids].isinf().all()
    assert torch.stack(result.logits, 1).isfinite().all()
    layers, hidden_size = model.config.text_config.num_hidden_layers, model.config.text_config.hidden_size
    assert [len(step) for step in result.hidden_states] == [layers + 1] * 8
    for index, step in enumerate(result.hidden_states):
        assert {tuple(states.shape) for states in step} == {(rows, 1 if index else length, hidden_size)}


def test_attentions(prompt):
    model = tiny_model(seed=3)
    model.set_attn_implementation("eager")
    result = model.generate(**prompt, **GREEDY, **DETAILS, output_attentions=True)
    rows, length = prompt["input_ids"].shape
    heads = model.config.text_config.num_attention_heads
    for index, step in enumerate(result.attentions):
        assert {tuple(weights.shape) for weights in step} == {(rows, heads, 1 if index else length, length + index)}


def test_probabilities_of_the_tokens(model, prompt):
    result = model.generate(**prompt, **GREEDY, **DETAILS)
    scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
    new = result.sequences[:, -8:]
    expected = torch.stack(result.scores, 1).log_softmax(-1).gather(2, new[..., None])[..., 0]
    torch.testing.assert_close(scores, expected)


# --- when it ends --------------------------------------------------------------------------------------------------------------


def test_lengths(model, prompt):
    length = prompt["input_ids"].shape[1]
    settings = {key: value for key, value in GREEDY.items() if key != "max_new_tokens"}
    assert model.generate(**prompt, **settings, max_new_tokens=1).shape[1] == length + 1
    config = GenerationConfig(**settings, max_length=length + 5)
    assert model.generate(**prompt, generation_config=config, max_new_tokens=None).shape[1] == length + 5
    eos = int(model.generate(**prompt, **GREEDY)[0, length])
    longer = model.generate(**prompt, **GREEDY, eos_token_id=eos, min_new_tokens=4)
    assert longer.shape[1] >= length + 4 and eos not in longer[0, length : length + 4].tolist()


def test_rows_end_at_their_end_of_text_and_are_padded(model, prompt):
    length, free = prompt["input_ids"].shape[1], model.generate(**prompt, **GREEDY)
    first, second = free[0, length + 2], free[1, length + 4]
    ends = [int(first), int(second)]
    stopped = model.generate(**prompt, **GREEDY, eos_token_id=ends)
    for row, reference in zip(stopped, free):
        new, expected = row[length:].tolist(), reference[length:].tolist()
        end = next((index for index, token in enumerate(expected) if token in ends), len(expected) - 1)
        assert new[: end + 1] == expected[: end + 1]
        assert set(new[end + 1 :]) <= {256}


class AfterThree(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length + 3)


def test_stopping_criteria(model, prompt):
    length = prompt["input_ids"].shape[1]
    stopped = model.generate(**prompt, **GREEDY, stopping_criteria=[AfterThree(length)])
    assert torch.equal(stopped, model.generate(**prompt, **GREEDY)[:, : length + 3])
    replies = model.generate(
        prompt["input_ids"],
        audio_codes=prompt["audio_codes"],
        generation_mode="audio",
        output_audio=False,
        seed=0,
        max_new_tokens=20,
        stopping_criteria=[AfterThree(length)],
    )
    assert replies.sequences.shape[1] == length + 3


def test_stop_strings(model, prompt, processor):
    length, free = prompt["input_ids"].shape[1], model.generate(**prompt, **GREEDY)
    plain = [index for index, token in enumerate(free[0, length:].tolist()) if token < 128]
    if not plain:
        pytest.skip("this random model wrote no character that is a byte of its own")
    text = processor.tokenizer.decode(free[0, length + plain[0]])
    stopped = model.generate(
        prompt["input_ids"][:1],
        audio_codes=prompt["audio_codes"][:1],
        stop_strings=[text],
        tokenizer=processor.tokenizer,
        **GREEDY,
    )
    assert stopped.shape[1] == length + plain[0] + 1


def test_no_time_left(model, prompt):
    assert (
        model.generate(**prompt, **(GREEDY | {"max_new_tokens": 500}), max_time=0.0).shape[1] == prompt["input_ids"].shape[1] + 1
    )


# --- processors, sampling, beams -----------------------------------------------------------------------------------------------


class Only(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.token] = 0.0
        return kept


def test_logits_processors(model, prompt):
    forced = model.generate(**prompt, **GREEDY, logits_processor=LogitsProcessorList([Only(77)]))
    assert (forced[:, -8:] == 77).all()
    greedy = model.generate(**prompt, **GREEDY)
    banned = sorted(set(greedy[:, -8:].flatten().tolist()))
    other = model.generate(**prompt, **GREEDY, bad_words_ids=[[token] for token in banned])
    assert not set(other[:, -8:].flatten().tolist()) & set(banned)
    assert not set(model.generate(**prompt, **GREEDY, suppress_tokens=banned)[:, -8:].flatten().tolist()) & set(banned)
    unlike = model.generate(**prompt, **GREEDY, no_repeat_ngram_size=1)
    assert all(len(set(row.tolist())) == 8 for row in unlike[:, -8:])


def test_sampling_follows_the_seed(model, prompt):
    settings = {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 256}
    draws = []
    for seed in (0, 0, 1):
        set_seed(seed)
        draws.append(model.generate(**prompt, **settings))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    set_seed(0)
    many = model.generate(**prompt, **settings, num_return_sequences=3, **DETAILS)
    assert many.sequences.shape[0] == 6
    assert torch.equal(many.sequences[:3, : prompt["input_ids"].shape[1]], prompt["input_ids"][:1].expand(3, -1))
    near_greedy = model.generate(**prompt, **settings, top_k=1, repetition_penalty=1.0)
    assert torch.equal(near_greedy, model.generate(**prompt, **GREEDY))


@torch.no_grad()
def test_beam_search_finds_what_it_says(model, prompt):
    """The score of a beam is the mean log-probability of its tokens, and the best beam is no worse than greedy search."""
    settings = GREEDY | {"max_new_tokens": 3, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 1.0}
    beams = model.generate(**prompt, **settings, **DETAILS)
    length = prompt["input_ids"].shape[1]
    assert beams.sequences.shape == (8, length + 3)
    codes = prompt["audio_codes"].repeat_interleave(4, dim=0)

    def score(sequences, audio_codes):
        logits = model(input_ids=sequences, audio_codes=audio_codes).logits[:, length - 1 : -1]
        return logits.log_softmax(-1).gather(2, sequences[:, length:, None])[..., 0].mean(-1)

    torch.testing.assert_close(beams.sequences_scores, score(beams.sequences, codes), atol=1e-4, rtol=1e-4)
    greedy = model.generate(**prompt, **(GREEDY | {"max_new_tokens": 3}))
    assert (beams.sequences_scores[::4] >= score(greedy, prompt["audio_codes"]) - 1e-5).all()
    assert (beams.sequences_scores.view(2, 4).diff(dim=1) <= 1e-6).all()
    set_seed(0)
    assert model.generate(**prompt, **(settings | {"do_sample": True})).shape == (8, length + 3)


@pytest.mark.parametrize("beams", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams_of_spoken_replies_are_refused(model, prompt, beams):
    with pytest.raises(ValueError, match="beams of different modes cannot be compared"):
        model.generate(**prompt, generation_mode="audio", output_audio=False, max_new_tokens=4, **beams)


def test_guesses_of_a_smaller_model_and_of_the_prompt(model, prompt):
    """Assisted decoding and prompt lookup feed several tokens at once and must not change the result."""
    one = {"input_ids": prompt["input_ids"][:1], "audio_codes": prompt["audio_codes"][:1]}
    reference = model.generate(**one, **GREEDY)
    assert torch.equal(model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2), reference)
    text = {"input_ids": torch.tensor([[11, 12, 13]])}
    assert torch.equal(model.generate(**text, **GREEDY, assistant_model=tiny_model(seed=4)), model.generate(**text, **GREEDY))


def test_text_streams(model, prompt, processor, capsys):
    one = {"input_ids": prompt["input_ids"][:1], "audio_codes": prompt["audio_codes"][:1]}
    sequence = model.generate(**one, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    assert printed.strip() == processor.tokenizer.decode(sequence[0, prompt["input_ids"].shape[1] :]).strip()


def test_half_precision(prompt):
    model = tiny_model(seed=3).bfloat16()
    result = model.generate(**prompt, **GREEDY, **DETAILS)
    assert all(logits.isfinite().all() for logits in result.logits)


def test_a_model_without_text_generation_says_so(model):
    assert type(model).can_generate() and not type(model.model).can_generate()
