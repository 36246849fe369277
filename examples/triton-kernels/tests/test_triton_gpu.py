"""The Triton kernel: on a CPU through Triton's interpreter, which conftest.py asks for.

On a machine with a GPU, all of it runs there under `TRITON_INTERPRET=0`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from unittest import mock

import phatgoose_triton.triton_gpu as module
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phatgoose_triton import KERNEL
from phatgoose_triton.triton_gpu import add_routed, in_blocks, one_by_one, top_experts, triton_gpu
from torch import Tensor

from kernel_problems import (
    ROUNDINGS,
    Problem,
    assert_are_the_top,
    assert_equals_reference,
    make_problem,
    problems_of,
    scored,
)
from phatgoose.errors import ConfigError
from phatgoose.routing.compose import compose
from phatgoose.routing.kernels import choose_kernel, one_call, outside_kernels, top_experts_for
from tiny import assert_same_logits, logits_of, make_ids, make_model

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
each_body = pytest.mark.parametrize("body", [one_by_one, in_blocks])
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def solve(body, problem: Problem) -> Tensor:
    """The value of `body`, on the CPU again."""
    parts = (problem.u, problem.experts, problem.weights, problem.A, problem.B)
    with torch.no_grad():
        return body(*(part.to(DEVICE) for part in parts)).cpu()


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
    got = solve(body, problem)
    assert got.dtype == problem.u.dtype
    assert_equals_reference(problem, [got])


@needs_triton
@each_body
def test_neither_padding_nor_experts_that_nobody_chose_are_read(body):
    problem = make_problem(T=6, E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(6, -1)
    problem.weights[::2] = 0
    wanted = problem.value_by("reference")
    problem.A[1:3], problem.B[1:3], problem.u[::2] = float("nan"), float("nan"), float("nan")
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
def test_the_top_experts_are_those_of_the_formula(router, **sizes):
    u, plain = scored(router, **sizes)
    scores = plain.router.scores(u, plain)
    slack = 1e-4 * max(1.0, float(scores.abs().max()) if len(u) else 0.0)
    chosen = top_experts(u.to(DEVICE), plain.vectors.to(DEVICE), plain.k, plain.eps)
    assert_are_the_top(chosen, u, plain, slack)


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
        shaped = u.view(T, 1, n) if u.is_contiguous() else u[:, None]
        add_routed(got, shaped, (vectors, A, B), k, eps)
        p.experts, p.weights = (x.cpu() for x in top_experts(u, vectors, k, eps))
    assert got.shape == y.shape
    assert_equals_reference(p, [got.cpu().view(T, d)], added=True)


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
    calls = []
    on_a_gpu(monkeypatch, lambda *arguments: (calls.append(1), add_routed(*arguments)))
    model = compose(llama_pool, make_model("llama"), kernel="triton", router="phatgoose").to(DEVICE)
    got = logits_of(model, ids.to(DEVICE), attention_mask=mask.to(DEVICE))
    assert len(calls) == len(model.phatgoose.layers)
    assert_same_logits(got.cpu(), wanted)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, adds=add_routed) -> None:
    """Have choose_kernel take this machine for one with a GPU, where `adds` is the one call."""
    assert outside_kernels()["triton"] is KERNEL, "install examples/triton-kernels"
    monkeypatch.setattr("phatgoose.routing.kernels.native.runs_natively", lambda *_: False)
    there = KERNEL._replace(runs_on=lambda *_: True, add_routed=adds)
    monkeypatch.setitem(outside_kernels(), "triton", there)


@pytest.mark.parametrize(
    ("kernel", "k", "taken"),
    [("auto", 2, True), ("triton", 8, True), ("auto", 8, False), ("concat", 2, False)],
)
def test_one_call_is_made_where_triton_would_be_taken(kernel, k, taken, monkeypatch):
    p = make_problem(T=3, E=8)
    on_a_gpu(monkeypatch)
    call = one_call(kernel, p.cotangent, p.u, (p.A[:, 0], p.A, p.B), k)
    assert call is (add_routed if taken else None)


def test_auto_prefers_triton_on_a_gpu_alone(monkeypatch):
    p = make_problem(T=3, E=8)
    parts = (p.u, p.experts, p.A, p.B)
    assert choose_kernel("auto", *parts) is not triton_gpu
    on_a_gpu(monkeypatch)
    assert choose_kernel("auto", *parts) is triton_gpu
    assert top_experts_for(p.u, p.A[:, 0]) is top_experts


def test_a_kernel_that_can_t_take_a_tensor_is_refused_by_name():
    p = make_problem(E=8)
    with pytest.raises(ConfigError, match=r"Kernel triton can't take torch.int64 on cpu"):
        choose_kernel("triton", p.u.long(), p.experts, p.A, p.B)
    with pytest.raises(ConfigError, match="without gradients"):
        choose_kernel("triton", p.u.requires_grad_(), p.experts, p.A, p.B)
