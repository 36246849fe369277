"""Prompts that begin as one before: what is kept of it changes no answer."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from batched import GREEDY, by_generate, finish, prompt_of, row_of
from phatgoose.apps.server.local.batches import Batch
from phatgoose.apps.server.local.runner import SHORTEST, ModelRunner, PrefixStore, Reader
from phatgoose.experts.pool import Pool
from phatgoose.passes import ActsOn
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of

pytestmark = pytest.mark.usefixtures("no_gradients")
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


def test_what_one_client_asked_is_no_others(runner_of):
    runner, store = runner_of(), PrefixStore(1 << 20)
    for client in ("one", "other"):
        _, passed = answers(runner, [LONG], store, client)
        assert passed[0] == 40
    _, passed = answers(runner, [LONG], store, "other")
    assert passed[0] == 1


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


def test_what_one_routing_read_is_no_others(runner_of):
    store = PrefixStore(1 << 20)
    for router in ("phatgoose", "merged", "arrow"):
        runner = runner_of("llama", router)
        _, passed = answers(runner, [LONG], store)
        assert passed[0] == 40


def test_the_body_that_the_base_read_serves_all_experts_that_act_from_the_end_on(llama, llama_pool):
    ends = [
        replace(each, info=replace(each.info, acts_on=ActsOn(3).record()))
        for each in llama_pool.experts
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


def test_whoever_wants_to_see_the_prompts_tokens_gets_them_read(runner_of):
    runner, store = runner_of(), PrefixStore(1 << 20)
    answers(runner, [LONG], store)
    _, passed = answers(runner, [LONG], store, routing=True)
    assert passed[0] == 40


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


def test_a_longer_prefix_takes_the_place_of_the_one_it_begins_with():
    store = PrefixStore(1 << 20)
    kept(store, "a", list(range(20)))
    kept(store, "a", list(range(30)))
    kept(store, "a", list(range(25)))  # known
    assert store.bytes == 2 * 2 * 4 * 4 * 30
    prefix, count = store.find(Reader("a", 99), [*range(22), 500, 501])
    assert (count, len(prefix.tokens)) == (22, 30)
    assert store.find(Reader("a", SHORTEST - 1), list(range(30))) is None  # too few
    assert store.find(Reader("b", 99), list(range(30))) is None
