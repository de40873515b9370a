"""The frame step without the host: a cache of fixed size, one graph for the LLM's step and one for the audio head's eight positions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from modeling_baichuan_audio.generation_reply import ReplyRow, ReplySampler, Stopwatch
from modeling_baichuan_audio.generation_sampling import SamplingColumns, SamplingSettings, choose_tokens, sample_frame


@pytest.fixture
def speak(shared_tiny_model):
    """A reply in audio from the first step, two rows of which one is padded."""
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = shared_tiny_model.config.audiogen_start_token_id
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def run(**options):
        defaults = {"generation_mode": "audio", "output_audio": False, "seed": [1, 2], "max_new_tokens": 26}
        # A special token that text may not use: no reply ends before its length.
        limits = {"max_audio_frames": 9, "max_text_tokens": 3, "eos_token_id": shared_tiny_model.config.audio_start_token_id}
        return shared_tiny_model.generate(ids, attention_mask=mask, **{**defaults, **limits, **options})

    return run


@pytest.fixture
def graphs():
    """Compiles in one graph without optimising, and counts the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    config = CompileConfig(fullgraph=True, backend=counter, mode=None)
    config._compile_all_devices = True
    yield config, counter
    torch._dynamo.reset()


def assert_same_reply(reply, expected):
    assert torch.equal(reply.sequences, expected.sequences)
    assert torch.equal(reply.audio_codes, expected.audio_codes)


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_static_cache_gives_the_same_reply(speak, do_sample):
    reply = speak(do_sample=do_sample)
    assert sum(part["type"] == "audio" for part in reply.segments[0]) > 1  # text and audio in turn
    assert_same_reply(speak(do_sample=do_sample, cache_implementation="static"), reply)


def test_graphs_give_the_same_reply_and_survive_other_settings(speak, graphs):
    config, counter = graphs
    compiled = {"cache_implementation": "static", "compile_config": config}
    assert_same_reply(speak(**compiled), speak())
    made = counter.frame_count
    assert made >= 2
    for settings in (
        {"seed": [5, 6]},
        {"audio_temperature": 0.9, "audio_top_p": 0.5, "audio_repetition_penalty": 1.7},
        {"audio_top_k": 7},  # within the power of two that holds five
    ):
        assert_same_reply(speak(**compiled, **settings), speak(**settings))
    assert counter.frame_count == made
    speak(**compiled, audio_top_k=50)
    assert made < counter.frame_count <= made + 2  # more candidates: another graph of the head, and one for any number of them


def test_results_that_the_next_graph_overwrites_are_not_read_again(speak, graphs, monkeypatch):
    """On a GPU the graphs share memory: whatever one of them returned is lost once another one runs."""
    returned: list[torch.Tensor] = []

    def as_a_graph(function, *_):
        def run(*inputs):
            for result in returned:
                result.fill_(torch.nan if result.is_floating_point() else 0)
            returned[:] = [function(*inputs)]
            return returned[0]

        return run

    expected = speak()
    monkeypatch.setattr("modeling_baichuan_audio.generation_sampling._compiled", as_a_graph)
    assert_same_reply(speak(cache_implementation="static", compile_config=graphs[0]), expected)
    assert returned


def test_eager_unless_asked_otherwise(speak, graphs):
    config, counter = graphs
    speak(compile_config=config)  # the growing cache is never compiled
    speak(cache_implementation="static", compile_config=config, disable_compile=True)
    assert counter.frame_count == 0


@torch.no_grad()
def test_no_text_head_on_audio_frames(shared_tiny_model, speak):
    rows = []
    hook = shared_tiny_model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    try:
        reply = speak(max_new_tokens=12, max_audio_frames=100)
    finally:
        hook.remove()
    frames = (reply.audio_codes >= 0).all(1).sum(1).tolist()
    texts = sum(reply.timings[row]["steps"] - frames[row] for row in range(2))
    assert sum(rows) <= texts < 12


@torch.no_grad()
def test_rows_in_audio_draw_alike_in_a_whole_and_in_a_partial_batch(shared_tiny_model):
    model, settings = shared_tiny_model, SamplingSettings(0.8, 5, 0.9, 1.4)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, model.config.text_config.hidden_size, generator=generator)
    tables = model.model.audio_embed_layers
    seen = torch.rand(3, sum(table.num_embeddings for table in tables), generator=generator) < 0.3
    uniforms = torch.rand(3, len(tables), generator=generator)
    whole = sample_frame(model.audio_head, tables, hidden, seen, SamplingColumns.of([settings] * 3), uniforms, True)
    part = sample_frame(model.audio_head, tables, hidden[1:], seen[1:], SamplingColumns.of([settings] * 2), uniforms[1:], True)
    assert torch.equal(part, whole[1:])


def test_spare_candidates_are_never_drawn():
    """Room for eight candidates with a top-k of five: the other three have no chance, whatever the draw."""
    columns = SamplingColumns.of([SamplingSettings(1.0, 5, 1.0, 1.0)] * 200)
    assert columns.candidates == 8
    logits, seen = torch.arange(20.0).mul(0.01).expand(200, -1), torch.zeros(200, 20, dtype=torch.bool)
    drawn = choose_tokens(logits, columns, seen, torch.linspace(0, 1 - 1e-7, 200), do_sample=True)
    assert set(drawn.tolist()) == set(range(15, 20))
    assert SamplingColumns.of([SamplingSettings(1.0, 0, 1.0, 1.0), SamplingSettings(1.0, 3, 1.0, 1.0)]).candidates is None


def test_draws_never_wait_for_the_host(shared_tiny_model, monkeypatch):
    """Nothing inside a frame reads a tensor's value: that would stop a GPU eight times a frame."""

    def forbidden(*_):
        raise AssertionError("the host read a value")

    model = shared_tiny_model
    tables = model.model.audio_embed_layers
    seen = torch.zeros(1, sum(table.num_embeddings for table in tables), dtype=torch.bool)
    columns = SamplingColumns.of([SamplingSettings(0.8, 5, 0.9, 1.4)])
    hidden, uniforms = torch.randn(1, model.config.text_config.hidden_size), torch.rand(1, len(tables))
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    with torch.no_grad():
        frame = sample_frame(model.audio_head, tables, hidden, seen, columns, uniforms, True)
    assert frame.shape == (1, len(tables))


def test_stopwatch_adds_up():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds() == 0.0
    for _ in range(2):
        with watch:
            torch.randn(10)
    first = watch.seconds()
    assert first > 0 and watch.seconds() == first


def test_the_history_of_codes_covers_every_codebook(shared_tiny_model):
    model = shared_tiny_model
    sampler = ReplySampler(model, [ReplyRow(None, in_audio=True)], {"audio": SamplingSettings(1.0, 0, 1.0, 1.0)}, False, [0])
    sampler.start(torch.tensor([[5]]), None, None)
    frames = sampler._sample_frames(torch.zeros(1, model.config.text_config.hidden_size), [0], torch.zeros(1, 9))
    starts = torch.tensor([0, *(size + 1 for size in sampler.sizes[:-1])]).cumsum(0)
    assert sampler.seen_codes[0].nonzero()[:, 0].tolist() == (starts + frames[0]).tolist()
