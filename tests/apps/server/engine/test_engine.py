"""The server's engine: rows that join, leave and share a batch get what they would get alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

import serving
from phatgoose.analysis.traces import trace
from phatgoose.apps.server.api.request_preparation import RequestPreparer
from phatgoose.apps.server.api.request_schema import ChatRequest, CompletionRequest
from phatgoose.apps.server.api_errors import ApiError
from phatgoose.apps.server.engine import prefill
from phatgoose.apps.server.engine.batches import Batch
from phatgoose.apps.server.engine.decoding import Decoding, Sampler, seed_of, token_scores
from phatgoose.apps.server.engine.detokeniser import Detokeniser, earliest, held_back
from phatgoose.apps.server.engine.generation_engine import GenerationEngine
from phatgoose.apps.server.engine.model_runner import ModelRunner
from phatgoose.apps.server.engine.sequences import ActiveSequence, Failure
from phatgoose.apps.server.metrics import Metrics
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.errors import RoutingError
from phatgoose.tasks.encoding import Encoder
from routed_models import compose_by
from short_bases import few_places
from tiny import VOCABULARY, make_ids, make_tokenizer, with_added

GREEDY = Decoding(max_tokens=12, temperature=0.0)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def runner_of(pool_of):
    """`runner_of(kind, router)`: the pool of that kind of base, composed, without end tokens."""
    made = {}

    def make(kind="llama", router="phatgoose"):
        if (kind, router) not in made:
            pool = pool_of(kind)
            base = load_base(pool.base.id, dtype="float32")
            runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
            runner.ends = frozenset()
            made[kind, router] = runner
        return made[kind, router]

    return make


class Told:
    """What rows were told."""

    def __init__(self):
        self.events = []
        self.over = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Failure) or event.finish:
            self.over.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def tokens(self):
        return [token for event in self.events for token in event.tokens]

    @property
    def routing(self):
        return [stream for event in self.events for stream in event.routing]


def row_of(runner, prompt, decoding=GREEDY, choice=0, client="", expert=None):
    return ActiveSequence(runner, prompt, decoding, Told(), choice, client, expert)


def prompt_of(seed, tokens=None):
    return make_ids(1, tokens or 3 + 5 * seed, seed)[0].tolist()


def finish(batch):
    while batch.sequences:
        batch.step()


def alone(runner, prompt, decoding=GREEDY):
    row, batch = row_of(runner, prompt, decoding), Batch(runner)
    batch.join([row])
    finish(batch)
    return row


def by_generate(runner, prompt, tokens):
    key = (runner, tuple(prompt))
    if len(GENERATED.get(key, ())) < tokens:
        GENERATED[key] = runner.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max(tokens, 12),
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()[1 if runner.is_encoder_decoder else len(prompt) :]
    return GENERATED[key][:tokens]


GENERATED = {}


# --- batches --------------------------------------------------------------------------------------


def test_a_row_alone_gets_what_generate_gives(runner_of, kind):
    runner = runner_of(kind)
    for seed in range(2):
        row = alone(runner, prompt_of(seed))
        assert row.generated == by_generate(runner, prompt_of(seed), 12)
        assert row.finish == "length"


def test_rows_together_get_what_each_gets_alone(runner_of, kind):
    runner, batch = runner_of(kind), Batch(runner_of(kind))
    rows = [
        row_of(runner, prompt_of(seed), replace(GREEDY, max_tokens=2 + 4 * (seed % 3)))
        for seed in range(5)
    ]
    batch.join(rows)
    finish(batch)
    for seed, row in enumerate(rows):
        assert row.generated == by_generate(runner, prompt_of(seed), 2 + 4 * (seed % 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_rows_may_join_and_leave_between_any_two_steps(runner_of, kind):
    runner, batch = runner_of(kind), Batch(runner_of(kind))
    lengths = [9, 2, 14, 5, 7, 1]
    rows = [
        row_of(runner, prompt_of(i), replace(GREEDY, max_tokens=n)) for i, n in enumerate(lengths)
    ]
    batch.join(rows[:2])
    batch.step()
    batch.step()  # the second leaves
    batch.join(rows[2:3])  # longer than what is there
    batch.step()
    batch.join(rows[3:])
    batch.step()
    assert [row.finish for row in rows] == [None, "length", None, None, None, "length"]
    finish(batch)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        assert row.generated == by_generate(runner, prompt_of(i), n)


def test_sliding_windows_slide_in_batches_too():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    ids = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
    config = MistralConfig(vocab_size=VOCABULARY, **small, **heads, **ids)
    runner = ModelRunner(MistralForCausalLM(config).eval(), TOKENIZER)
    runner.ends = frozenset()
    batch, rows = (
        Batch(runner),
        [row_of(runner, prompt_of(seed, 20 - 7 * seed)) for seed in range(3)],
    )
    batch.join(rows[:1])
    batch.step()
    batch.join(rows[1:])
    finish(batch)
    for seed, row in enumerate(rows):
        assert row.generated == by_generate(runner, prompt_of(seed, 20 - 7 * seed), 12)


def test_an_encoder_decoder_batch_takes_no_joiners(runner_of):
    runner = runner_of("t5")
    batch = Batch(runner)
    assert batch.is_open
    batch.join([row_of(runner, prompt_of(0))])
    assert not batch.is_open


@pytest.mark.parametrize("router", ["average-activation", "arrow", "merged", "retrieval", "single"])
def test_other_routers_batch_as_well(runner_of, router, toy_embedder):
    runner = runner_of("llama", router)
    batch = Batch(runner)
    experts = runner.experts_of([prompt_of(seed) for seed in range(4)])
    rows = [row_of(runner, prompt_of(seed), expert=experts[seed]) for seed in range(4)]
    batch.join(rows[:2])
    batch.step()
    batch.join(rows[2:])
    finish(batch)
    for seed, row in enumerate(rows):
        runner.model.phatgoose.lookup and runner.model.phatgoose.lookup.serve(None)
        assert row.generated == by_generate(runner, prompt_of(seed), 12)


def test_columns_that_nobody_needs_are_dropped(runner_of):
    batch = Batch(runner_of())
    batch.join(
        [
            row_of(runner_of(), prompt_of(0, 40), replace(GREEDY, max_tokens=2)),
            row_of(runner_of(), prompt_of(1, 4)),
        ]
    )
    assert batch._mask.shape == (2, 40)
    batch.step()
    assert batch._mask.shape == (1, 5)
    assert batch._cache.get_seq_length() == 5


def test_a_prompt_that_several_answers_share_is_read_once(runner_of, monkeypatch):
    runner = runner_of()
    seen = []
    decode = runner.decode
    monkeypatch.setattr(
        runner,
        "decode",
        lambda ids, *a, **k: (seen.append(tuple(ids.shape)), decode(ids, *a, **k))[1],
    )
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(0, 6), choice=i) for i in range(3)] + [
        row_of(runner, prompt_of(1, 8))
    ]
    batch.join(rows)
    finish(batch)
    assert seen[0] == (2, 8)
    assert seen[1] == (4, 1)
    assert rows[0].generated == rows[2].generated == by_generate(runner, prompt_of(0, 6), 12)


# --- what comes next ------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_and_not_on_the_company(runner_of):
    runner = runner_of()
    wishes = [Decoding(10, 0.9, 0.95, seed) for seed in range(4)]
    single = [alone(runner, prompt_of(2), wish).generated for wish in wishes]
    assert len({tuple(tokens) for tokens in single}) == 4
    assert alone(runner, prompt_of(2), wishes[0]).generated == single[0]
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(2), wish) for wish in wishes]
    batch.join([row_of(runner, prompt_of(7)), *rows])
    finish(batch)
    assert [row.generated for row in rows] == single


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def shares(**wish):
        sampler = Sampler(Decoding(1, seed=3, **wish), torch.device("cpu"))
        drawn = torch.tensor([sampler(logits) for _ in range(600)])
        return drawn.bincount(minlength=4) / 600

    torch.testing.assert_close(shares(temperature=1.0), logits.softmax(0), atol=0.08, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(0), atol=0.08, rtol=0)
    assert shares(temperature=1.0, top_p=0.7)[2:].sum() == 0
    assert shares(temperature=1.0, top_p=0.0)[0] == 1
    assert shares(temperature=1e-30)[0] == 1


def test_seeds_of_one_request_differ_and_a_missing_one_is_drawn():
    assert [seed_of(5, i) for i in range(3)] == [5, 6, 7]
    assert seed_of(-1, 0) >= 0
    assert seed_of(None, 0) != seed_of(None, 0)


def test_log_probabilities_are_those_of_one_pass(runner_of, kind):
    runner = runner_of(kind)
    wish = Decoding(5, 0.0, logprobs=3, echo=kind != "t5")
    rows = [row_of(runner, prompt_of(seed), wish) for seed in (1, 2)]
    batch = Batch(runner)
    batch.join(rows)
    finish(batch)
    for seed, row in zip((1, 2), rows, strict=True):
        told = row.deliver.tokens
        if kind == "t5":
            ids = torch.tensor([[0, *row.generated]])
            logits = runner.model(torch.tensor([prompt_of(seed)]), decoder_input_ids=ids).logits[0]
            targets = row.generated
        else:
            ids = torch.tensor([[*prompt_of(seed), *row.generated]])
            logits, targets = runner.model(ids).logits[0], ids[0, 1:].tolist()
            assert told[0].logprob is None
            told = told[1:]
        wanted = logits[:-1].float().log_softmax(-1)
        assert len(told) == len(targets)
        for token, target, scores in zip(told, targets, wanted, strict=True):
            assert token.logprob == pytest.approx(scores[target].item(), abs=2e-4)
            best = scores.topk(3).values.tolist()
            assert [p for _, p in token.top] == pytest.approx(best, abs=2e-4)


def test_a_long_prompt_is_scored_in_several_passes(runner_of, monkeypatch):
    runner = runner_of()
    wish = Decoding(2, 0.0, logprobs=1, echo=True, routing=True)
    prompts = [prompt_of(1, 23), prompt_of(2, 11)]

    def told():
        batch, rows = Batch(runner), [row_of(runner, prompt, wish) for prompt in prompts]
        batch.join(rows)
        finish(batch)
        return [row.deliver for row in rows]

    at_once = told()
    monkeypatch.setattr(prefill, "MOST_LOGITS", 2 * 4 * VOCABULARY)  # four columns at a time
    for one, other in zip(at_once, told(), strict=True):
        assert [t.text for t in one.tokens] == [t.text for t in other.tokens]
        scores = [[t.logprob for t in each.tokens[1:]] for each in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        experts = [np.concatenate([s.experts for s in each.routing]) for each in (one, other)]
        assert (experts[0] == experts[1]).mean() > 0.98


def test_infinite_log_probabilities_are_told_as_numbers():
    logits = torch.tensor([[0.0, -torch.inf]])
    ((own, top),) = token_scores(logits, [1], 2)
    assert own.logprob == top[1].logprob == -9999


def test_an_end_token_ends_an_answer_and_is_told_without_text(runner_of):
    runner = runner_of()
    whole = alone(runner, prompt_of(1)).generated
    runner.ends = frozenset([whole[3]])
    try:
        row = alone(runner, prompt_of(1), replace(GREEDY, logprobs=0))
        ignoring = alone(runner, prompt_of(1), replace(GREEDY, ignores_end=True))
    finally:
        runner.ends = frozenset()
    assert ignoring.generated == whole
    assert row.generated == whole[: whole.index(whole[3]) + 1]
    assert row.finish == "stop"
    assert len(row.deliver.tokens) == len(row.generated)


# --- text -----------------------------------------------------------------------------------------


@given(st.text(max_size=30), st.text(max_size=10))
@settings(max_examples=25, deadline=None)
def test_pieces_make_the_text_that_all_tokens_make(text, before):
    tokenizer = TOKENIZER
    given_before = tokenizer(before)["input_ids"]
    detokeniser = Detokeniser(tokenizer, given_before)
    pieces = [detokeniser.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokeniser.rest() == text


TOKENIZER = make_tokenizer(final_eos=False)


def test_bytes_that_are_no_text_are_given_up():
    detokeniser = Detokeniser(TOKENIZER)
    (lead,) = TOKENIZER("é")["input_ids"][:1]
    pieces = [detokeniser.add(lead) for _ in range(40)]
    assert "\ufffd" in "".join(pieces)
    assert detokeniser.rest().strip("\ufffd") == ""


def test_where_a_stop_begins_and_what_may_be_one():
    assert earliest("abcabc", ["c", "bc"], 0) == 1
    assert earliest("abcabc", ["bc"], 2) == 4
    assert earliest("abc", [], 0) is None
    assert held_back("abcde", ["deal", "x"]) == 2
    assert held_back("abcd", ["deal", "dx"]) == 1
    assert held_back("abc", ["deal"]) == 0
    assert held_back("deal", ["deal"]) == 0  # whole: found by `earliest`


def test_a_stop_cuts_the_text_and_nothing_of_it_is_told_before(runner_of):
    runner = runner_of()
    whole = alone(runner, prompt_of(4), replace(GREEDY, max_tokens=30)).deliver.text
    assert len(whole) > 8
    stop = whole[5:8]
    row = alone(runner, prompt_of(4), replace(GREEDY, max_tokens=30, stop=(stop, "zzz")))
    assert row.finish == "stop"
    assert row.deliver.text == whole[: whole.index(stop)]
    assert len(row.deliver.tokens) < len(row.generated)


def test_an_answer_of_no_tokens_ends_at_once(runner_of):
    row = alone(runner_of(), prompt_of(1), Decoding(0, logprobs=1, echo=True))
    assert row.finish == "length"
    assert row.generated == []
    assert len(row.deliver.tokens) == len(prompt_of(1))


# --- routing --------------------------------------------------------------------------------------


def test_routing_is_that_of_one_pass(runner_of, kind):
    """Prompt and answer traced at once, as `explain` does, from rows that shared a batch."""
    runner = runner_of(kind)
    texts = ["to be, or not", "who?"]
    encoder = Encoder(runner.tokenizer, is_encoder_decoder=kind == "t5")
    prompts = [encoder.prompt(text) for text in texts]
    rows = [row_of(runner, prompt, Decoding(6, 0.0, routing=True)) for prompt in prompts]
    batch = Batch(runner)
    batch.join([*rows, row_of(runner, prompt_of(5))])
    finish(batch)
    for text, row in zip(texts, rows, strict=True):
        names = [stream.name for stream in row.deliver.routing]
        assert set(names) == ({"encoder", "decoder"} if kind == "t5" else {"decoder"})
        got = [s for s in row.deliver.routing if s.name == "decoder"]
        experts = np.concatenate([s.experts for s in got])
        weights = np.concatenate([s.weights for s in got])
        assert weights[-1].max() == 0  # the last token never passed the model
        if kind != "t5":
            assert "".join(t for s in got for t in s.tokens) == text + "".join(row.shown)
            assert [p for s in got for p in s.parts] == [0] * len(row.prompt) + [1] * 6
        fixed = FixedEncoder(encoder, row)
        wanted = {s.name: s for s in trace(runner.model, fixed, fixed.pair(text, "")).streams}[
            "decoder"
        ]
        count = len(wanted.experts)
        assert (experts[:count] == wanted.experts).mean() > 0.98
        assert np.abs(weights[:count].astype(int) - wanted.weights).max() <= 255
        same = experts[:count] == wanted.experts
        assert np.abs(weights[:count].astype(int) - wanted.weights)[same].mean() < 1


class FixedEncoder:
    """An encoder whose pair is a row's prompt and answer."""

    def __init__(self, encoder, row):
        self.tokenizer, self.is_encoder_decoder = encoder.tokenizer, encoder.is_encoder_decoder
        self._pair = encoder.pair("a", "b")
        self._pair = replace(self._pair, prompt=list(row.prompt), target=list(row.generated))

    def pair(self, *_):
        return self._pair


# --- the engine -----------------------------------------------------------------------------------


def engine_of(**limits):
    return GenerationEngine(Serving(**{"max_batch_tokens": 4096, **limits}), Metrics())


@pytest.fixture
def engine():
    """A running engine."""
    made = engine_of()
    made.start()
    yield made
    made.stop()


def submit(engine, rows):
    engine.submit(rows)
    for row in rows:
        assert row.deliver.over.wait(30)
    return rows


def test_different_models_are_never_in_one_batch(engine, runner_of):
    runners = [runner_of("llama", router) for router in ("phatgoose", "merged")]
    wanted = [by_generate(runner, prompt_of(1), 12) for runner in runners]
    assert wanted[0] != wanted[1]
    rows = [row_of(runners[number % 2], prompt_of(1)) for number in range(6)]
    for row in rows:
        engine.submit([row])
    for number, row in enumerate(rows):
        assert row.deliver.over.wait(30)
        assert row.generated == wanted[number % 2]


def test_more_rows_than_fit_wait_for_their_turn(runner_of):
    engine = engine_of(max_batch_tokens=3 * (8 + 12))
    rows = [row_of(runner_of(), prompt_of(seed, 8), client=str(seed)) for seed in range(8)]
    most = []
    for row in rows:
        engine.submit([row])
    assert engine.waiting == 8
    with torch.inference_mode():
        while engine.waiting or engine.running:
            engine._admit()
            most.append(sum(batch.tokens_with() for batch in engine._batches))
            for batch in engine._batches:
                batch.step()
    assert max(most) == 60
    assert all(row.finish == "length" for row in rows)


def test_what_can_never_fit_and_what_comes_too_much_is_refused(runner_of):
    engine = engine_of(max_queue=3, max_batch_tokens=30)
    with pytest.raises(ApiError, match="32 tokens") as refused:
        engine.submit([row_of(runner_of(), prompt_of(0, 20))])
    assert refused.value.status_code == 400
    with pytest.raises(ApiError, match="at most 3") as refused:
        engine.submit([row_of(runner_of(), prompt_of(0, 5)) for _ in range(4)])
    assert refused.value.status_code == 400
    engine.submit([row_of(runner_of(), prompt_of(0, 5)) for _ in range(2)])
    with pytest.raises(ApiError, match="2 answers are waiting") as refused:
        engine.submit([row_of(runner_of(), prompt_of(0, 5)) for _ in range(2)])
    assert refused.value.status_code == 429
    assert refused.value.headers["Retry-After"] == "1"
    assert engine.waiting == 2


# --- clients --------------------------------------------------------------------------------------


def short_rows(runner, number, client, tokens=12, prompt=8):
    wish = replace(GREEDY, max_tokens=tokens)
    return [row_of(runner, prompt_of(seed, prompt), wish, client=client) for seed in range(number)]


def computed(engine):
    """The clients of the rows that are computed, after one more look into the queue."""
    with torch.inference_mode():
        engine._admit()
    return [row.client for batch in engine._batches for row in batch.sequences]


def end(engine, client):
    engine.cancel([r for b in engine._batches for r in b.sequences if r.client == client])


def test_a_client_alone_leaves_a_quarter_for_others(runner_of):
    engine = engine_of(max_batch_tokens=400)  # twenty rows of twenty
    engine.submit(short_rows(runner_of(), 19, "greedy"))
    assert computed(engine) == ["greedy"] * 15
    engine.submit(short_rows(runner_of(), 1, "polite"))
    engine.submit(short_rows(runner_of(), 9, "second"))
    assert computed(engine) == ["greedy"] * 15 + ["polite"] + ["second"] * 3
    assert computed(engine)[19:] == []
    end(engine, "greedy")
    clients = computed(engine)
    assert clients.count("second") == 9  # at most three times what is left
    assert clients.count("greedy") == 4
    assert engine.waiting == 0


def test_clients_take_turns(runner_of):
    engine = engine_of(max_batch_tokens=60)
    order = []
    for client, number in (("a", 4), ("b", 4), ("c", 2)):
        rows = short_rows(runner_of(), number, client, tokens=1)
        for row in rows:
            row.deliver = lambda event, row=row: order.append(row.client)
        engine.submit(rows)
    while engine.waiting:
        computed(engine)
    assert "".join(order) == "abcabcabab"


def test_a_long_row_is_not_passed_over_for_ever(runner_of):
    engine = engine_of(max_batch_tokens=400)
    engine.submit(short_rows(runner_of(), 19, "greedy"))
    assert len(computed(engine)) == 15
    engine.submit(short_rows(runner_of(), 1, "long", tokens=372))
    engine.submit(short_rows(runner_of(), 1, "polite", tokens=1))
    engine.cancel(engine._batches[0].sequences[:5])  # it is the greedy one's turn, once
    assert computed(engine) == ["greedy"] * 11  # and the polite one, who was answered at once
    assert [each.client for each in engine._queue] == ["long", *["greedy"] * 3]
    end(engine, "greedy")
    assert computed(engine) == ["long"]
    end(engine, "long")
    assert computed(engine) == ["greedy"] * 3


def test_a_client_fills_its_part_of_the_queue_alone(runner_of):
    engine = engine_of(max_queue=10, max_client_queue=4)
    engine.submit(short_rows(runner_of(), 3, "greedy"))
    with pytest.raises(ApiError, match="3 answers of yours are waiting") as refused:
        engine.submit(short_rows(runner_of(), 2, "greedy"))
    assert refused.value.status_code == 429
    with pytest.raises(ApiError, match="at most 4") as refused:
        engine.submit(short_rows(runner_of(), 5, "other"))
    assert refused.value.status_code == 400
    engine.submit(short_rows(runner_of(), 4, "other"))
    assert engine.waiting == 7


def test_the_engine_looks_no_expert_up(runner_of, toy_embedder, monkeypatch):
    """Whoever prepares a request has: an embedder may take minutes, and all others would wait."""
    runner = runner_of("llama", "retrieval")
    (expert,) = runner.experts_of([prompt_of(1)])
    monkeypatch.setattr(runner._lookup, "of_tokens", raises(AssertionError("looked up")))
    batch, row = Batch(runner), row_of(runner, prompt_of(1), expert=expert)
    batch.join([row])
    finish(batch)
    assert row.finish == "length"


def test_a_cancelled_row_leaves_its_place(engine, runner_of):
    rows = [
        row_of(runner_of(), prompt_of(seed), replace(GREEDY, max_tokens=2000)) for seed in range(2)
    ]
    engine.submit([rows[0]])
    other = submit(engine, [row_of(runner_of(), prompt_of(3), client="other")])[0]
    engine.cancel([rows[0]])
    submit(engine, [row_of(runner_of(), prompt_of(4))])
    assert engine.running == 0
    assert len(rows[0].generated) < 2000
    assert other.generated == by_generate(runner_of(), prompt_of(3), 12)


def test_a_pass_that_fails_fails_its_own_rows_alone(engine, runner_of, monkeypatch):
    runner = runner_of("llama", "arrow")
    monkeypatch.setattr(runner, "decode", raises(RoutingError("no")))
    (row,) = submit(engine, [row_of(runner, prompt_of(1))])
    assert row.deliver.events == [Failure("no")]
    monkeypatch.setattr(runner, "decode", raises(ValueError("a secret")))
    (row,) = submit(engine, [row_of(runner, prompt_of(1))])
    assert "secret" not in row.deliver.events[0].message
    (row,) = submit(engine, [row_of(runner_of(), prompt_of(1))])
    assert row.finish == "length"


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_stopped_engine_fails_what_is_left(runner_of):
    engine = engine_of()
    engine.start()
    assert engine.is_alive
    row = row_of(runner_of(), prompt_of(0), replace(GREEDY, max_tokens=3000))
    engine.submit([row])
    engine.stop()
    assert isinstance(row.deliver.events[-1], Failure)
    assert not engine.is_alive
    with pytest.raises(ApiError, match="stopped"):
        engine.submit([row_of(runner_of(), prompt_of(0))])


def test_weights_of_a_base_are_in_memory_once(pool_of):
    app = serving.app_of(pool_of("llama"))
    goose, mean = (served.runner.model for served in app.state.service.models.values())
    assert goose is not mean
    pairs = zip(goose.parameters(), mean.parameters(), strict=True)
    assert all(one is other for one, other in pairs)


def asked(prompt, **fields) -> CompletionRequest:
    return CompletionRequest(model="goose", prompt=prompt, **fields)


def test_more_than_an_encoder_or_a_decoder_holds_is_a_400():
    base = few_places("bart")
    preparer = RequestPreparer(ModelRunner(base.model, base.tokenizer), Serving())
    for text, tokens, words in (
        ("a" * 30, 4, "The prompt has 31 tokens; the model's encoder can hold 24."),
        ("a", 25, "max_tokens is 25; the model's decoder can hold 24."),
    ):
        request = asked(text, max_tokens=tokens)
        (prompt,) = preparer.completion_prompts(request)
        with pytest.raises(ApiError) as refusal:
            preparer.decoding(request, 0, prompt)
        assert (refusal.value.status_code, refusal.value.detail) == (400, words)
    chat = ChatRequest(model="goose", messages=[{"role": "user", "content": "a"}])
    assert preparer.decoding(chat, 0, prompt).max_tokens == 24


def test_a_text_that_an_answer_follows_has_no_end(llama):
    tokenizer = with_added(["<bos>"], ["</s>"])
    runner = ModelRunner(llama.model, tokenizer)
    (prompt,) = RequestPreparer(runner, Serving()).completion_prompts(asked("ab"))
    assert tokenizer.decode(list(prompt.tokens)) == "<bos>ab"
