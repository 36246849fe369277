"""Router centroid beside cosines and mixtures by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mixed_by_hand import assert_rows_are_mixed
from phatgoose.experts.pool import Pool
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.centroid import centroids_of
from routed_models import compose_by, with_embeddings
from topic_prompts import PROMPTS, both_streams, experts_of, retrieving
from toy_embedders import toy_embed


def shares(pool: Pool, text: str, k: int = 3, temperature: float = 0.2) -> dict[str, float]:
    """The experts of a prompt and their weights, one cosine at a time."""
    (query,) = toy_embed([text]).double()
    cosines = {}
    for expert in with_embeddings(pool).experts:
        mean = expert.embeddings.double().mean(dim=0)
        cosines[expert.name] = float(query @ mean / mean.norm())
    chosen = sorted(cosines, key=lambda name: -cosines[name])[:k]
    powers = {name: math.exp(cosines[name] / temperature) for name in chosen}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def assert_found(model, pool: Pool, **options) -> None:
    mixtures = experts_of(model, PROMPTS)
    for row, text in enumerate(PROMPTS):
        got = zip(mixtures.experts[row].tolist(), mixtures.weights[row].tolist(), strict=True)
        wanted = shares(pool, text, **options)
        names = composition_of(model).experts
        assert {names[z]: w for z, w in got} == pytest.approx(wanted, abs=1e-5)


@retrieving
@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, {}),  # three, and 0.2
        ({"k": 1}, {"k": 1}),
        ({"k": 2, "temperature": 1.0}, {"k": 2, "temperature": 1.0}),
    ],
)
def test_the_nearest_means_are_weighted_by_the_softmax_of_their_cosines(
    llama, llama_pool, options, used
):
    assert_found(compose_by("centroid", llama_pool, llama, **options), llama_pool, **used)


def test_the_length_of_an_embedding_does_not_count(llama_pool):
    some = with_embeddings(llama_pool)
    first, *rest = some.experts
    longer = Pool((replace(first, embeddings=3 * first.embeddings), *rest))
    torch.testing.assert_close(centroids_of(longer).rows, centroids_of(some).rows)
    torch.testing.assert_close(centroids_of(some).rows.norm(dim=-1), torch.ones(4))


@retrieving
@both_streams
def test_every_row_of_a_padded_batch_is_its_mixture_by_hand(base, pool):
    wanted = [shares(pool, text) for text in PROMPTS]
    assert_rows_are_mixed(base, pool, lambda: compose_by("centroid", pool, base), wanted)
