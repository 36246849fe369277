"""Which experts act on each row: announced or read, kept with caches, refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from phatgoose.errors import RoutingError
from phatgoose.passes import cache_argument
from phatgoose.routing.compose import compose, composition_of, detach, routing_for
from phatgoose.tasks.batching import position_ids
from routed_models import compose_by
from tiny import assert_same_logits, logits_of
from topic_prompts import OWNERS, PROMPTS, batch_of, both_streams, retrieving, tokens_of


def passed(base, model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at the real tokens of all rows in turn; a decoder reads what its encoder does."""
    inputs = {"decoder_attention_mask": mask} if base.is_encoder_decoder else {}
    inputs |= {} if base.is_encoder_decoder else {"position_ids": position_ids(mask)}
    return logits_of(model, ids, attention_mask=mask, **inputs)[mask.bool()]


def read_by(model) -> list[int]:
    """The best expert of each row of the routed `model`'s present batch."""
    return composition_of(model).context.choice.experts[:, 0].tolist()


@retrieving
@both_streams
def test_announced_prompts_are_those_of_the_passes(base, pool):
    model = compose_by("retrieval", pool, base)
    ids, mask = batch_of(base, PROMPTS)
    wanted = passed(base, model, ids, mask)
    with routing_for(model, tokens_of(model, PROMPTS)) as before_pass:
        assert read_by(model) == [int(name[1]) for name in OWNERS]
        assert_same_logits(passed(base, model, ids, mask.clone()), wanted)
        before_pass([3])
        other = batch_of(base, PROMPTS[:1])[0]  # what passes meanwhile isn't read
        model.generate(other, attention_mask=torch.ones_like(other), max_new_tokens=3)
        assert read_by(model) == [3]


@retrieving
def test_a_pass_that_is_computed_again_may_have_other_prompts_experts(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the name, which v6 changes
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(batch_of(llama, [p])[0]).logits.square().mean() for p in PROMPTS[:2]]
    with pytest.raises(RoutingError, match="as gradient checkpointing does"):
        sum(losses).backward()


@retrieving
def test_layers_that_take_tokens_in_another_order_have_one_choice(llama, llama_pool):
    llama.model.config.model_type = "led"  # as its encoder does
    model = compose_by("retrieval", llama_pool, llama)
    assert model(batch_of(llama, PROMPTS[:1])[0]).logits.isfinite().all()
    with pytest.raises(RoutingError, match="some layers take tokens in another order"):
        model(**dict(zip(("input_ids", "attention_mask"), batch_of(llama, PROMPTS), strict=True)))


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


@retrieving
def test_a_cache_keeps_the_experts_of_the_prompt_that_filled_it(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    context, name = composition_of(model).context, cache_argument(model)
    prompts = [batch_of(llama, PROMPTS[place : place + 1])[0] for place in (0, 1)]
    caches = [model(ids, use_cache=True)[name] for ids in prompts]
    for owner, (cache, ids) in enumerate(zip(caches, prompts, strict=True)):
        model(ids[:, -1:], **{name: cache}, use_cache=True)
        assert context.choice.experts.tolist() == [[owner]]
    caches[0].reset()  # an emptied one keeps nothing
    model.generate(prompts[1], **{name: caches[0]}, max_new_tokens=2)
    assert context.choice.experts.tolist() == [[1]]
    with pytest.raises(RoutingError, match="pass the whole prompt without"):
        model(ids[:, -1:], **{name: copy.deepcopy(caches[1])})


@pytest.mark.parametrize("by_place", [False, True])
def test_padding_without_a_mask_is_found_as_transformers_finds_it(llama, llama_pool, by_place):
    model = compose(llama_pool, llama, router="discriminant:temperature=10,fallback=off", k=2)
    wanted = composition_of(model).chooser.choose(tokens_of(model, PROMPTS[:3]))
    own, other = (None, 0) if by_place else (0, None)
    model.generation_config.pad_token_id = own
    config = GenerationConfig(max_new_tokens=1, pad_token_id=other)
    places, names = ([config], {}) if by_place else ([], {"generation_config": config})
    model.generate(batch_of(llama, PROMPTS[:3])[0], *places, **names)
    read = composition_of(model).context.choice
    assert torch.equal(read.experts, wanted.experts)
    torch.testing.assert_close(read.weights, wanted.weights)


def reading(model, ids, **options):
    """What `model` generates, and the choice it read."""
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
    return tokens, composition_of(model).context.choice


@retrieving
@pytest.mark.parametrize("mode", ["assistant", "prompt lookup"])
@pytest.mark.parametrize(
    ("kind", "router", "k"), [("llama", "discriminant", 1), ("t5", "centroid", 2)]
)
def test_drafts_of_an_answer_are_no_part_of_the_prompt(
    loaded_bases, pool_of, kind, router, k, mode
):
    base = loaded_bases[kind]
    alone = copy.deepcopy(base.model)
    options = {"assistant_model": alone} if mode == "assistant" else {"prompt_lookup_num_tokens": 4}
    model = compose_by(router, pool_of(kind), base, k=k)
    ids, _ = batch_of(base, ["plums, pears, plums, pears, plums"])
    (wanted, choice), (got, read) = reading(model, ids), reading(model, ids, **options)
    detach(model)
    assert torch.equal(got, wanted)
    assert torch.equal(read.experts, choice.experts)
    assert torch.equal(read.weights, choice.weights)


@retrieving
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_reads_its_own_prompts(llama, llama_pool, copied):
    model = compose_by("retrieval", llama_pool, llama)
    twin, ids = copied(model), batch_of(llama, PROMPTS[:1])[0]
    assert reading(twin, ids)[1].experts.tolist() == [[0]]
    assert composition_of(model).context.choice is None
