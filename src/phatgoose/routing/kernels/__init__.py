"""Kernels: the routed LoRA product, sum over z of w_z B_z A_z u, one signature, several bodies.

Glossary: T tokens, n inputs, d outputs, E experts, k chosen per token, r rank.

Every kernel is a function `(u, experts, weights, A, B) -> delta` of
    u        [T, n]     input activations
    experts  [T, k]     indices into the E experts at hand, int64
    weights  [T, k]     their weights
    A        [E, r, n]  LoRA factors
    B        [E, r, d]  LoRA factors, transposed, so that both unfold without a copy; scaled
    delta    [T, d]     in the dtype of u
and gives the same numbers and gradients as `reference`, up to rounding (`native` has no
gradients). Only `grouped` may wait for the device, where its docstring says so.

    reference  a loop that reads like the paper                      the oracle of all others
    concat     all experts side by side, unchosen ones times zero    few experts
    gather     each token's own factors, fetched                     few tokens: decoding
    grouped    tokens sorted by expert, one product per expert       many of both
    native     the same in C++                                       CPUs, without gradients

Kernels don't check arguments: shapes were checked when files were read, types where kernels are
chosen. Other packages add theirs as entry points (`OutsideKernel`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import KERNEL_POINTS
from ...entry_points import add_entry_points
from ...errors import ConfigError
from ...experts.sums import is_one_call
from . import native, plain

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TopExperts = Callable[[Tensor, Tensor, int, float | None], tuple[Tensor, Tensor]]
AddRouted = Callable[[Tensor, Tensor, native.Stacked, int, float | None], None]

KERNELS: dict[str, Kernel] = {
    "reference": plain.reference,
    "concat": plain.concat,
    "gather": plain.gather,
    "grouped": plain.grouped,
    "native": native.native,
}
AUTO = "auto"


class OutsideKernel(NamedTuple):
    """A kernel of another package: what is registered under the entry points `phatgoose.kernels`.

    Attributes:
        product: The kernel.
        takes: Whether it can compute with these tensors (u, A and B).
        runs_on: Whether "auto" prefers it for these tensors, all that the call has.
        top_experts: Chooses experts as `native.top_experts` does, if given.
        add_routed: Chooses them and adds their product as `native.add_routed` does, if given. u
            and the vectors may have gaps.
    """

    product: Kernel
    takes: Callable[..., bool]
    runs_on: Callable[..., bool]
    top_experts: TopExperts | None = None
    add_routed: AddRouted | None = None


@cache
def outside_kernels() -> dict[str, OutsideKernel]:
    """The kernels of other packages by name. What can't be loaded is a warning."""
    kernels = dict[str, OutsideKernel]()
    add_entry_points(KERNEL_POINTS, kernels, OutsideKernel)
    return kernels


def outside_kernel(name: str, *tensors: Tensor) -> OutsideKernel | None:
    """The other package's kernel that is called `name`, for "auto" any, and runs on `tensors`."""
    # torch.compile sees through our kernels in torch, but not through these.
    if torch.compiler.is_compiling():
        return None
    for other, kernel in outside_kernels().items():
        if name in (AUTO, other) and kernel.runs_on(*tensors):
            return kernel
    return None


def choose_kernel(name: str, u: Tensor, experts: Tensor, A: Tensor, B: Tensor) -> Kernel:
    """The kernel called `name`, or for "auto" the fastest for these arguments.

    The rule behind "auto" is measured on CPUs (docs/performance.md): `native` wherever it can be
    used and few of the experts are chosen; else `gather` while each token's own factors are less to
    read than everybody's, `grouped` for many tokens that choose few of many experts, and `concat`
    between. Other packages' kernels follow `native`; `grouped` stays out where reading counts
    back would wait for a GPU or break torch.compile's graph.
    """
    if name != AUTO:
        return _named(name, u, A, B)
    tokens, k = experts.shape
    E = len(A)
    if 2 * k <= E:
        if native.runs_natively(u, A, B):
            return native.native
        outside = outside_kernel(AUTO, u, A, B)
        if outside is not None:
            return outside.product
    if 2 * tokens * k < E:
        return plain.gather
    has_many = 20 * k < E and tokens * k > 4 * E
    may_read_counts = u.device.type == "cpu" and not torch.compiler.is_compiling()
    if has_many and (may_read_counts or is_one_call(A, B)):
        return plain.grouped
    return plain.concat


def _named(name: str, u: Tensor, A: Tensor, B: Tensor) -> Kernel:
    # Native and others trust what they are handed, and would read it as something else.
    if name in KERNELS and (name != "native" or native.runs_natively(u, A, B)):
        return KERNELS[name]
    outside = outside_kernels().get(name)
    if outside is None or not outside.takes(u, A, B):
        raise ConfigError(
            f"Kernel {name} can't take {u.dtype} on {u.device} here (native: float32 or bfloat16 "
            f"on CPUs, without gradients); use kernel auto."
        )
    return outside.product


def top_experts_for(u: Tensor, vectors: Tensor) -> TopExperts | None:
    """What chooses experts by `vectors` in one call; None where nothing can."""
    if native.runs_natively(u, vectors):
        return native.top_experts
    outside = outside_kernel(AUTO, u, vectors)
    return outside and outside.top_experts


def one_call(name: str, y: Tensor, u: Tensor, stacked: native.Stacked, k: int) -> AddRouted | None:
    """What chooses experts and adds their product to y in one call; None where nothing can."""
    vectors, A, _ = stacked
    has_no_gaps = u.is_contiguous() and vectors.is_contiguous()
    if name in (AUTO, "native") and has_no_gaps and native.runs_natively(y, u, *stacked):
        return native.add_routed
    if name == AUTO and 2 * k > len(A):
        return None
    outside = outside_kernel(name, y, u, *stacked)
    return outside and outside.add_routed
