"""Figures: where the tokens went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["layer_of", "usage_heat_map"]


def layer_of(site: str) -> str:
    """The layer of a site: "7" for `model.layers.7.self_attn.q_proj`, "e7" or "d7" in T5."""
    stack = {"encoder": "e", "decoder": "d"}
    parts = site.split(".")
    prefix = next((stack[part] for part in parts if part in stack), "")
    return prefix + next((part for part in parts if part.isdigit()), site)


def usage_heat_map(
    usage: Mapping[str, Mapping[str, Tensor]], experts: Sequence[str], path: str | Path
) -> None:
    """Write a PNG: one panel per task, experts down, layers across, mean routing weight as colour.

    `usage` maps a task to its mean weights by site, [E] each; a layer's value is the mean over its
    sites (after the paper's Figure 3).
    """
    grids = {task: _by_layer(sites) for task, sites in usage.items()}
    highest = max(float(grid.max()) for grid in grids.values())
    layers = [layer_of(site) for site in next(iter(usage.values()))]
    layers = list(dict.fromkeys(layers))
    figure = Figure(figsize=(9, (0.9 + 0.28 * len(experts)) * len(usage)), layout="constrained")
    panels = figure.subplots(len(usage), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (task, grid) in zip(panels, grids.items(), strict=True):
        image = panel.imshow(grid.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=highest)
        panel.set_yticks(range(len(experts)), experts)
        panel.set_title(task, loc="left", fontsize=10)
    step = max(1, len(layers) // 15)
    panels[-1].set_xticks(range(0, len(layers), step), layers[::step])
    panels[-1].set_xlabel("layer")
    figure.colorbar(image, ax=list(panels), label="mean routing weight", pad=0.01, aspect=40)
    figure.savefig(path, dpi=130)


def _by_layer(sites: Mapping[str, Tensor]) -> Tensor:
    """Mean weights over the sites of each layer, [experts, layers]."""
    layers: dict[str, list[Tensor]] = {}
    for site, weights in sites.items():
        layers.setdefault(layer_of(site), []).append(weights)
    return torch.stack([torch.stack(rows).mean(dim=0) for rows in layers.values()]).T
