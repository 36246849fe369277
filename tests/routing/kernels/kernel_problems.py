"""Inputs of the kernels, and what comes of them, with the gradients of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from phatgoose.routing.kernels import KERNELS
from phatgoose.routing.routers.router import RouterAtSite
from routed_models import by_vectors

ROUNDINGS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}  # in units of the dtype's eps


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

    def mapped(self, change) -> Problem:
        u, weights, A, B = map(change, self.leaves)
        return Problem(u, self.experts, weights, A, B, change(self.cotangent))

    def value_by(self, name: str) -> Tensor:
        with torch.no_grad():
            return KERNELS[name](self.u, self.experts, self.weights, self.A, self.B)

    def solved_by(self, name: str) -> list[Tensor]:
        """The kernel's value, then its gradients for u, weights, A and B, if it has any."""
        if name == "native":
            return [self.value_by(name)]
        u, weights, A, B = leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        value = KERNELS[name](u, self.experts, weights, A, B)
        return [value.detach(), *torch.autograd.grad(value, leaves, self.cotangent)]


def make_problem(
    T=5, E=4, k=2, r=3, n=7, d=9, *, dtype=torch.float32, strided=False, repeated=False, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    u = normal(T, 2 * n)[:, ::2] if strided else normal(T, n)
    experts = torch.rand(T, E, generator=generator).argsort(dim=-1)[:, :k]
    experts = experts[:, :1].expand(-1, k) if repeated else experts
    weights = torch.rand(T, k, generator=generator).softmax(dim=-1)
    return Problem(u, experts, weights, normal(E, r, n), normal(E, r, d), normal(T, d))


def problems_of(dtypes: Iterable[torch.dtype], **sizes: SearchStrategy[int | bool]):
    """Problems of any of `dtypes` and of these `sizes`, the arguments of `make_problem`."""
    return st.builds(
        make_problem,
        dtype=st.sampled_from(list(dtypes)),
        strided=st.booleans(),
        seed=st.integers(0, 999),
        **sizes,
    )


def assert_equals_reference(problem: Problem, got: list[Tensor], added: bool = False) -> None:
    """A value, and gradients if any, within roundings of the reference in float64.

    Roundings are relative to what sums come to without cancellation. Where the value was `added`,
    it was to the cotangent.
    """
    exact, scale = problem.mapped(Tensor.double), problem.mapped(lambda x: x.double().abs())
    eps = torch.finfo(problem.u.dtype).eps * ROUNDINGS[problem.u.dtype]
    solved = zip(got, exact.solved_by("reference"), scale.solved_by("reference"), strict=False)
    for each, wanted, size in solved:
        before = (exact.cotangent, scale.cotangent) if added else (0, 0)
        assert each.shape == wanted.shape
        assert ((each.double() - wanted - before[0]).abs() <= eps * (size + before[1])).all()


def scored(router: str, T: int, E: int, n: int, k: int, dtype, offset: float, seed: int):
    """Tokens u [T, n] of a mean, and a router by vectors [E, n] that have none."""
    generator = torch.Generator().manual_seed(seed)
    u = (3 * torch.randn(T, n, generator=generator) + offset).to(dtype)
    vectors = torch.randn(E, n, generator=generator)
    vectors = (vectors - vectors.mean(dim=-1, keepdim=True)).to(dtype)
    return u, by_vectors(router, vectors, k)


def assert_are_the_top(
    chosen: tuple[Tensor, Tensor], u: Tensor, at_site: RouterAtSite, slack: float
):
    """`chosen` experts and weights are those of the formula of `at_site`."""
    experts, weights = (each.cpu() for each in chosen)
    scores = at_site.router.scores(u, at_site)
    got = scores.gather(1, experts)
    torch.testing.assert_close(got, scores.topk(at_site.k).values, rtol=slack, atol=slack)
    torch.testing.assert_close(weights, got.softmax(dim=-1), rtol=2 * slack, atol=2 * slack)
    assert all(len(set(row)) == at_site.k for row in experts.tolist())
