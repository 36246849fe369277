"""What routers that choose for whole prompts have in common, composed and alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach, open_prompt_router, save
from phatgoose.routing.saved import add_to_saved
from routed_models import with_embeddings
from topic_prompts import PROMPTS, batch_of, both_streams, experts_of, tokens_of

pytestmark = [pytest.mark.usefixtures("toy_embedder"), pytest.mark.filterwarnings("ignore:k is")]

BY_TEXT = ("retrieval", "centroid")
each_router = pytest.mark.parametrize(
    "router", [*BY_TEXT, "discriminant", "discriminant:per_block=1"]
)


def assert_same(got, wanted) -> None:
    assert torch.equal(got.experts, wanted.experts)
    assert torch.equal(got.weights, wanted.weights)


@both_streams
@each_router
def test_beams_are_those_of_each_prompt_alone(base, pool, router):
    model = compose(with_embeddings(pool), base, router=router, k=2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    ids, mask = batch_of(base, PROMPTS[:3])
    got = model.generate(ids, attention_mask=mask, **options)[:, -5:]
    for row, real, answer in zip(ids, mask.bool(), got, strict=True):
        alone = row[real][None]
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(answer, wanted[0, -5:])


def test_experts_of_other_embeddings_do_not_join(llama, llama_pool, tmp_path):
    pool = with_embeddings(llama_pool)
    save(compose(pool.select(["e0", "e1"]), llama, router="centroid"), tmp_path / "routed")
    other = changed(pool, 2, embedder="another/one").experts[2]
    with pytest.raises(PoolError, match=r"statistics are .*another/one.*, those there .*sent"):
        add_to_saved(tmp_path / "routed", Pool((other,)))
    short = replace(pool.experts[2], embeddings=pool.experts[2].embeddings[:, :8])
    with pytest.raises(PoolError, match=r"centroids': \[8\].* those there .*\[64\]"):
        add_to_saved(tmp_path / "routed", Pool((short,)))


# Without a composed model


@both_streams
@each_router
def test_alone_it_chooses_as_in_a_composed_model(base, pool, router, tmp_path, monkeypatch):
    model = compose(with_embeddings(pool), base, router=router, k=2)
    prompts, wanted = tokens_of(model, PROMPTS), experts_of(model, PROMPTS)
    save(model, tmp_path / "routed")
    detach(model)
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")  # no weights are loaded
    for chooser in (
        open_prompt_router(with_embeddings(pool), base.tokenizer, router=router, k=2),
        open_prompt_router(tmp_path / "routed", base.tokenizer),
    ):
        assert chooser.experts == pool.names
        for asked in (prompts, PROMPTS):
            read = () if router in BY_TEXT else (base.model,)
            assert_same(chooser.choose(asked, *read), wanted)


def test_text_needs_no_tokenizer_where_it_is_embedded(llama, llama_pool):
    pool = with_embeddings(llama_pool)
    chooser, other = (
        open_prompt_router(pool, each, router="centroid") for each in (None, llama.tokenizer)
    )
    assert_same(chooser.choose(PROMPTS), other.choose(PROMPTS))


@pytest.mark.parametrize("prompts", [[], [""], [[], [1, 2]]])
def test_what_can_not_be_read_is_told(llama, llama_pool, prompts):
    chooser = open_prompt_router(llama_pool, llama.tokenizer, router="discriminant")
    with pytest.raises(RoutingError, match="can't choose for an empty prompt, or for none"):
        chooser.choose(prompts, llama.model)


def test_auto_is_one_that_reads_prompts(llama, llama_pool):
    assert open_prompt_router(llama_pool, llama.tokenizer).name == "discriminant"
    bare = Pool(tuple(replace(each, readings={}) for each in llama_pool.experts))
    with pytest.raises(PoolError, match="phatgoose stats"):
        open_prompt_router(bare, llama.tokenizer)


@pytest.mark.parametrize("router", ["phatgoose", "merged", "oracle", "retrieval:form=paper"])
def test_routers_that_need_more_than_a_prompt_are_refused(llama_pool, router):
    with pytest.raises(ConfigError, match=r"doesn't choose by a prompt alone|task's name|paper"):
        open_prompt_router(llama_pool, router=router)


# Embeddings


def changed(pool: Pool, z: int, **info: object) -> Pool:
    """The pool, of whose expert z the record says this."""
    experts = list(pool.experts)
    experts[z] = replace(experts[z], info=replace(experts[z].info, **info))
    return Pool(tuple(experts))


@pytest.mark.parametrize("router", BY_TEXT)
def test_pools_whose_embeddings_can_not_be_compared_are_refused(llama, llama_pool, router):
    pool = with_embeddings(llama_pool)
    short = replace(pool.experts[1], embeddings=pool.experts[1].embeddings[:, :8])
    cases = (
        (llama_pool, router, "'e0', .* have no embeddings: run 'phatgoose stats'"),
        (changed(pool, 0, embedder=None), router, "'e0' has no embeddings of prompts"),
        (changed(pool, 0, embedder="other/one"), router, "can.t be compared, .*other/one"),
        (Pool((pool.experts[0], short)), router, "can.t be compared, for they are of"),
        (with_embeddings(llama_pool, "paper"), router, "'e0' has no embeddings of prompts .*stats"),
        (pool, "retrieval:form=paper", "'e0' has no embeddings of inputs .*--embedding-form paper"),
    )
    for others, text, said in cases:
        with pytest.raises(PoolError, match=said):
            compose(others, llama, router=text)
