"""Answers in batches: what each gets and reports, where it ends, and what prompts share."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from batched import GREEDY, TOKENIZER, alone, by_generate, finish, prompt_of, row_of
from phatgoose.analysis.traces import trace
from phatgoose.apps.server.local.batches import Batch, Sampler
from phatgoose.apps.server.local.runner import ModelRunner, PrefixStore, Reader
from phatgoose.apps.server.requests import Decoding
from phatgoose.base import load_base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.tasks.encoding import Encoder
from routed_models import compose_by
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("no_gradients")

OTHERS = ("average-activation", "arrow", "spectr", "merged", "single")
OTHERS += ("retrieval", "centroid", "discriminant", "discriminant:per_block=1")


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
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(seed, 20 - 7 * seed)) for seed in range(3)]
    batch.join(rows[:1])
    batch.step()
    batch.join(rows[1:])
    finish(batch)
    for seed, row in enumerate(rows):
        assert row.generated == by_generate(runner, prompt_of(seed, 20 - 7 * seed), 12)


@pytest.mark.parametrize("router", OTHERS)
def test_other_routers_batch_as_well(runner_of, router, toy_embedder):
    runner = runner_of("llama", router)
    batch = Batch(runner)
    turns = runner.routings_of([prompt_of(seed) for seed in range(4)])
    rows = [row_of(runner, prompt_of(seed), turn=turns[seed]) for seed in range(4)]
    batch.join(rows[:2])
    batch.step()
    batch.join(rows[2:])
    finish(batch)
    for seed, row in enumerate(rows):
        runner.model.phatgoose.context and runner.model.phatgoose.context.use(None)
        assert row.generated == by_generate(runner, prompt_of(seed), 12)


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


@pytest.mark.parametrize("router", ["phatgoose", "centroid"])
def test_experts_that_act_from_a_prompts_end_on(pool_of, router, toy_embedder):
    """Rows join and leave, as in a model that generates."""
    pool, tails = pool_of("llama"), (3, None, 6, 1)
    pool = Pool(
        tuple(
            replace(each, info=replace(each.info, acts_on=tail and {"tail": tail}))
            for each, tail in zip(pool.experts, tails, strict=True)
        )
    )
    base = load_base(pool.base.id, dtype="float32")
    runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
    runner.ends = frozenset()
    prompts = [prompt_of(0), [*prompt_of(1), 7, 8, 9], prompt_of(2), [7, 8, *prompt_of(1)]]
    wanted = [by_generate(runner, prompt, 12) for prompt in prompts]  # before it is announced to
    rows = [
        row_of(runner, prompt, replace(GREEDY, max_tokens=n), 0, "", turn)
        for prompt, n, turn in zip(prompts, (9, 2, 6, 4), runner.routings_of(prompts), strict=True)
    ]
    batch = Batch(runner)
    batch.join(rows[:2])
    batch.step()
    batch.step()
    batch.join(rows[2:])
    finish(batch)
    for row, answer in zip(rows, wanted, strict=True):
        assert row.generated == answer[: row.decoding.max_tokens]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_log_probabilities_are_those_of_one_pass(runner_of, kind):
    runner = runner_of(kind)
    wish = Decoding(5, 0.0, logprobs=3)
    rows = [row_of(runner, prompt_of(seed), wish) for seed in (1, 2)]
    batch = Batch(runner)
    batch.join(rows)
    finish(batch)
    for seed, row in zip((1, 2), rows, strict=True):
        ids = torch.tensor([[*prompt_of(seed), *row.generated]])
        logits = runner.model(ids).logits[0, -1 - len(row.generated) : -1]
        wanted, told = logits.float().log_softmax(-1), row.deliver.tokens
        for token, target, scores in zip(told, row.generated, wanted, strict=True):
            assert token.logprob == pytest.approx(scores[target].item(), abs=2e-4)
            best = scores.topk(3).values.tolist()
            assert [p for _, p in token.top] == pytest.approx(best, abs=2e-4)


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


def advance(row, token):
    """Let `token` be the one that is chosen."""
    row.advance(torch.nn.functional.one_hot(torch.tensor(token), 300).float())


TEXTS = st.text(st.sampled_from("a \n.äß漢\u0301😀👩\u200d🚀"), min_size=1, max_size=12)


@given(TEXTS, TEXTS, st.sampled_from([(), ("😀",), ("a.", "漢漢")]))
def test_each_token_is_placed_where_its_character_begins(runner_of, prompt, answer, stop):
    """The tokenizer has a token for each byte, so most characters consist of several."""
    runner = runner_of()
    before, after = (runner.tokenizer(text)["input_ids"] for text in (prompt, answer))
    wish = Decoding(len(after), 0.0, stop=stop, logprobs=0)
    row = row_of(runner, before, wish)
    for token in after:
        if row.finish is None:
            advance(row, token)
    places = [place for place, each in enumerate(answer) for _ in each.encode()]
    told = row.deliver.tokens
    assert [token.place for token in told] == places[: len(told)]
    for token in told:
        assert token.text in (answer[token.place], "\ufffd")
    assert answer.startswith(row.deliver.text)
    assert row.finish == "stop" or row.deliver.text == answer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_routing_is_that_of_one_pass(runner_of, kind):
    """Prompt and answer traced at once, as `explain` does, from rows that shared a batch."""
    runner = runner_of(kind)
    texts = ["to be, or not", "who?"]
    encoder = Encoder(runner.tokenizer, is_encoder_decoder=False)
    prompts = [encoder.prompt(text) for text in texts]
    rows = [row_of(runner, prompt, Decoding(6, 0.0, routing=True)) for prompt in prompts]
    batch = Batch(runner)
    batch.join([*rows, row_of(runner, prompt_of(5))])
    finish(batch)
    for prompt, text, row in zip(prompts, texts, rows, strict=True):
        got = row.deliver.routing
        experts = np.concatenate([s.experts for s in got])
        weights = np.concatenate([s.weights for s in got])
        assert weights[-1].max() == 0  # the last token never passed the model
        assert "".join(t for s in got for t in s.tokens) == text + "".join(row.shown)
        assert [p for s in got for p in s.parts] == [0] * len(row.prompt) + [1] * 6
        pair = replace(encoder.pair("a", "b"), prompt=prompt, target=row.generated)
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


# Prompts that begin as one before: what is kept of it changes no answer.

LONG = prompt_of(5, 40)
SHARED = (*LONG[:30], 7, 8, 9)  # begins as LONG does


def answers(runner, prompts, store, client="", **changes):
    """Each prompt's answer in a batch of all, and the tokens that passed the model."""
    passed, decode = [], runner.decode
    runner.decode = lambda ids, *rest, **more: (
        passed.append(ids.shape[1]) or decode(ids, *rest, **more)
    )
    turns = runner.routings_of(prompts)
    wish = replace(GREEDY, **changes)
    pairs = zip(prompts, turns, strict=True)
    rows = [row_of(runner, prompt, wish, client=client, turn=turn) for prompt, turn in pairs]
    batch = Batch(runner, store)
    batch.join(rows)
    finish(batch)
    runner.decode = decode
    return [row.generated for row in rows], passed


@pytest.mark.parametrize("router", ["phatgoose", "discriminant", "merged"])
def test_a_beginning_is_read_once_and_answers_stay(runner_of, router):
    runner, store = runner_of("llama", router), PrefixStore(1 << 20)
    (first,), passed = answers(runner, [LONG], store)
    assert passed[0] == 40
    (again,), passed = answers(runner, [LONG], store)
    assert again == first
    assert passed[0] == 1


def test_what_one_client_asked_or_one_routing_read_is_no_others(runner_of):
    store = PrefixStore(1 << 20)
    for router, client in (("phatgoose", "one"), ("phatgoose", "other"), ("merged", "one")):
        _, passed = answers(runner_of("llama", router), [LONG], store, client)
        assert passed[0] == 40
    runner = runner_of()
    assert answers(runner, [LONG], store, "other")[1][0] == 1
    _, passed = answers(runner, [LONG], store, "other", routing=True)
    assert passed[0] == 40  # whoever wants to see the prompt's tokens gets them read


def test_rows_with_and_without_a_known_beginning_share_a_batch(runner_of):
    runner, store = runner_of(), PrefixStore(1 << 20)
    answers(runner, [LONG], store)
    prompts = [SHARED, prompt_of(6, 12), LONG, prompt_of(7, 25)]
    found, passed = answers(runner, prompts, store)
    assert passed[0] == 25  # of the longest that nothing is known of
    assert found == [by_generate(runner, prompt, 12) for prompt in prompts]


def test_a_conversation_goes_on_from_its_answers(runner_of):
    runner, store = runner_of(), PrefixStore(1 << 20)
    (answer,), _ = answers(runner, [LONG], store)
    turn = (*LONG, *answer, 3, 4, 5)
    (found,), passed = answers(runner, [turn], store)
    assert passed[0] == 4  # the last token of the answer never passed
    assert found == by_generate(runner, turn, 12)


def test_the_body_that_the_base_read_serves_all_experts_that_act_from_the_end_on(llama, llama_pool):
    ends = [
        replace(each, info=replace(each.info, acts_on={"tail": 3})) for each in llama_pool.experts
    ]
    store = PrefixStore(1 << 20)
    answers(ModelRunner(llama.model, llama.tokenizer), [LONG], store)
    for name in llama_pool.names:
        model = compose(Pool(tuple(ends)), llama, router=f"single:expert={name}")
        runner = ModelRunner(model, llama.tokenizer)
        (found,), passed = answers(runner, [LONG], store)
        assert passed[0] == 3
        composition_of(model).context.use(None)
        assert found == by_generate(runner, LONG, len(found))
        detach(model)


def cache_of(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4), 0)
    return cache


def kept(store: PrefixStore, reader: str, tokens: list[int]) -> None:
    store.keep(Reader(reader, 99), tokens, cache_of(len(tokens)), 0, torch.ones(len(tokens)))


def test_a_store_keeps_to_its_bytes_and_drops_what_was_not_used_for_longest():
    each = 2 * 2 * 4 * 4 * 20  # two sides, heads, columns, bytes and tokens
    store = PrefixStore(3 * each)
    for reader in "abc":
        kept(store, reader, list(range(20)))
    assert store.bytes == 3 * each
    assert store.find(Reader("a", 99), list(range(20))) is not None
    kept(store, "d", list(range(20)))
    found = [bool(store.find(Reader(reader, 99), list(range(20)))) for reader in "abcd"]
    assert found == [True, False, True, True]
    assert store.bytes == 3 * each
    kept(store, "e", list(range(80)))  # larger than all
    assert store.bytes == 3 * each
