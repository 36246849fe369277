"""SpectR beside its released code, and LAG's shortlist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from more_routers.spectr import Spectr, right_singular_vectors

from phatgoose.routing.routers.router import RouterAtSite
from random_loras import loras
from routed_models import router_at
from tiny import random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama; 32 inputs


@settings(max_examples=100, derandomize=True)
@given(lora=loras(torch.float32))
def test_spectrs_vectors_measure_a_token_in_the_row_space_of_the_product(lora):
    u, rows = random(lora.A.shape[1]).double(), right_singular_vectors(lora)
    assert (rows.dtype, rows.shape[1]) == (torch.float32, len(u))
    product = lora.B.double() @ lora.A.double()
    projected = torch.linalg.pinv(product, rtol=1e-6) @ (product @ u)
    torch.testing.assert_close((rows.double() @ u).norm(), projected.norm())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_spectr_chooses_and_weighs_as_the_released_code(llama, llama_pool, k):
    u, lengths = random(30, 32), []
    for expert in llama_pool.experts:
        lora = expert.lora[SITE]
        Vh = torch.linalg.svd(lora.B.double() @ lora.A.double(), full_matrices=False).Vh
        lengths.append((lora.scale * u.double() @ Vh[: len(lora.A)].T).norm(dim=-1))
    best = torch.stack(lengths, dim=1).topk(k, dim=1).indices
    decision = router_at(SITE, llama, llama_pool, "spectr", k=k)(u)
    assert torch.equal(decision.experts.sort().values, best.sort().values)
    torch.testing.assert_close(decision.weights, torch.full((30, k), 1 / k))
    assert k == 4 or len(best.unique(dim=0)) > 1


def test_the_best_of_a_shortlist_are_those_of_lag():
    directions = torch.linalg.qr(random(6, 9, 3))[0].transpose(1, 2)  # [6, 3, 9]
    u, table = random(40, 9, seed=1), {"directions": directions}

    def router(k: int, **settings: int) -> RouterAtSite:
        return RouterAtSite(Spectr(k=k, **settings), "s", torch.arange(6), "abcdef", table)

    decision = router(1, shortlist=2)(u)
    for t in range(40):
        first = sorted(range(6), key=lambda z: -abs(float(directions[z, 0] @ u[t])))[:2]
        best = max(first, key=lambda z: float((directions[z] @ u[t]).norm()))
        assert decision.experts[t].tolist() == [best]
    assert not torch.equal(decision.experts, router(1)(u).experts)
    spread = router(1, shortlist=2).distribution(u)
    assert (spread > 0).sum(dim=1).tolist() == [2] * 40
    assert torch.equal(router(2, shortlist=6)(u).experts, router(2)(u).experts)
    assert router(3, shortlist=1)(u).experts.shape == (40, 3)  # never below k
