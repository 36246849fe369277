"""Kernels in torch: values, gradients and which one is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_problems import (
    DIFFERENTIABLE,
    ON_CPUS,
    ROUNDINGS,
    Problem,
    assert_close,
    magnitudes,
    make_problem,
    problems_of,
)
from phatgoose.experts.kind import expert_products
from phatgoose.routing.kernels import KERNELS, choose_kernel
from phatgoose.routing.kernels.native import runs_natively


def assert_equals_reference(problem: Problem, name: str) -> None:
    """Values and gradients within a few roundings of the reference in float64."""
    exact = problem.mapped(Tensor.double).solved_by("reference")
    scale = problem.mapped(magnitudes).solved_by("reference")
    for got, wanted, size in zip(problem.solved_by(name), exact, scale, strict=False):
        assert_close(got, wanted, size, problem.u.dtype)


problems = st.integers(1, 5).flatmap(
    lambda E: problems_of(
        ROUNDINGS,
        T=st.integers(0, 20),
        E=st.just(E),
        k=st.integers(1, E),
        r=st.integers(1, 9),
        n=st.integers(1, 70),
        d=st.integers(1, 150),
    )
)


@pytest.mark.parametrize("name", ON_CPUS)
@settings(max_examples=60, derandomize=True)
@given(problem=problems)
def test_every_kernel_equals_the_reference_in_values_and_gradients(name, problem):
    assert_equals_reference(problem, name)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("name", ON_CPUS)
def test_a_token_that_names_an_expert_twice_gets_both_its_weights(name, tokens):
    problem = make_problem(T=tokens, E=3, k=3, d=70)
    problem.experts = torch.tensor([[1, 1, 1], [2, 0, 2], [0, 1, 2]]).repeat(3, 1)[:tokens]
    assert_equals_reference(problem, name)


def test_the_reference_is_the_sum_of_the_paper():
    problem = make_problem().mapped(Tensor.double)
    wanted = torch.zeros(5, 9).double()
    for t in range(5):
        for w, z in zip(problem.weights[t], problem.experts[t], strict=True):
            wanted[t] += w * problem.B[z].T @ (problem.A[z] @ problem.u[t])
    torch.testing.assert_close(problem.solved_by("reference")[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_expert_nobody_chose_adds_nothing_and_gets_no_gradient(name):
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3], problem.B[1:3] = 1e20, 1e10
    value, _, _, grad_A, grad_B = problem.solved_by(name)
    assert value.abs().max() < 1e3
    assert not grad_A[1:3].any()
    assert not grad_B[1:3].any()
    assert grad_A[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_run_of_rows_meets_its_own_factor(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 8, generator=generator).to(dtype)
    factors = torch.randn(3, 8, 16, generator=generator).to(dtype)
    counts = torch.tensor([4, 0, 3])
    runs = ((rows[:4], factors[0]), (rows[4:], factors[2]))
    wanted = torch.cat([run.float() @ factor.float() for run, factor in runs])
    got = expert_products(rows, factors, counts)
    torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.05)


def chosen_by_auto(problem: Problem) -> str:
    kernel = choose_kernel("auto", problem.u, problem.experts, problem.A, problem.B)
    return next(name for name, body in KERNELS.items() if body is kernel)


@pytest.mark.parametrize(
    ("tokens", "experts", "name"),
    [(1, 100, "gather"), (512, 8, "concat"), (32, 100, "concat"), (512, 100, "grouped")],
)
def test_auto_takes_what_was_measured_to_be_fastest(tokens, experts, name, monkeypatch):
    problem = make_problem(T=tokens, E=experts, r=8, n=8, d=8)
    if runs_natively(problem.u, problem.A):
        assert chosen_by_auto(problem) == "native"
    monkeypatch.setattr("phatgoose.routing.kernels.native.runs_natively", lambda *_: False)
    assert chosen_by_auto(problem) == name
