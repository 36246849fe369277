"""New bottleneck adapters, layers of our own, before the residual is added.

They stand on the output of attention's and of the feed-forward network's last linear layer (Houlsby
et al. 2019), or of the latter alone (Pfeiffer et al. 2021). They are saved in the base's dtype:
exactly the numbers that were validated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...base.loading import Base
from ...base.sites import Site, WrappedLinear
from ...config import Bottleneck
from ...experts.applied import replaced
from ...experts.kinds.bottleneck import BottleneckLayers, write_bottleneck
from ..gates import openness
from ..joint_gates import new_gate
from .fresh import FreshExpert

__all__ = ["OUTPUTS", "count_bottleneck", "new_bottleneck"]

# The last linear layers of attention and of feed-forward networks, by their names in transformers.
ATTENTION_OUTPUT = r"(?i:[^.]*att[^.]*)\.(o|o_proj|out_proj|c_proj|dense)$"
FEEDFORWARD_OUTPUT = r"\.(wo|down_proj|fc2|fc_out|dense_4h_to_h|w2)$|\bmlp\.c_proj$"
OUTPUTS = {  # patterns of sites by placement
    "houlsby": f"{ATTENTION_OUTPUT}|{FEEDFORWARD_OUTPUT}",
    "pfeiffer": FEEDFORWARD_OUTPUT,
}


def count_bottleneck(model: PreTrainedModel, bottleneck: Bottleneck, sites: Iterable[Site]) -> int:
    """The number of trained parameters at `sites`: those of two layers with biases each."""
    size = bottleneck.size
    return sum((2 * size + 1) * site.out_features + size for site in sites)


@contextmanager
def new_bottleneck(
    base: Base, bottleneck: Bottleneck, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    """`base` with new bottleneck adapters at `sites` while the context is open."""
    base.model.requires_grad_(False)
    layers = {
        name: _BottleneckLinear(base.model.get_submodule(name), site, bottleneck, joint=joint)
        for name, site in sites.items()
    }

    def save(folder: Path) -> None:
        trained = {site: layer.layers(base.model.dtype) for site, layer in layers.items()}
        write_bottleneck(folder, trained, {"base": base.id})

    with replaced(base.model, layers):
        yield FreshExpert(base.model, layers, save)


class _BottleneckLinear(WrappedLinear):
    """A linear layer with a bottleneck adapter in training, behind a joint gate if `joint`."""

    def __init__(self, base: nn.Module, site: Site, shape: Bottleneck, *, joint: bool) -> None:
        super().__init__(base, site.in_features, site.out_features)
        self.activation, self.scale = shape.activation, shape.scale
        d, m, device = site.out_features, shape.size, self.weight.device
        down = torch.zeros(m, d)
        nn.init.normal_(down, std=shape.init_std)  # drawn on the CPU: the same on every device
        self.down = nn.Parameter(down.to(device))
        self.down_bias = nn.Parameter(torch.zeros(m, device=device))
        self.up = nn.Parameter(torch.zeros(d, m, device=device))
        self.up_bias = nn.Parameter(torch.zeros(d, device=device))
        self.gate = new_gate(site.in_features, device) if joint else None

    def layers(self, dtype: torch.dtype) -> BottleneckLayers:
        """The adapter as it is now, in `dtype`."""
        down, down_bias = self.down.to(dtype), self.down_bias.to(dtype)
        up, up_bias = self.up.to(dtype), self.up_bias.to(dtype)
        return BottleneckLayers(down, down_bias, up, up_bias, self.activation, self.scale)

    def forward(self, u: Tensor) -> Tensor:
        strength = 1.0 if self.gate is None else openness(u, self.gate)
        return self.layers(u.dtype).apply(self.base, u, self.scale * strength)
