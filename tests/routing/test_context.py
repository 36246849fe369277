"""Which experts act on each row: announced or read, kept with caches, refused."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from phatgoose.errors import RoutingError
from phatgoose.passes import cache_argument
from phatgoose.routing.compose import compose, composition_of, detach, routing_for
from phatgoose.routing.context import Choice, RoutingContext, base_alone
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.recording import record
from phatgoose.routing.routers.prompt import ByPrompt, PromptRouter, Tables
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.sites import prompt_stack
from routed_models import compose_by
from tiny import assert_same_logits
from topic_prompts import (
    OWNERS,
    PROMPTS,
    batch_of,
    both_streams,
    by_single,
    passed,
    read_by,
    retrieving,
    tokens_of,
)


def choice_of(*rows: dict[int, float]) -> Choice:
    """A choice written out: the experts of each row and their weights."""
    return Choice(
        torch.tensor([list(row) for row in rows]), torch.tensor([[*row.values()] for row in rows])
    )


def site_of(experts: list[int], *rows: dict[int, float]) -> SiteRouter:
    """The router of a site where these of four experts act, with the choice of a batch."""
    chooser = PromptRouter(ByPrompt(), Tables(("e0", "e1", "e2", "e3")))
    router = SiteRouter(chooser.router, "blocks.1.linear", torch.tensor(experts), 4, {})
    router.context = RoutingContext(chooser)
    router.context.use(choice_of(*rows) if rows else None)
    return router


def test_tokens_belong_to_the_rows_in_turn():
    decision = site_of([0, 2, 3], {3: 1.0}, {1: 1.0}, {0: 1.0})(torch.zeros(6, 5))
    assert decision.experts[:, 0].tolist()[:2] == [2, 2]  # e3 is the third of this site
    assert decision.experts[:, 0].tolist()[4:] == [0, 0]
    assert decision.weights[:, 0].tolist() == [1, 1, 0, 0, 1, 1]  # e1 isn't here
    one = site_of([0, 1], {1: 1.0})(torch.zeros(7, 5))  # one row serves any number of tokens
    assert one.experts[:, 0].tolist() == [1] * 7
    assert site_of([0, 1], {1: 1.0})(torch.zeros(0, 5)).experts.shape == (0, 1)


def test_blocks_may_have_choices_of_their_own():
    router = site_of([0, 1, 2, 3], {0: 1.0})  # in block 1
    experts = torch.tensor([[[3], [1]], [[2], [2]]])
    router.context.use(choice := Choice(experts, torch.ones(2, 2, 1)))
    assert router(torch.zeros(4, 5)).experts[:, 0].tolist() == [1, 1, 2, 2]
    assert choice.at(7).experts[:, 0].tolist() == [1, 2]  # a model with more blocks: the last
    assert choice.named("abcd") == [{"b": 0.5, "d": 0.5}, {"c": 1.0, "a": 0.0}]


@retrieving
@both_streams
def test_announced_prompts_are_those_of_the_passes(base, pool):
    model = compose_by("retrieval", pool, base)
    ids, mask = batch_of(base, PROMPTS)
    wanted = passed(base, model, ids, mask)
    with routing_for(model, tokens_of(model, PROMPTS)) as before_pass:
        cut = mask.clone()
        assert read_by(model) == [int(name[1]) for name in OWNERS]
        assert_same_logits(passed(base, model, ids, cut), wanted)
        before_pass([3])
        assert read_by(model) == [3]
        answer = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        other = batch_of(base, PROMPTS[:1])[0]
        got = model.generate(other, attention_mask=torch.ones_like(other), **answer)
        assert read_by(model) == [3]  # what passes meanwhile isn't read
    detach(model)
    (by_third,) = by_single(
        base,
        pool,
        ("e3",),
        lambda m, _: m.generate(other, attention_mask=torch.ones_like(other), **answer),
    )
    assert torch.equal(got, by_third)


@both_streams
@torch.no_grad()
def test_the_base_is_alone_while_it_is_read(base, pool):
    ids, _ = batch_of(base, PROMPTS[:1])
    hidden = prompt_stack(base.model)(input_ids=ids)[0]
    model = compose(pool, base, router="discriminant")
    context = composition_of(model).context
    context.use(Choice.alone(torch.tensor([3])))
    computed = mock.patch.object(RoutedLinear, "_product", side_effect=AssertionError)
    with record(model) as recording, base_alone(model), computed:
        assert torch.equal(prompt_stack(model)(input_ids=ids)[0], hidden)
    assert not recording.weights  # nobody watches either
    assert context.choice.experts.tolist() == [[3]]  # as before
    assert not torch.equal(prompt_stack(model)(input_ids=ids)[0], hidden)
    context.use(None)
    detach(model)
    with pytest.raises(RoutingError, match="experts act on every token; hand over the base"):
        base_alone(compose(pool, base, router="phatgoose")).__enter__()


@retrieving
@torch.no_grad()
def test_an_encoders_outputs_are_those_of_their_own_prompts_after_an_announcement(
    loaded_bases, pool_of
):
    base = loaded_bases["t5"]
    model = compose_by("retrieval", pool_of("t5"), base)
    (first, _), (second, _) = (batch_of(base, PROMPTS[i : i + 1]) for i in (0, 3))
    answer = torch.zeros(1, 1, dtype=torch.long)
    read = model.get_encoder()(input_ids=first)
    wanted = model(encoder_outputs=read, decoder_input_ids=answer).logits
    with routing_for(model, tokens_of(model, PROMPTS[3:4])):
        others = model.get_encoder()(input_ids=second)
    assert torch.equal(model(encoder_outputs=read, decoder_input_ids=answer).logits, wanted)
    got = model(encoder_outputs=others, decoder_input_ids=answer).logits
    assert_same_logits(got, model(second, decoder_input_ids=answer).logits)
    copied = (others[0].clone(),)
    with pytest.raises(RoutingError, match="pass the whole prompt without"):
        model(encoder_outputs=copied, decoder_input_ids=answer)
    detach(base.model)


def cache_in(output):
    return next(value for value in output.values() if hasattr(value, "get_seq_length"))


@retrieving
def test_a_cache_keeps_the_experts_of_the_prompt_that_filled_it(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    context = composition_of(model).context
    filled = {}
    for place in (0, 1):
        ids, mask = batch_of(llama, PROMPTS[place : place + 1])
        out = model(ids, attention_mask=mask, use_cache=True, return_dict=place == 0)
        cache = cache_in(out) if place == 0 else out[1]
        filled[place] = cache, ids, context.choice.experts.tolist()
    assert filled[0][2] != filled[1][2]
    for place in (0, 1):
        cache, ids, owners = filled[place]
        model(ids[:, -1:], **{cache_argument(model): cache}, use_cache=True)
        assert context.choice.experts.tolist() == owners


@retrieving
def test_a_cache_that_was_emptied_keeps_nothing(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    cache = {cache_argument(model): DynamicCache()}
    owners = []
    for place in (0, 1):
        cache[cache_argument(model)].reset()
        model.generate(batch_of(llama, PROMPTS[place : place + 1])[0], **cache, max_new_tokens=2)
        owners.append(composition_of(model).context.choice.experts.tolist())
    assert owners == [[[0]], [[1]]]


@retrieving
def test_a_cache_that_was_not_read_is_refused(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    ids, _ = batch_of(llama, PROMPTS[:1])
    copied = copy.deepcopy(cache_in(model(ids, use_cache=True)))
    with pytest.raises(RoutingError, match="pass the whole prompt without"):
        model(ids[:, -1:], **{cache_argument(model): copied})
    assert copy.deepcopy(composition_of(model).context).choice is None  # copies begin anew


REPEATING = ("plums, pears, plums, pears, plums", "5 + 6 = 11, 5 + 6 = 11, 5 +", "WHO? WHY? WHO? W")
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
ASSISTED = {
    "assistant": lambda alone: {"assistant_model": alone},
    "prompt lookup": lambda alone: {"prompt_lookup_num_tokens": 4},
}


def reading(model, ids, **options):
    """What `model` generates, the choice it read, and the columns of its first pass."""
    columns, name = [], "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    look = model.register_forward_pre_hook(
        lambda _, args, given: columns.append(given[name].shape[1]), with_kwargs=True
    )
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    look.remove()
    return tokens, composition_of(model).context.choice, columns[0]


@retrieving
@pytest.mark.parametrize("mode", ASSISTED)
@pytest.mark.parametrize(("router", "k"), [("discriminant", 1), ("centroid", 2)])
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_drafts_of_an_answer_are_no_part_of_the_prompt(base, pool, router, k, mode):
    alone = copy.deepcopy(base.model)
    model = compose_by(router, pool, base, k=k)
    drafted = []
    for text in REPEATING:
        ids, _ = batch_of(base, [text])
        wanted, mixture, _ = reading(model, ids)
        got, read, columns = reading(model, ids, **ASSISTED[mode](alone))
        assert torch.equal(got, wanted)
        assert torch.equal(read.experts, mixture.experts)
        assert torch.equal(read.weights, mixture.weights)
        drafted.append(columns > ids.shape[1])
    assert base.is_encoder_decoder or all(drafted)  # else the test shows nothing


@retrieving
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_reads_its_own_prompts(llama, llama_pool, copied):
    model = compose_by("retrieval", llama_pool, llama)
    twin, ids = copied(model), batch_of(llama, REPEATING[:1])[0]
    _, mixture, _ = reading(twin, ids, prompt_lookup_num_tokens=4)
    assert composition_of(model).context.choice is None
    assert torch.equal(mixture.experts, reading(model, ids)[1].experts)
