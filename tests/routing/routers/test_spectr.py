"""SpectR beside an SVD of the whole B A, beside the released code's arithmetic; LAG's choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.routing.routers.spectr import Spectr, right_singular_vectors
from routed_models import router_at
from tiny import random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama


@settings(max_examples=100, derandomize=True)
@given(
    r=st.integers(1, 8),
    n=st.integers(1, 12),
    d=st.integers(1, 12),
    rank=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_vectors_measure_a_token_in_the_row_space_of_the_product(r, n, d, rank, seed):
    A, u = random(r, n, seed=seed), random(n, seed=seed + 3)
    B = random(d, min(r, rank), seed=seed + 1) @ random(min(r, rank), r, seed=seed + 2)
    rows = right_singular_vectors(LoraFactors(A, B, 2.0))
    assert rows.dtype == torch.float32
    assert rows.shape[1] == n
    product = B.double() @ A.double()  # by projecting on it, without any singular vector
    length = (torch.linalg.pinv(product, rtol=1e-6) @ (product @ u.double())).norm()
    torch.testing.assert_close((rows.double() @ u.double()).norm(), length)


def released(pool: Pool, site: str, u: Tensor, k: int) -> Tensor:
    """The released code's routes [T, E] for tokens u [T, n], float64."""
    lengths = []
    for expert in pool.experts:
        lora = expert.lora[site]
        Vh = torch.linalg.svd(lora.B.double() @ lora.A.double(), full_matrices=False).Vh
        lengths.append((lora.scale * u.double() @ Vh[: len(lora.A)].T).norm(dim=-1))
    best = torch.stack(lengths).topk(k, dim=0).indices
    return torch.zeros(len(lengths), len(u)).double().scatter(0, best, 1 / k).T


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_choice_and_the_weights_are_the_released_codes(llama, llama_pool, k):
    u = random(30, 32)
    wanted = released(llama_pool, SITE, u, k)
    decision = router_at(SITE, llama, llama_pool, "spectr", k=k)(u)
    got = torch.zeros(30, 4).scatter(1, decision.experts, decision.weights)
    torch.testing.assert_close(got.double(), wanted)
    assert k == 4 or len({tuple(row) for row in wanted.tolist()}) > 1


def test_the_best_of_a_shortlist_are_those_of_lag():
    directions = torch.linalg.qr(random(6, 9, 3))[0].transpose(1, 2)  # [6, 3, 9]
    u, table = random(40, 9, seed=1), {"directions": directions}

    def router(k: int, **settings: int) -> SiteRouter:
        return SiteRouter(Spectr(k=k, **settings), "s", torch.arange(6), 6, table)

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
