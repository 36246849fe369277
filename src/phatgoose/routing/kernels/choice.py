"""The routed LoRA product, sum over z of w_z B_z A_z u: one signature, several bodies.

Glossary: T tokens, n inputs, d outputs, E experts, k chosen per token, r rank.

Every kernel is a function `(u, experts, weights, A, B) -> delta` of
    u        [T, n]     input activations
    experts  [T, k]     indices into the E experts at hand, int64
    weights  [T, k]     their weights
    A        [E, r, n]  LoRA factors
    B        [E, r, d]  LoRA factors, transposed, so that both unfold without a copy; scaled
    delta    [T, d]     in the dtype of u
and gives the same numbers and gradients as `reference`, up to rounding (`native` and `triton` have
no gradients). None waits for the device, but for `grouped` where its docstring says so.

    reference  a loop that reads like the paper                      the oracle of all others
    concat     all experts side by side, unchosen ones times zero    few experts
    gather     each token's own factors, fetched                     few tokens: decoding
    grouped    tokens sorted by expert, one product per expert       many of both
    native     the same in C++                                       CPUs, without gradients
    triton     gather and grouped as Triton programs                 GPUs, without gradients
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...experts.kind import is_one_call
from .native import add_routed, native, runs_natively
from .plain import concat, gather, grouped, reference
from .triton_gpu import add_routed as add_routed_on_gpu
from .triton_gpu import runs_on_triton, triton_gpu

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
AddRouted = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float | None], None]

KERNELS: dict[str, Kernel] = {
    "reference": reference,
    "concat": concat,
    "gather": gather,
    "grouped": grouped,
    "native": native,
    "triton": triton_gpu,
}
AUTO = "auto"


def choose_kernel(name: str, u: Tensor, experts: Tensor, A: Tensor, B: Tensor) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest for these arguments.

    The rule behind "auto" is measured on CPUs (docs/performance.md): `native` wherever it can be
    used and few of the experts are chosen; else `gather` while each token's own factors are less to
    read than everybody's, `grouped` for many tokens that choose few of many experts, and `concat`
    between. GPUs get `triton` in place of `native`; `grouped` stays out where reading counts
    back would wait for a GPU or break torch.compile's graph.
    """
    if name != AUTO:
        return KERNELS[name]
    (tokens, k), E = experts.shape, len(A)
    if 2 * k <= E:
        if runs_natively(u, A, B):
            return native
        if runs_on_triton(u, A, B):
            return triton_gpu
    if 2 * tokens * k < E:
        return gather
    may_read_counts = u.device.type == "cpu" and not torch.compiler.is_compiling()
    if 20 * k < E and tokens * k > 4 * E and (may_read_counts or is_one_call(A, B)):
        return grouped
    return concat


def one_call(
    name: str, y: Tensor, u: Tensor, vectors: Tensor, A: Tensor, B: Tensor, k: int
) -> AddRouted | None:
    """What chooses experts and adds their product to y in one call; None where nothing can."""
    tensors = (y, u, vectors, A, B)
    if name in (AUTO, "native") and u.is_contiguous() and runs_natively(*tensors):
        return add_routed
    few = name == "triton" or (name == AUTO and 2 * k <= len(A))
    return add_routed_on_gpu if few and runs_on_triton(*tensors) else None
