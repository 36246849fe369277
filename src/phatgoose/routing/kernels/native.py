"""The routed product and the top-k of scored routers in C++, for CPUs: `native.cpp` beside this.

Wheels of a platform carry it compiled (`shipped`). Elsewhere, or with `PHATGOOSE_NATIVE=compile` in
the environment, the machine's C++ compiler (`$CXX`, else c++) builds it once, in about two seconds,
into the user's cache (`building`). Without a compiler the other kernels serve, more slowly, and one
line says so. `PHATGOOSE_NATIVE=0` turns it off.

The library takes addresses of contiguous CPU tensors through ctypes and trusts their sizes. So each
call first checks the tensors' types, devices and shapes here, and indices in C++. It runs on
torch's own OpenMP threads.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError, RoutingError
from ...files.quoting import one_line
from .building import MORE_FLAGS, load_built
from .shipped import load_shipped
from .sizes import belong_together, is_choice, misfit

__all__ = ["add_routed", "native", "runs_natively", "top_experts"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
POINTER, INDEX = ctypes.c_void_p, ctypes.c_int64
ROUTING = (*[INDEX] * 4, ctypes.c_float, ctypes.c_int)  # tokens, n, E, k, eps, standardised
SIGNATURES = {
    "route": (*[POINTER] * 2, *ROUTING, *[POINTER] * 2),
    "update": (*[POINTER] * 6, *[INDEX] * 7),
    "routed_update": (*[POINTER] * 5, *ROUTING, *[INDEX] * 3),
}


def runs_natively(*tensors: Tensor) -> bool:
    """True when the library is there and can take `tensors`: of one type, on the CPU, no gradients.

    False while torch.compile traces, which sees through the other kernels but not through this.
    """
    return (
        _are_of_one_type(tensors)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _library() is not None
    )


def native(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice`, expert by expert, [T, d].

    Tokens that chose the same expert are multiplied together; weights of zero cost
    nothing; sums are float32. Not differentiable: "auto" takes another kernel where that is wanted.
    Raises ConfigError unless `runs_natively(u, A, B)`, RoutingError when shapes don't belong
    together or an index names no expert.
    """
    if not runs_natively(u, A, B):
        raise ConfigError(
            f"Kernel native needs a C++ compiler, float32 or bfloat16 on a CPU and "
            f"torch.no_grad(), but got {u.dtype} on {u.device}; use kernel auto."
        )
    if not (is_choice(u, experts, weights) and belong_together(u.shape[1], A.shape, B.shape)):
        raise misfit("native", u=u, experts=experts, weights=weights, A=A, B=B)
    (tokens, k), (E, r, n), d = experts.shape, A.shape, B.shape[2]
    u, experts, A, B = u.contiguous(), experts.contiguous(), A.contiguous(), B.contiguous()
    weights = weights.float().contiguous()
    delta = torch.zeros(tokens, d, dtype=u.dtype)
    failed = _function("update", u.dtype)(
        *(t.data_ptr() for t in (delta, u, experts, weights, A, B)),
        *(tokens, k, E, r, n, d, torch.get_num_threads()),
    )
    if failed:
        first, last = experts.min(), experts.max()
        raise RoutingError(f"Experts {first} to {last} were chosen; there are {E}, from 0 on.")
    return delta


def top_experts(u: Tensor, vectors: Tensor, k: int, eps: float | None) -> tuple[Tensor, Tensor]:
    """The k experts of the highest affinity for each token of u [T, n], and their weights.

    `vectors` [E, n] are those of the experts, in the type of `u`. With `eps` the affinity is
    v̄ᵀu / (sqrt(var(u) + eps) √n) as in `ScoredRouter`, with None |vᵀu| as in `ArrowRouter`. Returns
    experts [T, k] int64, best first, of equals the first, and weights [T, k] float32: the softmax.
    Raises RoutingError when shapes or types don't belong together, or k is not from 1 to E.
    """
    if not (_are_of_one_type((u, vectors)) and u.dim() == vectors.dim() == 2):
        raise misfit("native", k, u=u, vectors=vectors)
    (tokens, features), (E, n) = u.shape, vectors.shape
    if not (features == n > 0 and 1 <= k <= E):
        raise misfit("native", k, u=u, vectors=vectors)
    u, vectors = u.contiguous(), vectors.contiguous()
    experts = torch.empty(tokens, k, dtype=torch.int64)
    weights = torch.empty(tokens, k)
    _function("route", u.dtype)(
        *(u.data_ptr(), vectors.data_ptr(), tokens, n, E, k),
        *(eps or 0.0, eps is not None, experts.data_ptr(), weights.data_ptr()),
    )
    return experts, weights


def add_routed(
    y: Tensor,
    u: Tensor,
    vectors: Tensor,
    A: Tensor,
    B: Tensor,
    k: int,
    eps: float | None,
) -> None:
    """Add to y [.., d] in place what `top_experts` and `native` come to for u [.., n], in one call.

    All tensors are contiguous and of one type. Decoding spends its time on calls: this is one where
    there were six. Raises RoutingError as `top_experts` and `native` do.
    """
    sizes, outer = A.shape, B.shape
    E, n, d = sizes[0], sizes[-1], outer[-1]
    numbers = u.numel()
    if not (
        belong_together(n, sizes, outer)
        and vectors.shape == (E, n)
        and 1 <= k <= E
        and u.shape[-1] == n
        and y.shape[-1] == d
        and numbers * d == y.numel() * n
        and _are_of_one_type((y, u, vectors, A, B))
        and y.is_contiguous()
        and u.is_contiguous()
        and vectors.is_contiguous()
        and A.is_contiguous()
        and B.is_contiguous()
    ):
        raise misfit("native", k, y=y, u=u, vectors=vectors, A=A, B=B)
    _function("routed_update", u.dtype)(
        *(y.data_ptr(), u.data_ptr(), vectors.data_ptr(), A.data_ptr(), B.data_ptr()),
        *(numbers // n, n, E, k, eps or 0.0, eps is not None, sizes[1], d),
        torch.get_num_threads(),
    )


def _are_of_one_type(tensors: Iterable[Tensor]) -> bool:
    """True for tensors of one of TYPES on the CPU."""
    kind = None
    for tensor in tensors:
        kind = kind or tensor.dtype
        if tensor.dtype is not kind or not tensor.is_cpu:
            return False
    return kind in TYPES


@cache
def _function(name: str, dtype: torch.dtype) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = getattr(_library(), f"{name}_{TYPES[dtype]}")
    function.argtypes = SIGNATURES[name]
    function.restype = ctypes.c_int if name == "update" else None  # 1: an index out of range
    return function


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, None where it is turned off or, as one line says, can't be built.

    That of the wheel comes first, unless it is to be compiled here, as flags of one's own want too.
    """
    told = os.environ.get("PHATGOOSE_NATIVE")
    if told == "0":
        return None
    compiled_here = told == "compile" or bool(os.environ.get(MORE_FLAGS))
    try:
        return (None if compiled_here else load_shipped(SOURCE)) or load_built(SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("The native kernel can't be built, slower ones serve: %s.", one_line(error))
        return None
