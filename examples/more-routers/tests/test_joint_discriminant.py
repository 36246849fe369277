"""Router joint-discriminant, against Gaussian log-likelihoods by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from discriminants import gaussian_scores, scores_by_hand
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from routed_models import with_embeddings
from topic_prompts import PROMPTS, both_streams, retrieving, scores_of
from toy_embedders import toy_embed

NAME = "joint-discriminant"

pytestmark = retrieving


def embedding_scores(pool: Pool, text: str, **how: float) -> torch.Tensor:
    """The scores by what experts embedded, whole covariances from the rows themselves."""
    (query,) = toy_embed([text]).double()
    rows = [expert.embeddings.double() for expert in with_embeddings(pool).experts]
    spreads = [torch.cov(own.T, correction=0) for own in rows]
    return gaussian_scores(query, [own.mean(dim=0) for own in rows], spreads, **how)


@both_streams
@pytest.mark.parametrize(
    ("settings", "share", "shrinkage"),
    [
        ("", 0.5, 0.3),
        (":embedding_share=0", 0.0, 0.3),
        (":embedding_share=0.8,shrinkage=0.9", 0.8, 0.9),
        (":embedding_share=1", 1.0, 0.3),
    ],
)
def test_scores_are_means_of_two_discriminants(base, pool, settings, share, shrinkage):
    wanted = []
    for text in PROMPTS:
        read = scores_by_hand(pool, text, shrinkage, 1.0).mean(dim=0)
        embedded = embedding_scores(pool, text, shrinkage=shrinkage, task_variance=1.0)
        wanted.append((1 - share) * read + share * embedded)
    model = compose(with_embeddings(pool), base, router=NAME + settings)
    got = scores_of(model, PROMPTS).double()
    torch.testing.assert_close(got, torch.stack(wanted), atol=5e-4, rtol=2e-3)


def test_a_strangers_embedder_must_be_named(llama, llama_pool):
    experts = with_embeddings(llama_pool).experts
    other = [replace(e, info=replace(e.info, embedder="them/theirs")) for e in experts]
    with pytest.raises(ConfigError, match="--embedder"):
        compose(Pool(tuple(other)), llama, router=NAME)
    compose(Pool(tuple(other)), llama, router=NAME, embedder="them/theirs")
