"""Several centroids of each expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from more_routers.centroids import clusters_of

from phatgoose.experts.pool import Pool
from phatgoose.routing.opening import open_chooser
from phatgoose.routing.routers.retrieval import centroids_of, embeddings_of
from routed_models import with_embeddings
from topic_prompts import PROMPTS, retrieving
from toy_embedders import toy_embed


def two_kinds(pool: Pool) -> Pool:
    """The pool whose first expert has trained on inputs of two kinds, far from each other."""
    some = with_embeddings(pool)
    first, *rest = some.experts
    rows = torch.nn.functional.normalize(torch.eye(*first.embeddings.shape[1:] * 2)[:6], dim=-1)
    near = torch.nn.functional.normalize(rows[:1] + 0.1 * rows[1:3], dim=-1)
    far = torch.nn.functional.normalize(rows[3:4] + 0.1 * rows[4:6], dim=-1)
    return Pool((replace(first, embeddings=torch.cat([near, far])), *rest))


def test_several_centroids_are_the_unit_means_of_clusters(llama_pool):
    pool = two_kinds(llama_pool)
    found = clusters_of(pool, 2)
    rows = pool.experts[0].embeddings
    wanted = torch.nn.functional.normalize(torch.stack([rows[:2].mean(0), rows[2:].mean(0)]), dim=1)
    got = found.rows[found.owners == 0]
    order = (got @ wanted[0]).argsort(descending=True)
    torch.testing.assert_close(got[order], wanted)
    # e1 has two rows; more clusters than different rows would have nobody in them.
    assert found.owners.bincount().tolist() == [2, 2, 2, 2]
    assert clusters_of(pool, 3).owners.bincount()[1] == 2
    torch.testing.assert_close(clusters_of(pool, 1).rows, centroids_of(embeddings_of(pool)))


@retrieving
def test_of_several_centroids_the_nearest_counts(llama, llama_pool):
    pool = with_embeddings(llama_pool)
    router = open_chooser(pool, llama.tokenizer, router="centroids")
    scores = router.score(list(PROMPTS))
    wanted = torch.stack(
        [(toy_embed(PROMPTS) @ rows.T).amax(dim=1) for rows in clusters_by_hand(pool, 3)], dim=1
    )
    torch.testing.assert_close(scores, wanted)


def clusters_by_hand(pool: Pool, clusters: int) -> list[torch.Tensor]:
    found = clusters_of(pool, clusters)
    return [found.rows[found.owners == z] for z in range(len(pool))]
