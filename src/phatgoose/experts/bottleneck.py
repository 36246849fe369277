"""Bottleneck adapters (Houlsby et al. 2019): y + σ scale (U f(D y + b_D) + b_U) for y = W u + b.

Stored in a small format of our own, since PEFT has none (docs/format.md).

Bottleneck adapters, stacked, and the sum over chosen ones.

    sum over z of w_z (U_z f_z(D_z y + b_z) + c_z)     for outputs y of a site

Two methods compute it, with the same numbers and gradients up to rounding:

    side_by_side  all experts for all tokens, static shapes  few experts
    grouped       tokens sorted by expert                    many

New bottleneck adapters, before the residual is added.

They stand on the output of attention's and of the feed-forward network's last linear layer
(Houlsby et al. 2019), or of the latter alone (Pfeiffer et al. 2021). They are saved in the base's
dtype: exactly the numbers that were validated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional

from ..config import ACTIVATIONS, INIT_STD, Bottleneck
from ..sites import Sites, Tensors
from .adapter_files import ByField, OwnFiles
from .alone import NewModules
from .module import SiteModule
from .stack import Part, Product, scaled, stacked
from .sums import dense_weights, expert_products, weighted_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATION = {name: getattr(functional, name) for name in ACTIVATIONS}
LARGEST_SCALE = 1e9
FILES = OwnFiles(
    "bottleneck_config.json",
    "bottleneck.safetensors",
    settings={
        "activation": Literal["relu", "gelu", "silu"],
        "scale": Annotated[float, Gt(0), Le(LARGEST_SCALE)],
    },
    version_key="bottleneck_version",
)


@dataclass(frozen=True, repr=False)
class BottleneckLayers(SiteModule):
    """One site's bottleneck adapter: `scale * (up f(down y + down_bias) + up_bias)` on y."""

    kind = "bottleneck"
    files = FILES
    parts: ClassVar[ByField] = {
        "down": "md",
        "down_bias": "m",
        "up": "dm",
        "up_bias": "d",
    }
    endings: ClassVar[ByField] = {
        "down": ".down.weight",
        "down_bias": ".down.bias",
        "up": ".up.weight",
        "up_bias": ".up.bias",
    }

    down: Tensor  # [m, d]
    down_bias: Tensor  # [m]
    up: Tensor  # [d, m]
    up_bias: Tensor  # [d]
    activation: str
    scale: float = 1.0

    def at(self, weight: Tensor) -> BottleneckLayers:
        return replace(
            self,
            down=self.down.to(weight),
            down_bias=self.down_bias.to(weight),
            up=(self.scale * self.up.float()).to(weight),
            up_bias=(self.scale * self.up_bias.float()).to(weight),
            scale=1.0,
        )

    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        y: Tensor = base(u)
        inner = ACTIVATION[self.activation](functional.linear(y, self.down, self.down_bias))
        return y + strength * functional.linear(inner, self.up, self.up_bias)


@dataclass(frozen=True)
class BottleneckStack(Part):
    """Bottleneck adapters. Sizes that differ are filled up with zeros, which changes no number."""

    name = "bottleneck"
    prefix = ""
    compared = ("down", "up")

    down: Tensor = stacked("md")
    down_bias: Tensor = stacked("m")
    up: Tensor = stacked("md")  # transposed, scale folded in
    up_bias: Tensor = stacked("d")  # scale folded in
    activations: Tensor = stacked("", "index")  # indices into ACTIVATIONS

    @classmethod
    def row(cls, module: BottleneckLayers) -> Tensors:
        return {
            "down": module.down,
            "down_bias": module.down_bias,
            "up": scaled(module.up, module.scale).T,
            "up_bias": scaled(module.up_bias, module.scale),
            "activations": torch.tensor(ACTIVATIONS.index(module.activation)),
        }

    def added(
        self, u: Tensor, y: Tensor, experts: Tensor, weights: Tensor, product: Product
    ) -> Tensor:
        y = y.to(self.down.dtype)
        few = len(self.down) <= 2 * experts.shape[1]  # at most half of the experts are left out
        # Counts are read back, which would wait for another device or break a compiled graph.
        may_read_counts = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if few or not may_read_counts:
            return self.side_by_side(y, experts, weights)
        return self.grouped(y, experts, weights)

    # Each of these takes outputs y [T, d] and chosen experts [T, k] with their weights, which are
    # zero where a token chose something else; [T, d] in the dtype of y comes back.

    def side_by_side(self, y: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        E, m, d = self.down.shape
        dense = dense_weights(experts, weights, E).to(y.dtype)
        inner = (y @ self.down.reshape(E * m, d).T).view(-1, E, m) + self.down_bias
        inner = _activated(inner, self.activations.unsqueeze(-1)) * dense.unsqueeze(-1)
        return inner.view(-1, E * m) @ self.up.reshape(E * m, d) + dense @ self.up_bias

    def grouped(self, y: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        # Weights of zero (experts of other parts) cost nothing.
        pairs = weights.flatten().nonzero().squeeze(1)
        chosen = experts.flatten()[pairs]
        order = chosen.argsort(stable=True)
        pairs = pairs[order]
        chosen = chosen[order]
        tokens = pairs // experts.shape[1]
        counts = chosen.bincount(minlength=len(self.down))
        inner = expert_products(y[tokens], self.down.transpose(1, 2), counts)
        inner = _activated(inner + self.down_bias[chosen], self.activations[chosen].unsqueeze(-1))
        inner = inner * weights.flatten()[pairs].unsqueeze(-1).to(y.dtype)
        outer = expert_products(inner, self.up, counts)  # [pairs, d]
        total = weighted_rows(experts, weights, self.up_bias).to(y.dtype)
        return total.index_add(0, tokens, outer.to(total.dtype))  # under autocast they differ


def _activated(inner: Tensor, activations: Tensor) -> Tensor:
    result = torch.zeros_like(inner)
    for index, name in enumerate(ACTIVATIONS):
        # Every function for all, since choosing by rows would read indices back.
        result = torch.where(activations == index, ACTIVATION[name](inner), result)
    return result


# The last linear layers of attention and of feed-forward networks, by their names in transformers.
ATTENTION_OUTPUT = r"(?i:[^.]*att[^.]*)\.(o|o_proj|out_proj|c_proj|dense)$"
FEEDFORWARD_OUTPUT = r"\.(wo|down_proj|fc2|fc_out|dense_4h_to_h|w2)$|\bmlp\.c_proj$"
OUTPUTS = {  # patterns of sites by placement
    "houlsby": f"{ATTENTION_OUTPUT}|{FEEDFORWARD_OUTPUT}",
    "pfeiffer": FEEDFORWARD_OUTPUT,
}


class NewBottlenecks(NewModules[Bottleneck]):
    def default_sites(self, model: PreTrainedModel, settings: Bottleneck) -> str:
        return OUTPUTS[settings.placement]

    def initial(
        self, model: PreTrainedModel, settings: Bottleneck, sites: Sites
    ) -> Mapping[str, Tensors]:
        m = settings.size
        return {
            name: {
                "down": torch.empty(m, site.out_features).normal_(std=INIT_STD),
                "down_bias": torch.zeros(m),
                "up": torch.zeros(site.out_features, m),
                "up_bias": torch.zeros(site.out_features),
            }
            for name, site in sites.items()
        }

    def module(
        self, settings: Bottleneck, parameters: Tensors, layer: nn.Module
    ) -> BottleneckLayers:
        return BottleneckLayers(**parameters, activation=settings.activation, scale=settings.scale)
