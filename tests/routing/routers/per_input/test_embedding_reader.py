"""Lookups by embeddings: what is embedded, and what can't be compared."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import PoolError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers import prompt_router as embedding_reader
from phatgoose.routing.routers.prompt_router import embeddings_of
from phatgoose.tasks.task import Example
from routed_models import with_embeddings
from topic_prompts import PROMPTS, experts_of, tokens_of
from toy_embedders import toy_embed


@pytest.mark.parametrize("router", ["retrieval", "centroid", "glider", "joint-discriminant"])
def test_texts_are_embedded_as_training_inputs_are(
    llama, llama_pool, toy_embedder, monkeypatch, router
):
    seen = []
    lookup = composition_of(compose(with_embeddings(llama_pool), llama, router=router)).lookup
    monkeypatch.setattr(
        embedding_reader, "embed_texts", lambda *given: seen.append(given) or toy_embed(given[0])
    )
    experts_of(lookup, PROMPTS[:1])
    lookup.find(tokens_of(lookup, ["a"]), [Example("a", "b", ("b", "c"))])
    assert [texts for texts, _ in seen] == [["plums or apples"], ["a"]]


def test_embeddings_of_another_size_are_refused(llama, llama_pool, toy_embedder, monkeypatch):
    model = compose(with_embeddings(llama_pool), llama, router="centroid")
    monkeypatch.setattr(
        embedding_reader, "embed_texts", lambda texts, *_: torch.ones(len(texts), 3)
    )
    with pytest.raises(RoutingError, match=r"have 64 columns, those of .* 3; they are another"):
        experts_of(composition_of(model).lookup, PROMPTS)


def test_the_pools_embeddings_are_told_apart_by_owner_and_embedder(llama_pool):
    pool = with_embeddings(llama_pool)
    found = embeddings_of(pool)
    assert found.owners.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    torch.testing.assert_close(found.rows, torch.cat([e.embeddings for e in pool.experts]))
    with pytest.raises(PoolError, match=r"come from .*, those there from another/one"):
        embeddings_of(Pool(pool.experts[:1]), "another/one")
