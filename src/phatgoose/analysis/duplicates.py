"""How alike experts are: the cosine of updates that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..experts.kind import Part
from ..experts.pool import Pool
from ..routing.stacks import stack_of

BLOCK = 2048  # rows of factors at once


def cosines(pool: Pool) -> Tensor:
    """The cosine of every two experts' whole updates, float64 [E, E]; 0 for an update that is zero.

    All B A of all sites are one long vector, scales included. No B A is ever formed: <B A, B' A'> =
    sum of (Bᵀ B') ⊙ (A A'ᵀ). For a bottleneck adapter U D replaces B A, for (IA)³ the vector l - 1.
    Experts of different kinds have the cosine 0, and so have DoRAs, which need the base.
    """
    products = torch.zeros(len(pool), len(pool), dtype=torch.float64)
    for site in pool.sites:
        stack = stack_of(pool, site, torch.float32, torch.device("cpu"))
        for part, rows in stack.rows().items():
            at = stack.experts[rows]
            if stack.parts[part].compared:
                products[at[:, None], at] += _products(*factors_of(stack.parts[part]))
        pool.release()
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = norms.where(norms > 0, torch.inf)
    return (products / norms[:, None] / norms).clamp(-1, 1)


def squared_norms(part: Part) -> Tensor:
    """The squared Frobenius norm of each update of a part of a stack, float64 [E]."""
    A, B = (each.double() for each in factors_of(part))
    return (A @ A.mT * (B @ B.mT)).sum(dim=(1, 2)).clamp(min=0)


def factors_of(part: Part) -> tuple[Tensor, Tensor]:
    """A [E, r, n] and B [E, r, d] of the updates of a part of a stack; d is 1 for vectors."""
    factors = [getattr(part, field) for field in part.compared]
    if len(factors) == 1:  # a vector has the rank 1
        factors = [factors[0][:, None], torch.ones_like(factors[0][:, None, :1])]
    return factors[0], factors[1]


def _products(A: Tensor, B: Tensor) -> Tensor:
    """The scalar products of all updates of a stack, A [E, r, n] and B [E, r, d], [E, E]."""
    E, r = A.shape[:2]
    products = torch.empty(E, E, dtype=torch.float64)
    step = max(1, BLOCK // r)
    for first in range(0, E, step):
        # Products are symmetric: those below the diagonal are copied.
        block, rest = slice(first, first + step), slice(first, E)
        inner = A[block].flatten(0, 1) @ A[rest].flatten(0, 1).T  # [b r, E' r]
        inner *= B[block].flatten(0, 1) @ B[rest].flatten(0, 1).T
        sums = inner.view(len(A[block]), r, len(A[rest]), r).sum(dim=(1, 3))
        products[block, rest] = sums.double()
        products[rest, block] = sums.double().T
    return products
