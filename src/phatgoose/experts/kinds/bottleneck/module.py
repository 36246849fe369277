"""Bottleneck adapters (Houlsby et al. 2019): y + σ scale (U f(D y + b_D) + b_U) for y = W u + b.

Stored in a small format of our own, since PEFT has none (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from ....config import ACTIVATIONS
from ....errors import ExpertError
from ..kind import OwnFiles, SiteModule

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
LARGEST_SCALE = 1e9
FILES = OwnFiles(
    "bottleneck_config.json",
    "bottleneck.safetensors",
    parts={"down.weight": "md", "down.bias": "m", "up.weight": "dm", "up.bias": "d"},
    settings={
        "activation": lambda value: value in ACTIVATIONS,
        "scale": lambda value: type(value) in (int, float) and 0 < value <= LARGEST_SCALE,
    },
    version_key="bottleneck_version",
)


@dataclass(frozen=True, repr=False)
class BottleneckLayers(SiteModule):
    """One site's bottleneck adapter: `scale * (up f(down y + down_bias) + up_bias)` on y."""

    kind: ClassVar[str] = "bottleneck"
    files: ClassVar[OwnFiles] = FILES

    down: Tensor  # [m, d]
    down_bias: Tensor  # [m]
    up: Tensor  # [d, m]
    up_bias: Tensor  # [d]
    activation: str
    scale: float = 1.0

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def size(self) -> int:
        return self.down.shape[0]

    def at(self, weight: Tensor) -> BottleneckLayers:
        up, up_bias = ((self.scale * t.float()).to(weight) for t in (self.up, self.up_bias))
        down, down_bias = self.down.to(weight), self.down_bias.to(weight)
        return replace(self, down=down, down_bias=down_bias, up=up, up_bias=up_bias, scale=1.0)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        y: Tensor = base(u)
        inner = ACTIVATION[self.activation](functional.linear(y, self.down, self.down_bias))
        return y + strength * functional.linear(inner, self.up, self.up_bias)

    @classmethod
    def read(
        cls, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, BottleneckLayers]:
        settings = {"activation": config["activation"], "scale": float(config["scale"])}
        return {
            site: cls(down, down_bias, up, up_bias, **settings)
            for site, (down, down_bias, up, up_bias) in FILES.by_site(directory, tensors).items()
        }

    @classmethod
    def write(
        cls, folder: Path, modules: Mapping[str, BottleneckLayers], about: Mapping[str, Any]
    ) -> Path:
        """ExpertError unless the layers share one activation and scale."""
        if len({layer.settings for layer in modules.values()}) != 1:
            raise ExpertError(
                "The layers of one bottleneck adapter share their activation and scale."
            )
        first = next(iter(modules.values()))
        tensors = {s: (m.down, m.down_bias, m.up, m.up_bias) for s, m in modules.items()}
        config = {**about, "activation": first.activation, "scale": first.scale}
        return FILES.write(folder, tensors, config)
