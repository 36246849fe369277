from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.errors import ConfigError
from phatgoose.kernels import KERNELS, choose_kernel

BODIES = [name for name in KERNELS if name != "reference"]
ROUNDINGS = {torch.float32: 8, torch.bfloat16: 4}  # in units of the dtype's eps


@dataclass
class Problem:
    u: Tensor
    experts: Tensor
    weights: Tensor
    A: Tensor
    B: Tensor
    cotangent: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.u, self.weights, self.A, self.B

    def mapped(self, change) -> "Problem":
        u, weights, A, B = map(change, self.leaves)
        return Problem(u, self.experts, weights, A, B, change(self.cotangent))

    def solved_by(self, name: str) -> list[Tensor]:
        """The kernel's value, then its gradients for u, weights, A and B."""
        u, weights, A, B = leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        value = KERNELS[name](u, self.experts, weights, A, B)
        return [value.detach(), *torch.autograd.grad(value, leaves, self.cotangent)]


def make_problem(T=5, E=4, k=2, r=3, n=7, d=9, *, dtype=torch.float32, strided=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    u = normal(T, 2 * n)[:, ::2] if strided else normal(T, n)
    experts = torch.rand(T, E, generator=generator).argsort(dim=-1)[:, :k]
    weights = torch.rand(T, k, generator=generator).softmax(dim=-1)
    return Problem(u, experts, weights, normal(E, r, n), normal(E, r, d), normal(T, d))


def assert_equals_reference(problem: Problem, name: str) -> None:
    """Values and gradients within a few roundings of the reference in float64.

    The roundings are relative to what the same sums come to without cancellation.
    """
    exact = problem.mapped(Tensor.double).solved_by("reference")
    scale = problem.mapped(lambda x: x.double().abs()).solved_by("reference")
    eps = torch.finfo(problem.u.dtype).eps * ROUNDINGS[problem.u.dtype]
    for got, wanted, size in zip(problem.solved_by(name), exact, scale, strict=True):
        assert got.shape == wanted.shape
        assert ((got.double() - wanted).abs() <= eps * size).all()


problems = st.integers(1, 5).flatmap(
    lambda E: st.builds(
        make_problem,
        T=st.integers(0, 7),
        E=st.just(E),
        k=st.integers(1, E),
        r=st.integers(1, 5),
        n=st.integers(1, 9),
        d=st.integers(1, 9),
        dtype=st.sampled_from(list(ROUNDINGS)),
        strided=st.booleans(),
        seed=st.integers(0, 999),
    )
)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems)
def test_every_kernel_equals_the_reference_in_values_and_gradients(name, problem):
    assert_equals_reference(problem, name)


def test_the_reference_is_the_sum_of_the_paper():
    problem = make_problem().mapped(Tensor.double)
    wanted = torch.zeros(5, 9).double()
    for t in range(5):
        for w, z in zip(problem.weights[t], problem.experts[t], strict=True):
            wanted[t] += w * problem.B[z].T @ (problem.A[z] @ problem.u[t])
    torch.testing.assert_close(problem.solved_by("reference")[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_nobody_chose_adds_nothing_and_gets_no_gradient(name):
    problem = make_problem(E=4, k=2)
    problem.experts = torch.tensor([[0, 3]]).expand(5, -1)
    problem.A[1:3], problem.B[1:3] = 1e20, 1e10
    value, _, _, grad_A, grad_B = problem.solved_by(name)
    assert value.abs().max() < 1e3
    assert not grad_A[1:3].any()
    assert not grad_B[1:3].any()
    assert grad_A[0].any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(name, tokens):
    assert_equals_reference(make_problem(T=tokens), name)


@pytest.mark.parametrize("name", KERNELS)
def test_all_experts_can_be_chosen_at_once(name):
    assert_equals_reference(make_problem(E=3, k=3), name)


@pytest.mark.parametrize("name", BODIES)
def test_weights_of_zero_leave_nothing(name):
    problem = make_problem()
    problem.weights = torch.zeros_like(problem.weights)
    assert not problem.solved_by(name)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_the_result_has_the_dtype_of_the_activations(name, dtype):
    problem = make_problem(dtype=dtype)
    assert problem.weights.dtype == torch.float32
    assert problem.solved_by(name)[0].dtype == dtype


def test_auto_reads_the_least_memory():
    assert choose_kernel("auto", tokens=1, chosen=2, experts=100) is KERNELS["gather"]
    assert choose_kernel("auto", tokens=512, chosen=2, experts=100) is KERNELS["concat"]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_found_by_name(name):
    assert choose_kernel(name, tokens=1, chosen=1, experts=1) is KERNELS[name]


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="fastest"):
        choose_kernel("fastest", tokens=1, chosen=1, experts=1)
