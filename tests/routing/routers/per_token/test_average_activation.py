"""Router average-activation: PHATGOOSE's formula with mean activations."""

from __future__ import annotations

from oracle import naively_routed
from phatgoose.routing.compose import compose
from tiny import assert_same_logits, logits_of, make_ids


def test_average_activation_scores_with_the_means(base, pool):
    ids = make_ids()
    with naively_routed(base.model, pool.experts, k=2, vectors="means"):
        wanted = logits_of(base.model, ids)
    got = logits_of(compose(pool, base, k=2, router="average-activation"), ids)
    assert_same_logits(got, wanted)
