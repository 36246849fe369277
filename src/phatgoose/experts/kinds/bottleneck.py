"""Bottleneck adapters (Houlsby et al. 2019): y + σ scale (U f(D y + b_D) + b_U) for y = W u + b.

Stored in a small format of our own, since PEFT has none (docs/format.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ...config import ACTIVATIONS
from ...errors import ExpertError
from ...files.strict import read_json_object, shortened
from ...files.tensor_file import TensorFile
from .kind import AdapterFiles, SiteModule, are_floats, read_tensors

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
BOTTLENECK_CONFIG = "bottleneck_config.json"
BOTTLENECK_WEIGHTS = "bottleneck.safetensors"
VERSION = 1
LARGEST_SCALE = 1e9
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True, repr=False)
class BottleneckLayers(SiteModule):
    """One site's bottleneck adapter: `scale * (up f(down y + down_bias) + up_bias)` on y."""

    kind: ClassVar[str] = "bottleneck"

    down: Tensor  # [m, d]
    down_bias: Tensor  # [m]
    up: Tensor  # [d, m]
    up_bias: Tensor  # [d]
    activation: str
    scale: float = 1.0

    @property
    def out_features(self) -> int:
        """The size d of the site's output."""
        return self.up.shape[0]

    @property
    def size(self) -> int:
        """The size m of the bottleneck."""
        return self.down.shape[0]

    def at(self, weight: Tensor) -> BottleneckLayers:
        """The same in the dtype and on the device of `weight`, with the scale folded in."""
        up, up_bias = ((self.scale * t.float()).to(weight) for t in (self.up, self.up_bias))
        down, down_bias = self.down.to(weight), self.down_bias.to(weight)
        return replace(self, down=down, down_bias=down_bias, up=up, up_bias=up_bias, scale=1.0)

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The base's output y plus what the layers make of it at this strength, [.., d]."""
        y: Tensor = base(u)
        inner = ACTIVATION[self.activation](functional.linear(y, self.down, self.down_bias))
        return y + strength * functional.linear(inner, self.up, self.up_bias)


def _read_config(directory: Path) -> dict[str, Any]:
    """What `bottleneck_config.json` says. Raises ExpertError unless it is exactly as specified."""
    path = directory / BOTTLENECK_CONFIG
    try:
        config = read_json_object(path)
    except FileNotFoundError as error:
        raise ExpertError(f"{directory} holds no {BOTTLENECK_CONFIG}.") from error
    if config.get("bottleneck_version") != VERSION:
        raise ExpertError(
            f"{path}: version {shortened(config.get('bottleneck_version'))} is unknown; this "
            f"phatgoose reads version {VERSION}."
        )
    scale = config.get("scale")
    known = {
        "bottleneck_version": True,
        "base": isinstance(config.get("base"), str),
        "activation": config.get("activation") in ACTIVATIONS,
        "scale": type(scale) in (int, float) and 0 < scale <= LARGEST_SCALE,  # type: ignore[operator]
    }
    for key in sorted(config.keys() ^ known.keys()):
        raise ExpertError(
            f"{path}: {shortened(key)} is {'unknown' if key in config else 'missing'}; wanted "
            f"exactly {', '.join(known)}."
        )
    for key, is_right in known.items():
        if not is_right:
            raise ExpertError(f"{path}: {key} is {shortened(config[key])}, which it can't be.")
    return config


def _read_weights(directory: Path) -> TensorFile:
    return read_tensors(directory / BOTTLENECK_WEIGHTS)


BOTTLENECK_FILES = AdapterFiles(
    BOTTLENECK_CONFIG, BOTTLENECK_WEIGHTS, "base", _read_config, _read_weights
)


def read_bottleneck(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, BottleneckLayers]:
    """The bottleneck layers by site of an adapter that was read already.

    Raises ExpertError when a tensor is missing or left over, or shapes don't fit each other.
    """
    layers = {}
    for site in sorted({_site_of(key, directory) for key in tensors}):
        parts = [tensors.get(f"{site}.{part}") for part in PARTS]
        present = [part for part in parts if part is not None]
        if len(present) < len(PARTS) or not _fit_together(*present):
            raise ExpertError(
                f"{directory}, site {site}: wanted {', '.join(PARTS)} of shapes (m, d), (m), "
                f"(d, m), (d), in floating point, got "
                f"{', '.join(str(None if p is None else tuple(p.shape)) for p in parts)}."
            )
        down, down_bias, up, up_bias = present
        settings = {"activation": config["activation"], "scale": float(config["scale"])}
        layers[site] = BottleneckLayers(down, down_bias, up, up_bias, **settings)
    if not layers:
        raise ExpertError(f"{directory}: {BOTTLENECK_WEIGHTS} holds no bottleneck layers.")
    return layers


def write_bottleneck(
    folder: Path, layers: Mapping[str, BottleneckLayers], about: Mapping[str, Any]
) -> Path:
    """`folder`, with `layers` by site in the two files of the format.

    `about` goes into the configuration: {"base": id}. Raises ExpertError unless the layers share
    one activation and scale.
    """
    shared = {layer.settings for layer in layers.values()}
    if len(shared) != 1:
        raise ExpertError("The layers of one bottleneck adapter share their activation and scale.")
    first = next(iter(layers.values()))
    tensors = {
        f"{site}.{part}": tensor.detach().cpu().contiguous()
        for site, layer in layers.items()
        for part, tensor in zip(
            PARTS, (layer.down, layer.down_bias, layer.up, layer.up_bias), strict=True
        )
    }
    save_file(tensors, folder / BOTTLENECK_WEIGHTS)
    content = {
        "bottleneck_version": VERSION,
        **about,
        "activation": first.activation,
        "scale": first.scale,
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / BOTTLENECK_CONFIG).write_text(text, encoding="utf-8")
    return folder


def _site_of(key: str, directory: Path) -> str:
    for part in PARTS:
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}")
    raise ExpertError(
        f"{directory}: {BOTTLENECK_WEIGHTS} holds {shortened(key, 200)}, which is no part of a "
        f"bottleneck adapter."
    )


def _fit_together(down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> bool:
    """True when the four make one bottleneck, in floating point."""
    parts = (down, down_bias, up, up_bias)
    if (down.dim(), up.dim()) != (2, 2) or not are_floats(*parts) or min(down.shape) < 1:
        return False
    m, d = down.shape
    return (up.shape, down_bias.shape, up_bias.shape) == ((d, m), (m,), (d,))
