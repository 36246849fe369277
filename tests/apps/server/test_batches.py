"""Answers in batches: what each gets and reports, where it ends, and what prompts share.

And the engine: who is computed when, and what happens when it fails.
"""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from phatgoose.analysis.traces import trace
from phatgoose.apps.server.local import FAILED, GenerationEngine
from phatgoose.apps.server.local.batches import ActiveSequence, Batch, Sampler
from phatgoose.apps.server.local.runner import ModelRunner, PrefixScope, PrefixStore
from phatgoose.apps.server.protocol import ApiError
from phatgoose.apps.server.replies import beginning_of
from phatgoose.apps.server.requests import Answer, Decoding, RequestPrompt
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.errors import RoutingError
from phatgoose.routing.compose import compose, detach
from phatgoose.tasks.encoding import Encoder
from routed_models import compose_by, tailed
from serving import until
from tiny import VOCABULARY, make_ids, make_tokenizer, random_model

pytestmark = pytest.mark.usefixtures("no_gradients")
each_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])


GREEDY = Decoding(max_tokens=12, temperature=0.0)
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}


class Told:
    """What rows were told."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, ApiError) or event.finish:
            self.over.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def tokens(self):
        return [token for event in self.events for token in event.tokens]


def row_of(runner, prompt, decoding=GREEDY, client="", turn=None):
    answer = Answer(0, 0, RequestPrompt(tuple(prompt), "", ()), decoding)
    return ActiveSequence(runner, answer, Told(), client, turn)


def prompt_of(seed, tokens=None):
    return make_ids(1, tokens or 3 + 5 * seed, seed)[0].tolist()


def finished(runner, rows, store=None):
    """The rows, computed in one batch."""
    batch = Batch(runner, store)
    batch.join(rows)
    while batch.sequences:
        batch.step()
    return rows


def by_generate(runner, prompt, tokens=12, **more):
    """What the model itself generates."""
    composition = getattr(runner.model, "phatgoose", None)
    if composition and composition.context:
        composition.context.use(None)
    return runner.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        **more,
    )[0].tolist()[len(prompt) :]


ROUTED = [(kind, "phatgoose") for kind in ("llama", "gpt2", "qwen2")]
ROUTED += [("llama", router) for router in ("average-activation", "arrow", "merged")]
ROUTED += [("llama", router) for router in ("single", "retrieval", "centroid", "discriminant")]


def may_join_and_leave(runner, prompts):
    """Between any two steps, and each row's answer is the model's own."""
    runner.ends = frozenset()
    lengths = [9, 2, 14, 5, 7, 1][: len(prompts)]
    wanted = [by_generate(runner, *each) for each in zip(prompts, lengths, strict=True)]
    turns, batch = runner.routings_of(prompts), Batch(runner)
    rows = [
        row_of(runner, prompt, replace(GREEDY, max_tokens=n), turn=turn)
        for prompt, n, turn in zip(prompts, lengths, turns, strict=True)
    ]
    batch.join(rows[:2])
    batch.step()
    batch.step()  # the second leaves
    batch.join(rows[2:3])  # which may be longer than what is there
    batch.step()
    batch.join(rows[3:])
    batch.step()
    assert [row.finish for row in rows[:5]] == [None, "length", None, None, None][: len(rows)]
    while batch.sequences:
        batch.step()
    assert [row.generated for row in rows] == wanted


@pytest.mark.parametrize(("kind", "router"), ROUTED)
def test_rows_may_join_and_leave(runner_of, kind, router, toy_embedder):
    may_join_and_leave(runner_of(kind, router), [prompt_of(seed) for seed in range(6)])


def test_sliding_windows_slide_in_batches_too():
    model = random_model("mistral", SMALL | {"sliding_window": 8, "num_key_value_heads": 2})
    runner = ModelRunner(model, make_tokenizer(final_eos=False))
    may_join_and_leave(runner, [prompt_of(seed, 20 - 5 * seed) for seed in range(4)])


@pytest.mark.parametrize("router", ["phatgoose", "centroid"])
def test_experts_that_act_from_a_prompts_end_on(pool_of, router, toy_embedder):
    pool = tailed(pool_of("llama").experts, (3, None, 6, 1))
    base = load_base(pool.base.id, dtype="float32")
    runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
    prompts = [prompt_of(0), [*prompt_of(1), 7, 8, 9], prompt_of(2), [7, 8, *prompt_of(1)]]
    may_join_and_leave(runner, prompts)


def test_sampling_depends_on_the_seed_and_not_on_the_company(runner_of):
    runner = runner_of()
    wishes = [Decoding(10, 0.9, 0.95, seed) for seed in (0, 0, 1, 2)]
    rows = [[row_of(runner, prompt_of(2), wish) for wish in wishes] for _ in range(2)]
    single = [finished(runner, [row])[0].generated for row in rows[0]]
    assert single[0] == single[1]
    assert len(set(map(tuple, single))) == 3
    finished(runner, [row_of(runner, prompt_of(7)), *rows[1]])
    assert [row.generated for row in rows[1]] == single


@each_kind
def test_log_probabilities_are_those_of_one_pass(runner_of, kind):
    runner, wish = runner_of(kind), Decoding(5, 0.0, logprobs=3)
    for row in finished(runner, [row_of(runner, prompt_of(seed), wish) for seed in (1, 2)]):
        logits = runner.model(torch.tensor([[*row.prompt, *row.generated]])).logits
        wanted = logits[0, -1 - len(row.generated) : -1].float().log_softmax(-1)
        for token, target, scores in zip(row.deliver.tokens, row.generated, wanted, strict=True):
            assert token.logprob == pytest.approx(scores[target].item(), abs=2e-4)
            best = scores.topk(3).values.tolist()
            assert [p for _, p in token.top] == pytest.approx(best, abs=2e-4)


def test_an_end_token_ends_an_answer_and_is_told_without_text(runner_of):
    runner = ModelRunner(runner_of().model, runner_of().tokenizer)
    whole = by_generate(runner, prompt_of(1))
    runner.ends = frozenset([whole[3]])
    wishes = replace(GREEDY, logprobs=0), replace(GREEDY, ignores_end=True)
    row, ignoring = finished(runner, [row_of(runner, prompt_of(1), wish) for wish in wishes])
    assert ignoring.generated == whole
    assert row.generated == whole[: whole.index(whole[3]) + 1]
    assert row.finish == "stop"
    assert len(row.deliver.tokens) == len(row.generated)


@pytest.mark.parametrize(
    ("text", "count"), [("so ab", 2), ("so abca", 1), ("so b", 1), ("ab so", 0), ("", 0)]
)
def test_the_beginning_of_a_stop_is_held_back_and_sixteen_long_ones_cost_little(text, count):
    assert beginning_of(("abcd", "bx"), text) == count
    stops, begun = [f"{'x' * 250}{n}" for n in range(16)], time.perf_counter()
    assert not any(beginning_of(stops, "plain text " * 100) for _ in range(1000))
    assert time.perf_counter() - begun < 2


TEXTS = st.text(st.sampled_from("a \n.äß漢\u0301😀👩\u200d🚀"), min_size=1, max_size=12)


@given(TEXTS, TEXTS, st.sampled_from([(), ("😀",), ("a.", "漢漢")]))
def test_each_token_is_placed_where_its_character_begins(runner_of, prompt, answer, stop):
    """The tokenizer has a token for each byte, so most characters consist of several."""
    runner = runner_of()
    before, after = (runner.tokenizer(text)["input_ids"] for text in (prompt, answer))
    row = row_of(runner, before, Decoding(len(after), 0.0, stop=stop, logprobs=0))
    for token in after:
        if row.finish is None:
            row.advance(torch.nn.functional.one_hot(torch.tensor(token), 300).float())
    places = [place for place, each in enumerate(answer) for _ in each.encode()]
    told = row.deliver.tokens
    assert [token.place for token in told] == places[: len(told)]
    for token in told:
        assert token.text in (answer[token.place], "\ufffd")
    assert answer.startswith(row.deliver.text)
    assert row.finish == "stop" or row.deliver.text == answer


@each_kind
def test_routing_is_that_of_one_pass(runner_of, kind):
    """Prompt and answer traced at once, as `explain` does, from rows that shared a batch."""
    runner, texts = runner_of(kind), ["to be, or not", "who?"]
    encoder = Encoder(runner.tokenizer, is_encoder_decoder=False)
    wish = Decoding(6, 0.0, routing=True)
    rows = [row_of(runner, encoder.prompt(text), wish) for text in texts]
    finished(runner, [*rows, row_of(runner, prompt_of(5))])
    for text, row in zip(texts, rows, strict=True):
        got = [stream for event in row.deliver.events for stream in event.routing]
        experts = np.concatenate([s.experts for s in got])
        weights = np.concatenate([s.weights for s in got])
        assert weights[-1].max() == 0  # the last token never passed the model
        assert "".join(t for s in got for t in s.tokens) == text + "".join(row.shown)
        assert [p for s in got for p in s.parts] == [0] * len(row.prompt) + [1] * 6
        pair = replace(encoder.pair("a", "b"), prompt=list(row.prompt), target=row.generated)
        (wanted,) = trace(runner.model, encoder, pair).streams
        count = len(wanted.experts)
        same = experts[:count] == wanted.experts
        assert same.mean() > 0.98
        assert np.abs(weights[:count].astype(int) - wanted.weights)[same].mean() < 1


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
    assert shares(temperature=1.0, top_k=2).tolist()[2:] == [0, 0]
    assert shares(temperature=1.0, min_p=0.3).tolist()[2:] == [0, 0]  # e^-1 of the best, not e^-2
    assert shares(temperature=0.0, logit_bias={"3": 100.0, "9": 0.0})[3] == 1


@pytest.mark.parametrize(
    ("penalties", "wanted"),
    [
        ({"frequency_penalty": 0.5}, [2.0, 0.0, 0.0, -1.5]),  # for each time in the answer
        ({"presence_penalty": 0.5}, [2.0, 0.5, 0.0, -1.5]),  # once for all times
        ({"repetition_penalty": 2.0}, [1.0, 0.5, 0.0, -2.0]),  # in the prompt too
    ],
    ids=str,
)
def test_penalties_change_the_logits_of_tokens_that_were_there(penalties, wanted):
    """The prompt is token 0, the answer so far 1, 3, 1: a draw from logits shows what became."""
    logits, counts = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.zeros(4)
    for seed in range(2000):
        sampler = Sampler(Decoding(1, seed=seed, **penalties), torch.device("cpu"), [0])
        counts[sampler(logits, [1, 3, 1])] += 1
    torch.testing.assert_close(counts / 2000, torch.tensor(wanted).softmax(0), atol=0.035, rtol=0)


def test_a_penalised_row_is_generates_and_changes_no_other(runner_of):
    runner, prompt = runner_of(), prompt_of(3)
    wanted = by_generate(runner, prompt, repetition_penalty=1.5, sequence_bias={(7,): 2.0})
    wish = replace(GREEDY, repetition_penalty=1.5, logit_bias={"7": 2.0})
    drawn = Decoding(12, 0.9, seed=4, top_k=9, min_p=0.01, presence_penalty=1.0)
    far = replace(GREEDY, logit_bias={"999999": 1.0})
    alone = finished(runner, [row_of(runner, prompt, drawn)])[0].generated
    wishes = [wish, GREEDY, drawn, far]
    rows = finished(runner, [row_of(runner, prompt, each) for each in wishes])
    assert [row.generated for row in rows[:3]] == [wanted, by_generate(runner, prompt), alone]
    assert wanted != rows[1].generated
    assert "logit_bias names token 999999; there are" in rows[3].deliver.events[0].detail


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_row_whose_numbers_overflow_fails_alone(runner_of, temperature, number):
    """As one's own weights for experts of a float16 base may, in a batch with others'."""
    runner = runner_of()
    wanted, wish = by_generate(runner, prompt_of(2)), replace(GREEDY, temperature=temperature)

    def overflow(head, inputs, logits):
        logits[:-1, -1, 3] = number

    rows = [row_of(runner, prompt_of(n), how) for n, how in ((1, wish), (2, GREEDY))]
    with runner.model.lm_head.register_forward_hook(overflow):
        failed, other = finished(runner, rows)
    assert "overflow" in failed.deliver.events[0].detail
    assert other.generated == wanted


# Prompts that begin as one before: what is kept of it changes no answer.

LONG = prompt_of(5, 40)


def answers(runner, prompts, store, client="", **changes):
    """The tokens that passed the model first, and each prompt's answer in a batch of all."""
    passed, decode, wish = [], runner.decode, replace(GREEDY, **changes)

    def noted(ids, *rest, **more):
        passed.append(ids.shape[1])
        return decode(ids, *rest, **more)

    pairs = zip(prompts, runner.routings_of(prompts), strict=True)
    rows = [row_of(runner, prompt, wish, client, turn) for prompt, turn in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "decode", noted)
        finished(runner, rows, store)
    return passed[0], *(row.generated for row in rows)


@pytest.mark.parametrize("router", ["phatgoose", "discriminant", "merged"])
def test_a_beginning_is_read_once_and_answers_stay(runner_of, router):
    runner, store = runner_of("llama", router), PrefixStore(1 << 20)
    passed, first = answers(runner, [LONG], store)
    assert passed == 40
    assert answers(runner, [LONG], store) == (1, first)


def test_conversations_go_on_and_rows_with_and_without_a_known_beginning_share_a_batch(runner_of):
    runner, store = runner_of(), PrefixStore(1 << 20)
    _, first = answers(runner, [LONG], store)
    turn = (*LONG, *first, 3, 4, 5)
    # The last token of the answer never passed.
    assert answers(runner, [turn], store) == (4, by_generate(runner, turn))
    prompts = [(*LONG[:30], 7, 8, 9), prompt_of(6, 12), LONG, prompt_of(7, 25)]
    passed, *together = answers(runner, prompts, store)
    assert passed == 25  # of the longest that nothing is known of
    assert together == [by_generate(runner, prompt) for prompt in prompts]


def test_what_one_client_asked_or_one_routing_read_is_no_others(runner_of):
    store = PrefixStore(1 << 20)
    for router, client in (("phatgoose", "one"), ("phatgoose", "other"), ("merged", "one")):
        assert answers(runner_of("llama", router), [LONG], store, client)[0] == 40
    assert answers(runner_of(), [LONG], store, "other")[0] == 1
    # Whoever wants to see the prompt's tokens gets them read.
    assert answers(runner_of(), [LONG], store, "other", routing=True)[0] == 40


def test_the_body_that_the_base_read_serves_all_experts_that_act_from_the_end_on(llama, llama_pool):
    pool, store = tailed(llama_pool.experts, (3, 3, 3, 3)), PrefixStore(1 << 20)
    answers(ModelRunner(llama.model, llama.tokenizer), [LONG], store)
    for name in pool.names:
        model = compose(pool, llama, router=f"single:expert={name}")
        runner = ModelRunner(model, llama.tokenizer)
        passed, answer = answers(runner, [LONG], store)
        assert (passed, answer) == (3, by_generate(runner, LONG, len(answer)))
        detach(model)


def test_a_store_keeps_to_its_bytes_and_drops_what_was_not_used_for_longest():
    def keep(key, tokens=20):
        cache = DynamicCache()
        cache.update(torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4), 0)
        store.keep(PrefixScope(key, 99), list(range(tokens)), cache, 0, torch.ones(tokens))

    def has(key):
        return store.find(PrefixScope(key, 99), list(range(20)))[0] is not None

    most = 3 * 2 * 2 * 4 * 4 * 20  # three of two sides, heads, columns, bytes and tokens
    store = PrefixStore(most)
    for key in "abc":
        keep(key)
    assert store.bytes == most
    assert has("a")
    keep("d")
    assert [has(reader) for reader in "abcd"] == [True, False, True, True]
    keep("e", 80)  # larger than all
    assert store.bytes == most


@pytest.mark.parametrize("kind", ["mistral", "llama", "mpt"])
def test_what_is_known_of_one_prompt_changes_nothing_beside_a_longer_one(kind):
    """Windows and ALiBi count columns, whatever the mask says of them."""
    special = {
        "mistral": {"sliding_window": 8, "num_key_value_heads": 2},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    }
    model = random_model(kind, SMALL | special.get(kind, {}))
    runner = ModelRunner(model, make_tokenizer(final_eos=False))
    runner.ends, store, known = frozenset(), PrefixStore(1 << 20), prompt_of(0, 40)
    finished(runner, [row_of(runner, known)], store)
    prompts = [[*known[:30], 7, 8, 9], prompt_of(1, 50), [*known[:20], 3]]
    rows = finished(runner, [row_of(runner, prompt) for prompt in prompts], store)
    assert [row.generated for row in rows] == [by_generate(runner, prompt) for prompt in prompts]
    again = finished(runner, [row_of(runner, prompts[0])], store)  # what was kept is right, too
    assert again[0].generated == rows[0].generated


def test_rotations_that_a_longer_row_changes_bound_the_context():
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    positions = {"original_max_position_embeddings": 32, "max_position_embeddings": 256}
    scaled = {"rope_parameters": {**longrope, "rope_theta": 1e4, **positions}, **positions}
    model = random_model("phi3", SMALL | scaled)
    assert ModelRunner(model, make_tokenizer(final_eos=False)).frame.context == 32


# The engine.


def engine_of(**limits):
    return GenerationEngine(Serving(**{"max_batch_tokens": 4096, **limits}))


@pytest.fixture
def engine():
    """A running engine."""
    running = engine_of()
    running.start()
    yield running
    running.stop()


def ended(rows):
    for row in rows:
        assert row.deliver.over.wait(30)
    return rows


def test_different_models_are_never_in_one_batch(engine, runner_of):
    runners = [runner_of("llama", router) for router in ("phatgoose", "merged")]
    wanted = [by_generate(runner, prompt_of(1)) for runner in runners]
    assert wanted[0] != wanted[1]
    rows = [row_of(runners[number % 2], prompt_of(1)) for number in range(6)]
    for row in rows:
        engine.submit([row])
    assert [row.generated for row in ended(rows)] == wanted * 3


@pytest.mark.parametrize(
    ("limits", "number", "client", "said"),
    [
        ({"max_queue": 3}, 2, "other", "2 answers are waiting already, 0 of them yours"),
        ({"max_queue": 5}, 2, "greedy", "2 answers are waiting already, 2 of them yours"),
        ({"max_queue": 5}, 4, "other", "0 of them yours; 4 more are too many"),
    ],
)
def test_what_comes_too_much_is_refused(runner_of, limits, number, client, said):
    engine = engine_of(**limits)
    submit(engine, runner_of(), 2, "greedy")
    with pytest.raises(ApiError, match=said) as refused:
        submit(engine, runner_of(), number, client)
    assert (refused.value.status_code, refused.value.headers["Retry-After"]) == (429, "1")
    assert engine.waiting == 2


def submit(engine, runner, number, client, tokens=12):
    """Queue so many prompts of eight tokens."""
    wish = replace(GREEDY, max_tokens=tokens)
    rows = [row_of(runner, prompt_of(seed, 8), wish, client) for seed in range(number)]
    engine.submit(rows)
    return rows


def computed(engine):
    """The clients of the rows that are computed, after one more look into the queue."""
    engine.admit()
    return [row.client for batch in engine.batches for row in batch.running]


def end(engine, client):
    engine.cancel([r for b in engine.batches for r in b.sequences if r.client == client])


def test_a_client_alone_leaves_a_quarter_for_others(runner_of):
    engine = engine_of(max_batch_tokens=400)  # twenty rows of twenty
    submit(engine, runner_of(), 19, "greedy")
    assert computed(engine) == ["greedy"] * 15
    submit(engine, runner_of(), 1, "polite")
    submit(engine, runner_of(), 9, "second")
    assert computed(engine) == ["greedy"] * 15 + ["polite"] + ["second"] * 3
    assert computed(engine)[19:] == []
    end(engine, "greedy")
    clients = computed(engine)
    assert clients.count("second") == 9  # at most three times what is left
    assert clients.count("greedy") == 4
    assert engine.waiting == 0


def test_clients_take_turns(runner_of):
    engine, rows = engine_of(max_batch_tokens=60), []
    for client, number in (("a", 4), ("b", 4), ("c", 2)):
        rows += submit(engine, runner_of(), number, client, tokens=1)
    order = []
    for row in rows:
        row.deliver = lambda event, row=row: order.append(row.client)
    while engine.waiting:
        computed(engine)
    assert "".join(order) == "abcabcabab"


def test_a_long_row_is_not_passed_over_for_ever(runner_of):
    engine = engine_of(max_batch_tokens=400)
    submit(engine, runner_of(), 19, "greedy")
    assert len(computed(engine)) == 15
    submit(engine, runner_of(), 1, "long", tokens=372)
    submit(engine, runner_of(), 1, "polite", tokens=1)
    engine.cancel(engine.batches[0].running[:5])  # it is the greedy one's turn, once
    assert computed(engine) == ["greedy"] * 11
    assert engine.waiting == 5  # the polite one, who has waited less than the long one, too
    end(engine, "greedy")
    assert computed(engine) == ["long"]
    assert engine.waiting == 4
    end(engine, "long")
    assert computed(engine) == ["greedy"] * 3  # and the polite one, who was answered at once


@pytest.mark.parametrize(
    ("error", "told"),
    [(RoutingError("no"), "no"), (ValueError("a secret"), FAILED)],
)
def test_a_pass_that_fails_fails_its_own_rows_alone(engine, runner_of, error, told):
    def fail(*_, **__):
        raise error

    rows = [row_of(runner_of("llama", router), prompt_of(1)) for router in ("arrow", "phatgoose")]
    with runner_of("llama", "arrow").model.register_forward_pre_hook(fail):
        for row in rows:
            engine.submit([row])
        failed, other = ended(rows)
    assert failed.deliver.events[0].detail == told
    assert other.finish == "length"


def test_a_prompt_that_can_t_be_read_fails_alone(engine, runner_of):
    runner = runner_of()
    (running,) = submit(engine, runner, 1, "one", tokens=300)
    until(lambda: running.generated)
    unread = row_of(runner, [VOCABULARY + 5])
    engine.submit([unread])
    failed, other = ended([unread, running])
    assert failed.deliver.events[0].detail == FAILED
    assert other.finish == "length"


def test_a_stopped_engine_fails_what_is_left(runner_of):
    engine = engine_of()
    engine.start()
    assert engine.is_alive
    (row,) = submit(engine, runner_of(), 1, "", tokens=3000)
    engine.stop()
    assert isinstance(row.deliver.events[-1], ApiError)
    assert not engine.is_alive
    with pytest.raises(ApiError, match="too many now"):
        submit(engine, runner_of(), 1, "")
