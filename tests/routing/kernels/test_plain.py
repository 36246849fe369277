"""Kernels on CPUs, against the reference and its gradients."""

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

BODIES = [name for name in ON_CPUS if name != "reference"]


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


@pytest.mark.parametrize("name", ON_CPUS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(name, tokens):
    assert_equals_reference(make_problem(T=tokens), name)


@pytest.mark.parametrize("name", ON_CPUS)
def test_all_experts_can_be_chosen_at_once(name):
    assert_equals_reference(make_problem(E=3, k=3), name)


@pytest.mark.parametrize("name", BODIES)
def test_weights_of_zero_leave_nothing(name):
    problem = make_problem()
    problem.weights = torch.zeros_like(problem.weights)
    assert not problem.solved_by(name)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ON_CPUS)
def test_the_result_has_the_dtype_of_the_activations(name, dtype):
    problem = make_problem(dtype=dtype)
    assert problem.weights.dtype == torch.float32
    assert problem.solved_by(name)[0].dtype == dtype
