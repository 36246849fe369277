"""Kernels: the routed LoRA product, sum over z of w_z B_z A_z u, one signature, several bodies.

Glossary: T tokens, n inputs, d outputs, E experts, k chosen per token, r rank.

Every kernel is a function `(u, experts, weights, A, B) -> delta` of
    u        [T, n]     input activations
    experts  [T, k]     indices into the E experts at hand, int64
    weights  [T, k]     their weights
    A        [E, r, n]  LoRA factors
    B        [E, r, d]  LoRA factors, transposed, so that both unfold without a copy; scaled
    delta    [T, d]     in the dtype of u
and gives the same numbers and gradients as `reference`, up to rounding (`native` and `triton` have
no gradients). Only `grouped` may wait for the device, where its docstring says so.

    reference  a loop that reads like the paper                      the oracle of all others
    concat     all experts side by side, unchosen ones times zero    few experts
    gather     each token's own factors, fetched                     few tokens: decoding
    grouped    tokens sorted by expert, one product per expert       many of both
    native     the same in C++                                       CPUs, without gradients
    triton     gather and grouped as Triton programs                 GPUs, without gradients

Kernels don't check arguments: shapes were checked when files were read, types where kernels are
chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ConfigError
from ...experts.sums import is_one_call
from . import native, plain, triton_gpu

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
AddRouted = Callable[[Tensor, Tensor, native.Stacked, int, float | None], None]

KERNELS: dict[str, Kernel] = {
    "reference": plain.reference,
    "concat": plain.concat,
    "gather": plain.gather,
    "grouped": plain.grouped,
    "native": native.native,
    "triton": triton_gpu.triton_gpu,
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
        # These trust what they are handed, so that others would be read as something else.
        takes = {"native": native.runs_natively, "triton": triton_gpu.takes}.get(name)
        if takes and not takes(u, A, B):
            raise ConfigError(
                f"Kernel {name} can't take {u.dtype} on {u.device} here (native: float32 or "
                f"bfloat16 on CPUs, triton: GPUs, both without gradients); use kernel auto."
            )
        return KERNELS[name]
    tokens, k = experts.shape
    E = len(A)
    if 2 * k <= E:
        if native.runs_natively(u, A, B):
            return native.native
        if triton_gpu.runs_on_triton(u, A, B):
            return triton_gpu.triton_gpu
    if 2 * tokens * k < E:
        return plain.gather
    has_many = 20 * k < E and tokens * k > 4 * E
    may_read_counts = u.device.type == "cpu" and not torch.compiler.is_compiling()
    if has_many and (may_read_counts or is_one_call(A, B)):
        return plain.grouped
    return plain.concat


def one_call(name: str, y: Tensor, u: Tensor, stacked: native.Stacked, k: int) -> AddRouted | None:
    """What chooses experts and adds their product to y in one call; None where nothing can."""
    vectors, A, _ = stacked
    has_no_gaps = u.is_contiguous() and vectors.is_contiguous()
    if name in (AUTO, "native") and has_no_gaps and native.runs_natively(y, u, *stacked):
        return native.add_routed
    takes_triton = name == "triton" or (name == AUTO and 2 * k <= len(A))
    if takes_triton and triton_gpu.runs_on_triton(y, u, *stacked):
        return triton_gpu.add_routed
    return None
