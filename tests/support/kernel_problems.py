"""Inputs of the kernels, with the gradients of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from phatgoose.routing.kernels import KERNELS

ON_CPUS = [name for name in KERNELS if name != "triton"]  # which has its own file, test_triton.py
DIFFERENTIABLE = [name for name in ON_CPUS if name != "native"]


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
        if name not in DIFFERENTIABLE:
            return [self.value_by(name)]
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


def problems_of(dtypes: Iterable[torch.dtype], **sizes: SearchStrategy[int]):
    """Problems of any of `dtypes` and of these `sizes`, the arguments of `make_problem`."""
    return st.builds(
        make_problem,
        dtype=st.sampled_from(list(dtypes)),
        strided=st.booleans(),
        seed=st.integers(0, 999),
        **sizes,
    )


ROUNDINGS = {torch.float32: 8, torch.bfloat16: 4}  # in units of the dtype's eps


def magnitudes(x: Tensor) -> Tensor:
    """What sums of these come to without cancellation: roundings are relative to that."""
    return x.double().abs()


def assert_close(got: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == wanted.shape
    eps = torch.finfo(dtype).eps * ROUNDINGS[dtype]
    assert ((got.double() - wanted).abs() <= eps * size).all()
