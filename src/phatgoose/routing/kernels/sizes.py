"""Whether tensors belong together: asked where a kernel hands their addresses on.

Letters as in `kernels.choice`. Nothing here reads a number of a tensor or waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import RoutingError

__all__ = ["belong_together", "is_choice", "misfit"]


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
