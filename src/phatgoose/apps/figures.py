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
    """The layer of a site: its first number, such as "7" for `model.layers.7.self_attn.q_proj`."""
    return next((part for part in site.split(".") if part.isdigit()), site)


def usage_heat_map(
    usage: Mapping[str, Mapping[str, Tensor]], experts: Sequence[str], path: str | Path
) -> None:
    """Write a PNG: one panel per task, experts down, layers across, mean routing weight as colour.

    `usage` maps a task to its mean weights by site, [E] each; a layer's value is the mean over its
    sites (after the paper's Figure 3).
    """
    height = 1.3 + 0.3 * len(experts)
    figure = Figure(figsize=(9, height * len(usage)), layout="constrained")
    panels = figure.subplots(len(usage), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (task, sites) in zip(panels, usage.items(), strict=True):
        layers: dict[str, list[Tensor]] = {}
        for site, weights in sites.items():
            layers.setdefault(layer_of(site), []).append(weights)
        grid = torch.stack([torch.stack(rows).mean(dim=0) for rows in layers.values()]).T
        image = panel.imshow(grid.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=grid.max())
        panel.set_yticks(range(len(experts)), experts)
        panel.set_xticks(range(0, len(layers), max(1, len(layers) // 15)))
        panel.set_title(task, loc="left", fontsize=10)
        figure.colorbar(image, ax=panel, label="mean weight", pad=0.01)
    panels[-1].set_xlabel("layer")
    figure.savefig(path, dpi=130)
