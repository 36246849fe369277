"""Of experts with equal affinities the first wins, whichever way they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.experts.pool import Pool
from phatgoose.routing.composition import composition_of
from phatgoose.routing.kernels.native import runs_natively
from phatgoose.routing.kernels.native import top_experts as by_native
from phatgoose.routing.recording import record
from phatgoose.routing.routers.arrow import ArrowRouter
from phatgoose.routing.routers.phatgoose import (
    PhatgooseRouter,
    TopKRouter,
    standardise,
)
from phatgoose.routing.routers.router import highest
from routed_models import compose_by
from tiny import make_ids

MAKERS: dict[str, Callable[[Tensor, int], TopKRouter]] = {
    "phatgoose": lambda vectors, k: PhatgooseRouter(vectors, k, 1e-5),
    "arrow": ArrowRouter,
}
# e_j - e_(j+4) and their opposites: sums of two terms, so that equal vectors score just the same.
FEW = torch.cat([torch.eye(8)[:4] - torch.eye(8)[4:], torch.eye(8)[4:] - torch.eye(8)[:4]])
each_router = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def first_of_equals(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda z: -row[z])[:k]  # Python's sort is stable


def flat(pool: Pool) -> Pool:
    """The pool with gates and means of zero, as if they had never been trained."""

    def zeros(vectors):
        return {site: torch.zeros_like(v) for site, v in vectors.items()}

    return Pool(tuple(replace(e, gates=zeros(e.gates), means=zeros(e.means)) for e in pool.experts))


def test_no_expert_is_found_twice_where_others_are_out_of_the_question():
    scores = torch.tensor([[2.0, -torch.inf, -torch.inf, 1.0], [-torch.inf] * 4])
    assert highest(scores, 3).tolist() == [[0, 3, 1], [0, 1, 2]]


@settings(max_examples=150, derandomize=True)
@given(st.data(), st.integers(1, 70), st.integers(1, 4))
def test_the_highest_of_each_row_are_found_first_of_equals_first(data, E, T):
    k = data.draw(st.integers(1, E))
    rows = st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.5]), min_size=E, max_size=E)
    scores = data.draw(st.lists(rows, min_size=T, max_size=T))
    got = highest(torch.tensor(scores), k)
    assert got.tolist() == [first_of_equals(row, k) for row in scores]


def test_what_is_not_a_number_is_chosen_once():
    scores = torch.full((1, 40), torch.nan)
    assert highest(scores, 3).tolist() == [[0, 1, 2]]
    assert sorted(highest(scores, 30)[0].tolist()) == list(range(30))


@each_router
@settings(max_examples=40, derandomize=True)
@given(
    kinds=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    k=st.integers(1, 5),
    T=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_path_takes_the_first_of_equal_experts(make, kinds, k, T, seed):
    u = torch.randn(T, 8, generator=torch.Generator().manual_seed(seed))
    u[seed % 5 :] = 0  # tokens whose affinities are all equal
    vectors, router = FEW[kinds], make(FEW[kinds], k)
    wanted = [first_of_equals(row, router.k) for row in router.affinities(u).tolist()]
    with torch.no_grad():
        assert router(u).experts.tolist() == wanted  # the native kernel's, where it serves
    assert router(u.clone().requires_grad_()).experts.tolist() == wanted
    if router.fused and runs_natively(u):
        assert by_native(u, vectors, router.k, router.eps)[0].tolist() == wanted


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("n", [16, 33, 576])
@each_router
def test_experts_with_one_vector_are_ties_in_whatever_place(make, n, tokens):
    generator = torch.Generator().manual_seed(n)
    kinds = torch.randint(0, 3, (17,), generator=generator)
    vectors = torch.randn(3, n, generator=generator)
    u = torch.randn(tokens, n, generator=generator, requires_grad=True)
    router = make(standardise(vectors)[kinds], 3)
    found = router.affinities(u)
    for kind in range(3):
        alike = found[:, kinds == kind]
        assert torch.equal(alike, alike[:, :1].expand_as(alike))
    wanted = [first_of_equals(row, 3) for row in found.tolist()]
    assert router(u).experts.tolist() == wanted
    with torch.no_grad():
        assert router(u).experts.tolist() == wanted


@each_router
@settings(max_examples=60, derandomize=True)
@given(
    kinds=st.lists(st.integers(0, 4), min_size=2, max_size=24),
    n=st.integers(2, 100),
    T=st.integers(2, 9),
    k=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_a_token_alone_chooses_as_in_a_batch(make, kinds, n, T, k, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = standardise(torch.randn(5, n, generator=generator))[kinds]  # of one kind: ties
    router = make(vectors, k).to(dtype)
    u = torch.randn(T, n, generator=generator).to(dtype)
    exactly = {torch.no_grad: 0.0, torch.enable_grad: 1e-6}  # the native kernel, and torch
    for context, slack in exactly.items():
        with context():
            tokens = u.clone().requires_grad_(context is torch.enable_grad)
            together = router(tokens)
            alone = [router(tokens[t : t + 1]) for t in range(T)]
        assert torch.equal(torch.cat([each.experts for each in alone]), together.experts)
        weights = torch.cat([each.weights for each in alone])
        torch.testing.assert_close(weights, together.weights, rtol=slack, atol=slack)
        for row in together.experts.tolist():
            for kind in set(kinds):  # of equals the first
                of_kind = [z for z in row if kinds[z] == kind]
                assert (
                    of_kind == [z for z, other in enumerate(kinds) if other == kind][: len(of_kind)]
                )


@pytest.mark.parametrize("router", ["phatgoose", "average-activation"])
@pytest.mark.filterwarnings("ignore:Expert 'e.' has a constant vector")
def test_gates_of_zero_choose_the_first_experts_with_gradients_and_without(
    llama, llama_pool, router
):
    model = compose_by(router, flat(llama_pool), llama, k=2)
    ids = make_ids(rows=2)
    with torch.no_grad():
        wanted = model(ids).logits
    model.requires_grad_(True)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    model.requires_grad_(False)
    with record(model) as recording, torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    for site, used in recording.usage().items():
        layer = composition_of(model).layers[site]
        assert used.tolist() == [0.5, 0.5, 0, 0]
        distribution = layer.router.distribution(torch.randn(3, layer.in_features))
        torch.testing.assert_close(distribution, torch.full((3, 4), 0.25))
