"""Bottleneck adapters on disk: a small format of our own, since PEFT has none (docs/format.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...config import ACTIVATIONS
from ...errors import ExpertError
from ...files.quoting import shortened
from ...files.strict_json import read_json_object
from .modules import BottleneckLayers
from .peft_files import are_floats, read_tensors

__all__ = [
    "BOTTLENECK_CONFIG",
    "BOTTLENECK_WEIGHTS",
    "read_bottleneck",
    "read_bottleneck_config",
    "write_bottleneck",
]

BOTTLENECK_CONFIG = "bottleneck_config.json"
BOTTLENECK_WEIGHTS = "bottleneck.safetensors"
VERSION = 1
LARGEST_SCALE = 1e9
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def read_bottleneck_config(directory: Path) -> dict[str, Any]:
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


def read_bottleneck(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, BottleneckLayers]:
    """The bottleneck layers of the adapter in `directory` by site name.

    `tensors` are its weights where they have been read already. Raises ExpertError when a file is
    missing or damaged, a tensor lacks or is left over, or shapes don't fit each other.
    """
    config = read_bottleneck_config(directory)
    tensors = read_tensors(directory / BOTTLENECK_WEIGHTS) if tensors is None else tensors
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


def write_bottleneck(folder: Path, layers: Mapping[str, BottleneckLayers], base: str) -> Path:
    """`folder`, with `layers` in the two files of the format; all share one activation and scale.

    Raises ExpertError when they don't.
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
        "base": base,
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
