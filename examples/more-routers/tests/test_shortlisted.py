"""PHATGOOSE among the experts that a prompt's discriminant names."""

from __future__ import annotations

import math

import pytest
import torch

from phatgoose.routing.choice import Choice
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.routers.phatgoose import standardise
from tiny import assert_same_logits, logits_of, make_ids, random

NAME = "discriminant-phatgoose"
both_streams = pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)


def by_hand(gates, u, shortlist, shares, k, prior) -> dict[int, float]:
    """The weights of one token's experts, in plain numbers."""
    bar = (u - u.mean()) / (u.var(correction=0) + 1e-5).sqrt()
    scores = {
        z: float(bar @ gates[z]) / math.sqrt(len(u)) + prior * math.log(share)
        for z, share in zip(shortlist, shares, strict=True)
    }
    best = sorted(scores, key=lambda z: -scores[z])[:k]
    total = sum(math.exp(scores[z]) for z in best)
    return {z: math.exp(scores[z]) / total for z in best}


@both_streams
@pytest.mark.parametrize("prior", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gates_choose_within_each_rows_shortlist(base, pool, k, prior):
    model = compose(pool, base, router=f"{NAME}:prior={prior}", k=k)
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    shortlists = torch.tensor([[3, 0, 2], [1, 2, 0]])
    composition_of(model).context.use(Choice(shortlists, shares))
    for site, layer in composition_of(model).layers.items():
        u = random(6, layer.in_features)  # three tokens of each row
        decision = layer.at_site(u)
        gates = standardise(torch.stack([e.gates[site] for e in pool.experts]))
        for token in range(6):
            row = token // 3
            given = shortlists[row].tolist(), shares[row].tolist()
            wanted = by_hand(gates, u[token], *given, k, prior)
            chosen = decision.experts[token].tolist(), decision.weights[token].tolist()
            got = dict(zip(*chosen, strict=True))
            assert got == pytest.approx(wanted, abs=1e-5)


@both_streams
@pytest.mark.parametrize(
    ("settings", "same", "k"),
    [("shortlist=4,prior=0", "phatgoose", 2), ("shortlist=1", "discriminant:fallback=off", 1)],
)
def test_a_shortlist_of_all_is_phatgoose_and_of_one_who_makes_it(base, pool, settings, same, k):
    ids = make_ids(rows=3)
    wanted = logits_of(compose(pool, base, router=same, k=k), ids)
    detach(base.model)
    got = logits_of(compose(pool, base, router=f"{NAME}:{settings}"), ids)
    assert_same_logits(got, wanted)
