"""Arrow's vectors: the direction in which an expert stretches its input most (METHOD section 5).

Ostapenko et al. 2024. The vector is the first right singular vector of B A, found without ever
forming the d x n product: with A^T = Q R, B A = (B R^T) Q^T, so the SVD of the small d x r matrix
B R^T gives it; a second QR makes that r x r.

Variants, chosen by the setting `arrow`:
    svd   exact, top k, outputs mixed: the paper's form, and the default
    peft  as peft's create_arrow_model: 15 steps of power iteration from a random start, which may
          stop short of the exact vector when two singular values are close
    mttl  exact vectors, but as in mttl all experts take part (k is not used) and the factors are
          mixed before their product, (sum w B)(sum w A) u, which is another function
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import ConfigError
from ....experts.kinds.lora import LoraFactors

__all__ = ["ARROW_VARIANTS", "arrow_vector"]

ARROW_VARIANTS = ("svd", "peft", "mttl")
POWER_STEPS = 15
SMALLEST = 1e-8


def arrow_vector(lora: LoraFactors, variant: str = "svd", seed: int = 0) -> Tensor:
    """The unit vector of one expert at one site, float32 [n]; zeros if the update is zero.

    `seed` starts the power iteration of the variant "peft". Raises ConfigError for an unknown
    variant.
    """
    if variant not in ARROW_VARIANTS:
        raise ConfigError(f"arrow is {variant!r}, but must be one of {', '.join(ARROW_VARIANTS)}.")
    A, B = lora.A.float(), lora.B.float()
    if variant == "peft":
        return _power_iteration(A, B, seed)
    return _first_right_singular_vector(A, B)


def _first_right_singular_vector(A: Tensor, B: Tensor) -> Tensor:
    """Of B A, for A [r, n] and B [d, r], by two QR decompositions and an SVD of r x r."""
    Q, R = torch.linalg.qr(A.double().T)  # [n, r], [r, r]
    small = torch.linalg.qr(B.double(), mode="r").R @ R.T  # [r, r]
    _, singular_values, V = torch.linalg.svd(small)
    direction = V[0] if singular_values[0] > 0 else torch.zeros_like(V[0])
    vector: Tensor = Q @ direction
    return vector.float()


def _power_iteration(A: Tensor, B: Tensor, seed: int) -> Tensor:
    """The same by 15 multiplications with A^T B^T B A, as peft's ArrowLoraLinearLayer does it."""
    generator = torch.Generator().manual_seed(seed)
    vector: Tensor = torch.randn(A.shape[1], generator=generator)
    vector = vector / (vector.norm() + SMALLEST)
    inner = B.T @ B
    for _ in range(POWER_STEPS):
        vector = A.T @ (inner @ (A @ vector))
        vector = vector / (vector.norm() + SMALLEST)
    return vector
