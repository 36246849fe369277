"""The routed bottleneck: sum over z of w_z (U_z f_z(D_z y + b_z) + c_z) for outputs y of a site.

Glossary: T tokens, k chosen per token, E experts, m size of the bottleneck, d outputs. All three
bodies take
    y            [T, d]     outputs of the site's linear layer
    experts      [T, k]     indices into the E experts at hand, int64
    weights      [T, k]     theirs; zero where a token chose something else than a bottleneck
    down, up     [E, m, d]  D, and U transposed and scaled
    down_bias    [E, m]     b
    up_bias      [E, d]     c, scaled
    activations  [E]        f, as an index into `config.ACTIVATIONS`
and give the same numbers and gradients, [T, d] in the dtype of y, up to rounding.

    reference_bottleneck  a loop that reads like the formula         the oracle of the others
    all_bottlenecks       all experts side by side, static shapes    few experts
    grouped_bottleneck    tokens sorted by expert                    many
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...config import ACTIVATIONS
from ...experts.kinds.bottleneck import ACTIVATION
from .grouped import expert_products
from .weighted_rows import dense_weights, weighted_rows

__all__ = [
    "BottleneckKernel",
    "all_bottlenecks",
    "choose_bottleneck",
    "grouped_bottleneck",
    "reference_bottleneck",
]

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
