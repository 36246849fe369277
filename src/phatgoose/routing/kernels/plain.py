"""Kernels in plain torch, and sums that all kernels share.

Whether tensors belong together: asked where a kernel hands their addresses on.

Letters as in `kernels.choice`. Nothing here reads a number of a tensor or waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ...config import ACTIVATIONS
from ...errors import RoutingError
from ...experts.kinds.bottleneck import ACTIVATION


def belong_together(n: int, A: torch.Size, B: torch.Size) -> bool:
    """True for the sizes of factors [E, r, n] and [E, r, d], none of them 0."""
    if not len(A) == len(B) == 3:
        return False
    (E, r, inputs), (same_E, same_r, d) = A, B  # slices of a torch.Size take five times as long
    return inputs == n and same_E == E and same_r == r and E * r * n * d > 0


def is_choice(u: Tensor, experts: Tensor, weights: Tensor) -> bool:
    """True where `experts` and `weights` [T, k] are for the tokens of u [T, n], on its device."""
    return (
        u.dim() == experts.dim() == 2
        and experts.dtype is torch.int64
        and experts.device == weights.device == u.device
        and experts.shape == weights.shape
        and u.shape[0] == experts.shape[0]
    )


def misfit(kernel: str, k: int | None = None, **tensors: Tensor) -> RoutingError:
    """The error for `tensors`, by the letters they are known by, that `kernel` can't take."""
    told = ", ".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        for name, tensor in tensors.items()
    )
    return RoutingError(
        f"Kernel {kernel} can't put these together: {told}{'' if k is None else f', k = {k}'}; "
        f"wanted u [.., n], A [E, r, n], B [E, r, d], vectors [E, n], experts and weights [T, k], "
        f"all contiguous and of one type, indices in int64, and k from 1 to E."
    )


# -------------------------------------------------------------------------------------------------
# Weights of chosen experts, and weighted sums of one vector per expert: scalings, biases.
# -------------------------------------------------------------------------------------------------


def dense_weights(experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weights [T, k] of the chosen `experts` [T, k] as weights of all, [T, count]."""
    return weights.new_zeros(len(experts), count).scatter_add(1, experts, weights)


def reference_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sum over the chosen z of w_z rows_z for every token, [T, d], as a loop over all experts.

    `experts` [T, k] are indices into `rows` [E, d], `weights` [T, k] theirs.
    """
    total = weights.new_zeros(len(experts), rows.shape[1])
    for z in range(len(rows)):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        total = total + w_z * rows[z]
    return total


def weighted_rows(experts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """The same in one operation that fetches each token's rows and keeps none, float32 [T, d]."""
    return functional.embedding_bag(
        experts, rows.float(), per_sample_weights=weights.float(), mode="sum"
    )


# -------------------------------------------------------------------------------------------------
# The routed product in plain torch, and mttl's product of mixed factors.
#
# Arguments and shapes as `kernels.choice` has them.
# -------------------------------------------------------------------------------------------------


def reference(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Sum over z in E_t of w_z B_z A_z u_t for every token t, [T, d] (paper, section 3).

    The oracle of all other kernels. One product per expert, over all tokens, weighted by zero where
    the expert was not chosen.
    """
    delta = torch.zeros(u.shape[0], B.shape[2], dtype=u.dtype, device=u.device)
    for z in range(A.shape[0]):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        delta = delta + w_z.to(u.dtype) * (u @ A[z].T @ B[z])
    return delta


def concat(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product through the concatenated rank space: two large products.

    A u is computed for all E experts at once ([T, E r]), scaled by each token's weights (zero for
    experts not chosen) and multiplied with all B at once. Static shapes; best for many tokens.
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = dense_weights(experts, weights, E)
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    inner = inner * dense.to(u.dtype).unsqueeze(-1)
    return inner.view(tokens, E * r) @ B.reshape(E * r, -1)


def gather(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product through each token's own factors, fetched: for short inputs.

    The k chosen experts of a token are stacked to one LoRA of rank k r. Static shapes.
    """
    tokens, k = experts.shape
    _, r, n = A.shape
    chosen_A = A[experts].view(tokens, k * r, n)
    chosen_B = B[experts].view(tokens, k * r, B.shape[2])
    inner = chosen_A @ u.unsqueeze(-1)  # [T, k r, 1]
    inner = inner.view(tokens, k, r) * weights.to(u.dtype).unsqueeze(-1)
    return (inner.view(tokens, 1, k * r) @ chosen_B).squeeze(1)


def mixed_factors(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(sum over z of w_z B_z)(sum over z of w_z A_z) u for every token, [T, d].

    Shapes as those of kernels, but this is another function: the products B_z A_y of
    different experts take part, so that the result depends on the basis of each expert's rank
    space. It exists to compare with mttl (`arrow="mttl"`).
    """
    E, r, n = A.shape
    tokens = u.shape[0]
    dense = dense_weights(experts, weights, E).to(u.dtype)
    inner = (u @ A.reshape(E * r, n).T).view(tokens, E, r)
    mixed = (dense.unsqueeze(1) @ inner).squeeze(1)  # [T, r]
    outer = dense.unsqueeze(-1) * mixed.unsqueeze(1)  # [T, E, r]
    return outer.view(tokens, E * r) @ B.reshape(E * r, -1)


# -------------------------------------------------------------------------------------------------
# Tokens sorted by expert, then one product per expert: for many tokens and many experts.
# -------------------------------------------------------------------------------------------------


def grouped(u: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The routed product of `kernels.choice` over tokens sorted by expert, [T, d].

    Multiplies what was chosen and nothing else. On GPUs all experts' products are one call of
    `torch.nn.functional.grouped_mm`, and nothing waits for the device; where torch has none for the
    type or the sizes at hand, they are one call each, and counts are read back.
    """
    tokens, k = experts.shape
    chosen = experts.reshape(-1)  # [T k]
    order = chosen.argsort(stable=True)
    counts = torch.zeros(len(A), dtype=torch.int64, device=u.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen))
    inner = expert_products(u[order // k], A.transpose(1, 2), counts)  # [T k, r]
    inner = inner * weights.reshape(-1, 1)[order].to(u.dtype)
    outer = expert_products(inner, B, counts)  # [T k, d]
    return outer[order.argsort()].view(tokens, k, B.shape[2]).sum(dim=1)


def is_one_call(*factors: Tensor) -> bool:
    """True where torch has the products for factors [E, n, m]: bfloat16, n and m multiples of 8."""
    return hasattr(functional, "grouped_mm") and all(
        f.dtype is torch.bfloat16 and not any(size % 8 for size in f.shape[1:]) for f in factors
    )


def expert_products(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] of `rows` [.., n] times factors[0] [n, m], the next times the next."""
    if is_one_call(factors):
        return functional.grouped_mm(rows, factors, offs=counts.cumsum(0).to(torch.int32))
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ factor for part, factor in zip(parts, factors, strict=True)])


# -------------------------------------------------------------------------------------------------
# The routed bottleneck: sum over z of w_z (U_z f_z(D_z y + b_z) + c_z) for outputs y of a site.
#
# Glossary: T tokens, k chosen per token, E experts, m size of the bottleneck, d outputs. All three
# bodies take
#     y            [T, d]     outputs of the site's linear layer
#     experts      [T, k]     indices into the E experts at hand, int64
#     weights      [T, k]     theirs; zero where a token chose something else than a bottleneck
#     down, up     [E, m, d]  D, and U transposed and scaled
#     down_bias    [E, m]     b
#     up_bias      [E, d]     c, scaled
#     activations  [E]        f, as an index into `config.ACTIVATIONS`
# and give the same numbers and gradients, [T, d] in the dtype of y, up to rounding.
#
#     reference_bottleneck  a loop that reads like the formula         the oracle of the others
#     all_bottlenecks       all experts side by side, static shapes    few experts
#     grouped_bottleneck    tokens sorted by expert                    many
# -------------------------------------------------------------------------------------------------

BottleneckKernel = Callable[..., Tensor]


def choose_bottleneck(y: Tensor, experts: Tensor, down: Tensor) -> BottleneckKernel:
    """The faster body: side by side while at most half of the experts are left out.

    Always that off the CPU and under torch.compile, since the other one reads counts back.
    """
    may_read_counts = y.device.type == "cpu" and not torch.compiler.is_compiling()
    few = len(down) <= 2 * experts.shape[1]
    return all_bottlenecks if few or not may_read_counts else grouped_bottleneck


def reference_bottleneck(
    y: Tensor,
    experts: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activations: Tensor,
) -> Tensor:
    """The sum as a loop over all experts."""
    total = torch.zeros_like(y)
    for z in range(len(down)):
        w_z = (weights * (experts == z)).sum(dim=-1, keepdim=True)  # [T, 1]
        inner = ACTIVATION[ACTIVATIONS[activations[z]]](y @ down[z].T + down_bias[z])
        total = total + w_z.to(y.dtype) * (inner @ up[z] + up_bias[z])
    return total


def all_bottlenecks(
    y: Tensor,
    experts: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activations: Tensor,
) -> Tensor:
    """The sum with every expert's bottleneck computed for every token, [T, E m] in between."""
    E, m, d = down.shape
    dense = dense_weights(experts, weights, E).to(y.dtype)
    inner = (y @ down.reshape(E * m, d).T).view(-1, E, m) + down_bias
    inner = _activated(inner, activations.unsqueeze(-1)) * dense.unsqueeze(-1)
    return inner.view(-1, E * m) @ up.reshape(E * m, d) + dense @ up_bias


def grouped_bottleneck(
    y: Tensor,
    experts: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activations: Tensor,
) -> Tensor:
    """The sum with one product per expert; weights of zero cost nothing and get no gradient."""
    pairs = weights.flatten().nonzero().squeeze(1)
    chosen = experts.flatten()[pairs]
    order = chosen.argsort(stable=True)
    pairs, chosen = pairs[order], chosen[order]
    tokens = pairs // experts.shape[1]
    counts = chosen.bincount(minlength=len(down))
    inner = expert_products(y[tokens], down.transpose(1, 2), counts) + down_bias[chosen]
    inner = _activated(inner, activations[chosen].unsqueeze(-1))
    inner = inner * weights.flatten()[pairs].unsqueeze(-1).to(y.dtype)
    outer = expert_products(inner, up, counts)  # [pairs, d]
    total = weighted_rows(experts, weights, up_bias).to(y.dtype)
    return total.index_add(0, tokens, outer)


def _activated(inner: Tensor, activations: Tensor) -> Tensor:
    """The activations f of `inner`, each expert's own; `activations` broadcasts over it."""
    result = torch.zeros_like(inner)
    for index, name in enumerate(ACTIVATIONS):
        result = torch.where(activations == index, ACTIVATION[name](inner), result)
    return result
