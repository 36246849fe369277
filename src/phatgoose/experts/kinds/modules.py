"""What an expert does at a site: a LoRA, an (IA)³ vector or a bottleneck adapter.

Glossary: u input of the site's linear layer [.., n], y its output [.., d], W and b its weight and
bias, σ the strength at which the module acts (1, or [.., 1] for each token).

    LoRA          W u + b + σ scale (B A u + b_B), b_B only where PEFT's lora_bias is on
    (IA)³         (W u + b) ⊙ (1 + σ (l - 1)), or with the input scaled W (u ⊙ (1 + σ (l - 1))) + b
    bottleneck    y + σ scale (U f(D y + b_D) + b_U) for y = W u + b

At strength 1 these are the modules as they were trained, at 0 the base alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ACTIVATION", "BottleneckLayers", "LoraFactors", "ScalingVector", "SiteModule"]

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


@dataclass(frozen=True)
class LoraFactors:
    """One site's LoRA: the update is `scale * (B @ A @ u + bias)`."""

    kind: ClassVar[str] = "lora"

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float
    bias: Tensor | None = None  # [d]

    @property
    def in_features(self) -> int | None:
        """The size n of the site's input."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int | None:
        """The size d of the site's output."""
        return self.B.shape[0]

    @property
    def size(self) -> int | None:
        """The rank."""
        return self.A.shape[0]

    @property
    def settings(self) -> object:
        """What decides beside the tensors."""
        return self.scale

    def at(self, weight: Tensor) -> LoraFactors:
        """The same in the dtype and on the device of `weight`, with the scale folded in."""
        B = (self.scale * self.B.float()).to(weight)
        bias = None if self.bias is None else (self.scale * self.bias.float()).to(weight)
        return LoraFactors(self.A.to(weight), B, 1.0, bias)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output of `base` for u under this module, which was taken through `at`, [.., d]."""
        y: Tensor = base(u)
        update = functional.linear(functional.linear(u, self.A), self.B, self.bias)
        return y + strength * update


@dataclass(frozen=True)
class ScalingVector:
    """One site's (IA)³ vector l: it scales the input or the output of the linear layer."""

    kind: ClassVar[str] = "ia3"

    vector: Tensor  # [n] or [d]
    on_input: bool

    @property
    def in_features(self) -> int | None:
        """The size n of the site's input, None where the output is scaled."""
        return len(self.vector) if self.on_input else None

    @property
    def out_features(self) -> int | None:
        """The size d of the site's output, None where the input is scaled."""
        return None if self.on_input else len(self.vector)

    @property
    def size(self) -> int | None:
        """None: a vector has no rank."""
        return None

    @property
    def settings(self) -> object:
        """What decides beside the tensors."""
        return self.on_input

    def at(self, weight: Tensor) -> ScalingVector:
        """The same on the device of `weight`, in float32: a bfloat16 is far too coarse around 1."""
        return ScalingVector(self.vector.to(weight.device, torch.float32), self.on_input)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output of `base` for u under this module, which was taken through `at`, [.., d]."""
        factor = 1 + strength * (self.vector - 1)
        if self.on_input:
            scaled: Tensor = base((u * factor).to(u.dtype))
            return scaled
        y: Tensor = base(u)
        return (y * factor).to(y.dtype)


@dataclass(frozen=True)
class BottleneckLayers:
    """One site's bottleneck adapter: `scale * (up f(down y + down_bias) + up_bias)` on y."""

    kind: ClassVar[str] = "bottleneck"

    down: Tensor  # [m, d]
    down_bias: Tensor  # [m]
    up: Tensor  # [d, m]
    up_bias: Tensor  # [d]
    activation: str
    scale: float = 1.0

    @property
    def in_features(self) -> int | None:
        """None: the site's input doesn't reach it."""
        return None

    @property
    def out_features(self) -> int | None:
        """The size d of the site's output."""
        return self.up.shape[0]

    @property
    def size(self) -> int | None:
        """The size m of the bottleneck."""
        return self.down.shape[0]

    @property
    def settings(self) -> object:
        """What decides beside the tensors."""
        return (self.activation, self.scale)

    def at(self, weight: Tensor) -> BottleneckLayers:
        """The same in the dtype and on the device of `weight`, with the scale folded in."""
        up, up_bias = ((self.scale * t.float()).to(weight) for t in (self.up, self.up_bias))
        down, down_bias = self.down.to(weight), self.down_bias.to(weight)
        return replace(self, down=down, down_bias=down_bias, up=up, up_bias=up_bias, scale=1.0)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output of `base` for u under this module, which was taken through `at`, [.., d]."""
        y: Tensor = base(u)
        inner = ACTIVATION[self.activation](functional.linear(y, self.down, self.down_bias))
        return y + strength * functional.linear(inner, self.up, self.up_bias)


SiteModule = LoraFactors | ScalingVector | BottleneckLayers
