"""The routed LoRA product, sum over z of w_z B_z A_z u: one signature, several bodies.

Glossary (METHOD section 2): T tokens, n inputs, d outputs, E experts, k chosen per token, r rank.

Every kernel is a function `(u, experts, weights, A, B) -> delta` of
    u        [T, n]     input activations
    experts  [T, k]     indices into the E experts at hand, int64
    weights  [T, k]     their weights
    A        [E, r, n]  LoRA factors
    B        [E, r, d]  LoRA factors, transposed, so that both unfold without a copy; scaled
    delta    [T, d]     in the dtype of u
and gives the same numbers and gradients as `reference`, up to rounding. None waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import ConfigError
from .concat import concat
from .gather import gather
from .reference import reference

__all__ = ["KERNELS", "Kernel", "choose_kernel", "concat", "gather", "reference"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

KERNELS: dict[str, Kernel] = {"reference": reference, "concat": concat, "gather": gather}


def choose_kernel(name: str, tokens: int, chosen: int, experts: int) -> Kernel:
    """The kernel called `name`, or for "auto" the one that moves the least memory.

    `gather` reads `tokens * chosen` pairs of factors, `concat` all `experts` of them once.
    Raises ConfigError for an unknown name.
    """
    if name == "auto":
        return gather if tokens * chosen < experts else concat
    if name not in KERNELS:
        raise ConfigError(f"kernel is {name!r}, but must be auto, {', '.join(KERNELS)}.")
    return KERNELS[name]
