"""Routers that read prompts: when they read, and what they can't read."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from phatgoose.base.token_masks import cache_argument
from phatgoose.errors import ConfigError, EvaluationError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import announcing, composition_of
from phatgoose.routing.routers.mixtures import Mixtures
from routed_models import compose_by, with_embeddings
from tiny import assert_same_logits, logits_of, make_ids
from topic_prompts import (
    CHOOSING,
    OWNERS,
    PROMPTS,
    batch_of,
    both_streams,
    by_single,
    passed,
    retrieving,
)


@retrieving
@both_streams
def test_the_next_batch_has_its_own_experts(base, pool):
    model = compose_by("retrieval", pool, base)
    for texts in (PROMPTS[:2], PROMPTS[2:], PROMPTS[:1]):
        passed(base, model, *batch_of(base, texts))
        owners = OWNERS[PROMPTS.index(texts[0]) :][: len(texts)]
        assert composition_of(model).lookup.mixtures.experts.flatten().tolist() == [
            int(name[1]) for name in owners
        ]


@retrieving
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"], indirect=True)
def test_tokens_after_a_cached_prompt_keep_its_experts(base, pool):
    model = compose_by("retrieval", pool, base)
    ids, mask = batch_of(base, PROMPTS)
    whole = logits_of(model, ids, attention_mask=mask)
    owners = composition_of(model).lookup.mixtures.experts.flatten().tolist()
    longer = torch.cat([mask, torch.ones(len(ids), 3).long()], dim=1)
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    first = logits_of(model, ids, attention_mask=mask, use_cache=True, **cache)
    logits_of(model, make_ids(len(ids), 3), attention_mask=longer, use_cache=True, **cache)
    assert composition_of(model).lookup.mixtures.experts.flatten().tolist() == owners
    assert_same_logits(first, whole)


@retrieving
@both_streams
def test_after_an_evaluation_prompts_are_read_again(base, pool):
    model = compose_by("retrieval", pool, base)
    wanted = passed(base, model, *batch_of(base, PROMPTS))
    evaluate(model, CHOOSING)
    assert torch.equal(passed(base, model, *batch_of(base, PROMPTS)), wanted)
    with announcing(model, "any", [[1, 2, 3]]) as before_pass:
        before_pass([0])
    assert torch.equal(passed(base, model, *batch_of(base, PROMPTS)), wanted)


def test_a_bare_model_has_no_tokenizer_to_read_prompts_with(llama, llama_pool):
    modules = dict(llama.model.named_modules())
    with pytest.raises(ConfigError, match="tokenizer"):
        compose(with_embeddings(llama_pool), llama.model, router="retrieval")
    assert dict(llama.model.named_modules()) == modules


@retrieving
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_embedded_inputs_can_not_be_read(base, pool):
    model = compose_by("retrieval", pool, base)
    embedded = model.get_input_embeddings()(make_ids(rows=2))
    with pytest.raises(RoutingError, match="pass input_ids"):
        model(inputs_embeds=embedded)
    composition_of(model).lookup.serve(Mixtures.alone(torch.tensor([1, 3])))
    got = model(inputs_embeds=embedded).logits
    composition_of(model).lookup.serve(None)
    detach(model)
    wanted = by_single(
        base, pool, ("e1", "e3"), lambda m, i: m(inputs_embeds=embedded[i : i + 1]).logits
    )
    assert_same_logits(got, torch.cat(wanted))


@retrieving
def test_an_evaluation_that_fails_leaves_the_router_reading(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    wanted = logits_of(model, batch_of(llama, PROMPTS[:1])[0])
    llama.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not numbers"):
        evaluate(model, CHOOSING)
    assert logits_of(model, batch_of(llama, PROMPTS[:1])[0]).shape == wanted.shape
    assert composition_of(model).lookup.mixtures.experts.flatten().tolist() == [0]


def cache_in(output):
    return next(value for value in output.values() if hasattr(value, "get_seq_length"))


@retrieving
def test_a_cache_keeps_the_experts_of_the_prompt_that_filled_it(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    lookup = composition_of(model).lookup
    filled = {}
    for place in (0, 1):
        ids, mask = batch_of(llama, PROMPTS[place : place + 1])
        out = model(ids, attention_mask=mask, use_cache=True)
        filled[place] = cache_in(out), ids, lookup.mixtures.experts.tolist()
    assert filled[0][2] != filled[1][2]
    for place in (0, 1):
        cache, ids, owners = filled[place]
        model(ids[:, -1:], **{cache_argument(model): cache}, use_cache=True)
        assert lookup.mixtures.experts.tolist() == owners


@retrieving
def test_a_cache_that_was_not_read_is_refused(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    ids, _ = batch_of(llama, PROMPTS[:1])
    copied = copy.deepcopy(cache_in(model(ids, use_cache=True)))
    with pytest.raises(RoutingError, match="pass the whole prompt without a cache"):
        model(ids[:, -1:], **{cache_argument(model): copied})
    assert copy.deepcopy(composition_of(model).lookup).mixtures is None  # copies begin anew


@retrieving
def test_a_prompt_one_token_longer_is_read_anew(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    lookup, seen = composition_of(model).lookup, []
    reads = lookup.find
    lookup.find = lambda prompts: seen.append(prompts) or reads(prompts)
    ids, _ = batch_of(llama, PROMPTS[:1])
    model(ids[:, :-1])
    model(ids)
    assert [len(prompts[0]) for prompts in seen] == [ids.shape[1] - 1, ids.shape[1]]
    seen.clear()
    model.generate(ids, use_cache=False, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(seen) == 1


@retrieving
@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_encoder_outputs_of_other_prompts_are_refused(base, pool):
    model = compose_by("retrieval", pool, base)
    start = torch.tensor([[0]])
    first, second = (batch_of(base, PROMPTS[place : place + 1])[0] for place in (0, 1))
    encoded = model.get_encoder()(first)
    wanted = model(encoder_outputs=encoded, decoder_input_ids=start).logits
    model.generate(second, num_beams=2, max_new_tokens=2)  # its rows are given to the beams
    with pytest.raises(RoutingError, match="pass input_ids in their place"):
        model(encoder_outputs=encoded, decoder_input_ids=start)
    assert_same_logits(model(first, decoder_input_ids=start).logits, wanted)
