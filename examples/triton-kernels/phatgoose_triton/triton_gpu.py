"""The routed product and the top-k of scored routers in Triton, for GPUs without gradients.

The programs are in `triton_programs`. Triton comes with torch's builds for GPUs; without it the
other kernels serve, more slowly. Under `TRITON_INTERPRET=1`, set before Triton is first imported,
the same programs run on the CPU, for tests.

Few tokens are multiplied one by one, each with its own experts' factors; many are grouped on the
device into blocks of one expert each, whose number the shapes bound. So no call waits for the
device, and calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from phatgoose.routing.kernels.native import Stacked

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability from which on all of DTYPES can be multiplied
LEAST_PAIRS = 512  # below, an estimate: five launches more take longer than reading factors again
PAIRS = 512  # counted and placed by one program
FEW_RANKS = 4  # of one pair, computed by one program
FITTING = 64  # experts whose scores one program can hold and choose among
MOST_SEARCHED = 4096  # scores that each program of a pair looks through itself, k times E


def runs_on_triton(*tensors: Tensor) -> bool:
    """True when Triton can take `tensors`: of one type, on one GPU that it knows, no gradients."""
    # torch.compile sees through the other kernels, but not through these.
    return tensors[0].is_cuda and not torch.compiler.is_compiling() and takes(*tensors)


def triton_gpu(
    u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor, y: Tensor | None = None
) -> Tensor:
    """The routed product of `kernels`, one by one or in blocks, [T, d]; where it `takes` u, A, B.

    It is added to y if given. Indices are believed: looking at them would wait for the device.
    """
    if u.numel() == 0 or experts.numel() == 0:
        return u.new_zeros(len(u), B.shape[2])
    body = in_blocks if experts.numel() > _most_apart(len(A)) else one_by_one
    return body(u, experts, weights, A, B, y)


def top_experts(u: Tensor, vectors: Tensor, k: int, eps: float | None) -> tuple[Tensor, Tensor]:
    """As `native.top_experts`, on the device of `u`: call it where `runs_on_triton(u, vectors)`."""
    u, vectors = _contiguous(u, vectors)
    tokens = len(u)
    E, n = vectors.shape
    experts = u.new_empty(tokens, k, dtype=torch.int64)
    weights = u.new_empty(tokens, k, dtype=torch.float32)
    if tokens == 0:
        return experts, weights
    if E <= FITTING:
        with _programs_for(u) as programs:
            programs.score_and_choose[(-(-tokens // _tokens_at_once(tokens)),)](
                u,
                vectors,
                experts,
                weights,
                tokens,
                n,
                E,
                k,
                eps or 0.0,
                **_scoring(u, eps),
                BLOCK_E=_block(E, 16),
                BLOCK_K=_block(k),
            )
        return experts, weights
    scores = _scores(u, vectors, eps)
    row = _block(E)
    with _programs_for(u) as programs:
        programs.choose_experts[(tokens,)](
            scores,
            experts,
            weights,
            E,
            k,
            BLOCK_E=row,
            BLOCK_K=_block(k),
            num_warps=min(max(row // 256, 1), 8),
        )
    return experts, weights


def _scores(u: Tensor, vectors: Tensor, eps: float | None) -> Tensor:
    tokens = len(u)
    E, n = vectors.shape
    scores = u.new_empty(tokens, E, dtype=torch.float32)
    block_t = _tokens_at_once(tokens)
    block_e = 16 if block_t == 16 else FITTING
    with _programs_for(u) as programs:
        programs.score_experts[(-(-tokens // block_t), -(-E // block_e))](
            u,
            vectors,
            scores,
            tokens,
            n,
            E,
            eps or 0.0,
            **_scoring(u, eps),
            BLOCK_E=block_e,
        )
    return scores


def _tokens_at_once(tokens: int) -> int:
    return 16 if tokens <= 16 else 32


def _scoring(u: Tensor, eps: float | None) -> dict[str, int]:
    return {
        "STANDARDISED": eps is not None,
        "BLOCK_T": _tokens_at_once(len(u)),
        "BLOCK_N": loaded_features(u.itemsize, u.shape[1]),
    }


def add_routed(y: Tensor, u: Tensor, stacked: Stacked, k: int, eps: float | None) -> None:
    """Add to y [.., d], contiguous, in place, rounded once, the weighted updates of experts.

    Call it where `runs_on_triton(y, u, *stacked)`.
    """
    vectors, A, B = stacked
    tokens = u.reshape(-1, u.shape[-1])
    sums = y.view(-1, y.shape[-1])
    E = len(A)
    if u.numel() == 0:
        return
    # With few pairs every program searches its token's scores itself, which saves a launch.
    if len(tokens) * k > _most_apart(E) or k * E > MOST_SEARCHED:
        triton_gpu(tokens, *top_experts(tokens, vectors, k, eps), A, B, sums)
        return
    tokens, vectors, A, B = _contiguous(tokens, vectors, A, B)
    experts = u.new_empty(len(tokens), k, dtype=torch.int64)
    weights = u.new_empty(len(tokens), k, dtype=torch.float32)
    _apart(tokens, _scores(tokens, vectors, eps), (experts, weights), A, B, sums)


def _most_apart(E: int) -> int:
    return max(LEAST_PAIRS, 2 * E)


def one_by_one(
    u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor, y: Tensor | None = None
) -> Tensor:
    """The product of `triton_gpu` with each pair's own factors; added to y if given."""
    u, experts, weights, A, B = _contiguous(u, experts, weights.float(), A, B)
    return _apart(u, None, (experts, weights), A, B, y)


def _apart(
    u: Tensor,
    scores: Tensor | None,
    decided: tuple[Tensor, Tensor],
    A: Tensor,
    B: Tensor,
    y: Tensor | None,
) -> Tensor:
    experts, weights = decided
    tokens, k = experts.shape
    E, r, n = A.shape
    d = B.shape[2]
    inner = u.new_empty(tokens * k, r, dtype=torch.float32)
    delta = u.new_empty(tokens, d) if y is None else y
    chooses = scores is not None
    features = computed_features(u.itemsize, d)
    with _programs_for(u) as programs:
        programs.shrink_pair[(tokens * k, -(-r // FEW_RANKS))](
            u,
            scores if chooses else weights,
            experts,
            weights,
            A,
            inner,
            E,
            k,
            r,
            n,
            CHOOSES=chooses,
            BLOCK_E=_block(E) if chooses else 1,
            BLOCK_R=FEW_RANKS,
            BLOCK_N=512,
        )
        programs.expand_token[(tokens, -(-d // features))](
            inner,
            experts,
            weights,
            B,
            delta,
            k,
            r,
            d,
            ADDED=y is not None,
            BLOCK_D=features,
        )
    return delta


def in_blocks(
    u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor, y: Tensor | None = None
) -> Tensor:
    """The product of `triton_gpu` with an expert's pairs together; added to y if given."""
    u, experts, weights, A, B = _contiguous(u, experts, weights.float(), A, B)
    tokens, k = experts.shape
    E, r, n = A.shape
    d = B.shape[2]
    pairs = tokens * k
    size = _block(pairs // E, 16, 64)  # pairs multiplied together
    owners, rows = _arrange(experts, weights, E, size)
    inner = u.new_empty(pairs, r, dtype=torch.float32)
    # A row for each pair, summed by token later: no sum depends on the order of atomics.
    parts = u.new_empty(pairs, d)
    delta = u.new_empty(tokens, d) if y is None else y
    ranks = _block(r, 16, 64)
    features = computed_features(u.itemsize, d)
    with _programs_for(u) as programs:
        programs.shrink_block[(len(owners), -(-r // ranks))](
            u,
            owners,
            rows,
            weights,
            A,
            inner,
            k,
            r,
            n,
            BLOCK_T=size,
            BLOCK_R=ranks,
            BLOCK_N=loaded_features(u.itemsize, n),
        )
        programs.expand_block[(len(owners), -(-d // features))](
            inner,
            owners,
            rows,
            B,
            parts,
            r,
            d,
            BLOCK_T=size,
            BLOCK_D=features,
        )
        programs.add_choices[(tokens, -(-d // 1024))](
            parts,
            weights,
            delta,
            k,
            d,
            ADDED=y is not None,
            BLOCK_D=1024,
        )
    return delta


def _arrange(experts: Tensor, weights: Tensor, E: int, size: int) -> tuple[Tensor, Tensor]:
    pairs = experts.numel()
    # As many blocks as there could ever be (an expert leaves part of one empty at most): the true
    # number would have to be read back.
    most = (pairs + min(E, pairs) * (size - 1)) // size
    # One fill for all three, since launches are what it costs.
    zeros = torch.zeros(E + most * (1 + size), dtype=torch.int32, device=experts.device)
    counts, owners, rows = torch.split(zeros, [E, most, most * size])
    firsts = torch.empty_like(counts)
    places = torch.empty(pairs, dtype=torch.int32, device=experts.device)
    grid = (-(-pairs // PAIRS),)
    with _programs_for(experts) as programs:
        programs.count_pairs[grid](experts, weights, counts, places, pairs, BLOCK=PAIRS)
        programs.arrange_experts[(1,)](counts, firsts, E, BLOCK_T=size, BLOCK_E=_block(E))
        programs.place_pairs[grid](
            experts,
            weights,
            places,
            firsts,
            owners,
            rows,
            pairs,
            BLOCK_T=size,
            BLOCK=PAIRS,
        )
    return owners, rows.view(most, size)


def loaded_features(itemsize: int, n: int) -> int:
    """Features of u and A [n] that a program loads at once."""
    # The most with which no program spills registers
    # (tests/test_triton_programs.py). Rows that don't begin at multiples of 16
    # bytes are loaded number by number, into more registers.
    return (512 // itemsize if n % 16 == 0 else 64) // itemsize


def computed_features(itemsize: int, d: int) -> int:
    """Features of the output [d] that a program computes at once."""
    return (256 if d % 16 == 0 else 128) // itemsize


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _block(size: int, least: int = 1, most: int = 1 << 30) -> int:
    power = 1 << max(size - 1, 0).bit_length()
    return min(max(power, least), most)


def takes(*tensors: Tensor) -> bool:
    """As `runs_on_triton`, also in Triton's interpreter."""
    dtype = tensors[0].dtype
    device = tensors[0].device
    are_alike = all(tensor.dtype == dtype and tensor.device == device for tensor in tensors)
    if dtype not in DTYPES or not are_alike:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return _serves(device)


@cache
def _serves(device: torch.device) -> bool:
    if device.type == "cuda":
        is_supported = torch.cuda.get_device_capability(device) >= OLDEST
    else:
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        is_supported = device.type == "cpu" and is_interpreted
    if not is_supported or _programs() is None:
        return False
    counts = torch.ones(1, dtype=torch.int32, device=device)
    try:
        with _programs_for(counts) as programs:
            # Tried out, since Triton may lack a C compiler, for one.
            programs.arrange_experts[(1,)](counts, counts, 1, BLOCK_T=16, BLOCK_E=16)
    except Exception as error:  # Triton's own are of many kinds
        logger.info("Triton can't be used on %s, other kernels serve: %s", device, error)
        return False
    return True


@contextmanager
def _programs_for(tensor: Tensor) -> Iterator[Any]:
    # Triton starts programs on the current device, whichever the tensor's is.
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        yield _programs()


@cache
def _programs() -> ModuleType | None:
    try:
        from . import triton_programs
    except ImportError as error:
        logger.info("Triton can't be used, other kernels serve: %s", error)
        return None
    return triton_programs
