"""The Triton kernel: on a CPU through Triton's interpreter, which tests/conftest.py asks for.

On a machine with a GPU, all of it runs there under `TRITON_INTERPRET=0`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import phatgoose.routing.kernels.triton_gpu as module
from kernel_problems import Problem, make_problem, problems_of
from phatgoose.routing.compose import compose
from phatgoose.routing.kernels import one_call
from phatgoose.routing.kernels.plain import reference
from phatgoose.routing.kernels.triton_gpu import (
    add_routed,
    in_blocks,
    one_by_one,
    top_experts,
)
from routed_models import by_vectors
from tiny import assert_same_logits, logits_of, make_ids, make_model

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
BODIES = [one_by_one, in_blocks]
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}  # in units of the dtype's eps
each_body = pytest.mark.parametrize("body", BODIES)
without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def needs_triton(test):
    """The interpreter takes half a minute for these together."""
    return pytest.mark.heavy(without_triton(test))


def solve(body, problem: Problem) -> Tensor:
    """The value of `body`, on the CPU again."""
    parts = (problem.u, problem.experts, problem.weights, problem.A, problem.B)
    with torch.no_grad():
        return body(*(part.to(DEVICE) for part in parts)).cpu()


def assert_equals_reference(problem: Problem, body) -> None:
    """Within a few roundings of the reference in float64, relative to the sums of absolutes."""
    exact = problem.mapped(Tensor.double).value_by("reference")
    scale = problem.mapped(lambda x: x.double().abs()).value_by("reference")
    got = solve(body, problem)
    assert got.dtype == problem.u.dtype
    assert got.shape == exact.shape
    eps = torch.finfo(got.dtype).eps * ROUNDINGS[got.dtype]
    assert ((got.double() - exact).abs() <= eps * scale).all()


problems = st.integers(1, 5).flatmap(
    lambda E: problems_of(
        ROUNDINGS,
        T=st.integers(1, 6),
        E=st.just(E),
        k=st.integers(1, min(E, 3)),
        r=st.integers(1, 9) | st.integers(17, 20),
        n=st.integers(1, 70),
        d=st.integers(1, 150),
    )
)


@needs_triton
@each_body
@settings(max_examples=25, derandomize=True)
@given(problem=problems)
def test_both_bodies_equal_the_reference(body, problem):
    assert_equals_reference(problem, body)


@needs_triton
@each_body
def test_experts_nobody_chose_are_not_read(body):
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3], problem.B[1:3] = float("nan"), float("nan")
    assert solve(body, problem).isfinite().all()


@needs_triton
@each_body
def test_padding_is_left_alone_whatever_it_holds(body):
    problem = make_problem(T=6)
    problem.weights[::2] = 0
    wanted = solve(reference, problem)
    problem.u[::2] = float("nan")
    got = solve(body, problem)
    assert not got[::2].any()
    torch.testing.assert_close(got[1::2], wanted[1::2])


@needs_triton
@pytest.mark.parametrize("router", ["phatgoose", "arrow"])
@settings(max_examples=25, derandomize=True)
@given(
    T=st.integers(0, 20),
    E=st.integers(1, 70),
    n=st.integers(2, 300),
    k=st.integers(1, 8),
    dtype=st.sampled_from(list(ROUNDINGS)),
    offset=st.sampled_from([0, 1, 100]),
    seed=st.integers(0, 999),
)
def test_the_top_experts_are_those_of_the_formula(router, T, E, n, k, dtype, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    u = (3 * torch.randn(T, n, generator=generator) + offset).to(dtype)
    vectors = torch.randn(E, n, generator=generator)
    vectors = (vectors - vectors.mean(dim=-1, keepdim=True)).to(dtype)
    plain = by_vectors(router, vectors, k)
    experts, weights = top_experts(u.to(DEVICE), vectors.to(DEVICE), plain.k, plain.eps)
    wanted = plain.router.scores(u, plain).topk(plain.k, dim=-1).values
    got = plain.router.scores(u, plain).gather(1, experts.cpu())
    slack = 1e-4 * max(1.0, float(plain.router.scores(u, plain).abs().max()) if T else 0.0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=slack)
    torch.testing.assert_close(weights.cpu(), got.softmax(dim=-1), rtol=0, atol=slack)
    assert all(len(set(row)) == plain.k for row in experts.tolist())


added_to = problems_of(
    ROUNDINGS,
    T=st.integers(0, 8),
    E=st.integers(2, 5) | st.just(70),
    k=st.integers(1, 2),
    r=st.integers(1, 9),
    n=st.integers(2, 70),
    d=st.integers(1, 70),
)


@needs_triton
@settings(max_examples=20, derandomize=True, deadline=None)
@given(p=added_to, eps=st.sampled_from([None, 1e-5]), least_pairs=st.sampled_from([1, 512]))
def test_one_call_adds_what_top_experts_and_the_product_come_to(p, eps, least_pairs):
    (T, k), n, d = p.experts.shape, p.A.shape[2], p.B.shape[2]
    y = p.cotangent.reshape(T, 1, d).to(DEVICE)
    vectors = (n**0.5 * p.A[:, 0]).to(DEVICE)
    u, A, B, got = *(x.to(DEVICE) for x in (p.u, p.A, p.B)), y.clone()
    with torch.no_grad(), mock.patch.object(module, "LEAST_PAIRS", least_pairs):
        add_routed(got, u.view(T, 1, n) if u.is_contiguous() else u[:, None], vectors, A, B, k, eps)
        p.experts, p.weights = (x.cpu() for x in top_experts(u, vectors, k, eps))
    exact, scale = (
        p.mapped(change).value_by("reference") + change(p.cotangent)
        for change in (Tensor.double, lambda x: x.double().abs())
    )
    bound = torch.finfo(p.u.dtype).eps * ROUNDINGS[p.u.dtype] * scale
    assert got.shape == y.shape
    assert ((got.cpu().view(T, d).double() - exact).abs() <= bound).all()


@needs_triton
def test_of_equal_scores_the_first_expert_wins():
    experts, weights = top_experts(*torch.ones(2, 3, 5, device=DEVICE), 2, None)
    assert experts.tolist() == [[0, 1]] * 3
    assert weights.tolist() == [[0.5, 0.5]] * 3


@needs_triton
def test_a_routed_model_gives_the_same_logits_through_triton(llama_pool, monkeypatch):
    ids = make_ids(rows=2, tokens=3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    plain = compose(llama_pool, make_model("llama"), kernel="reference", router="phatgoose")
    wanted = logits_of(plain, ids, attention_mask=mask)
    on_a_gpu(monkeypatch)
    calls = []
    monkeypatch.setattr(
        "phatgoose.routing.kernels.triton_gpu.add_routed",
        lambda *arguments: (calls.append(1), add_routed(*arguments)),
    )
    model = compose(llama_pool, make_model("llama"), kernel="triton", router="phatgoose").to(DEVICE)
    got = logits_of(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE))
    assert len(calls) == len(model.phatgoose.layers)
    assert_same_logits(got.cpu(), wanted)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have choose_kernel take this machine for one with a GPU."""
    monkeypatch.setattr("phatgoose.routing.kernels.native.runs_natively", lambda *_: False)
    monkeypatch.setattr("phatgoose.routing.kernels.triton_gpu.runs_on_triton", lambda *_: True)


@pytest.mark.parametrize(
    ("kernel", "k", "taken"),
    [("auto", 2, True), ("triton", 8, True), ("auto", 8, False), ("concat", 2, False)],
)
def test_one_call_is_made_where_triton_would_be_taken(kernel, k, taken, monkeypatch):
    p = make_problem(T=3, E=8)
    on_a_gpu(monkeypatch)
    call = one_call(kernel, p.cotangent, p.u, p.A[:, 0], p.A, p.B, k)
    assert call is (add_routed if taken else None)


def test_a_triton_that_fails_is_no_error(monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(module, "_programs", fail)
    caplog.set_level("INFO")
    assert not module._runs(torch.device("cpu"))
    assert "C compiler" in caplog.text
