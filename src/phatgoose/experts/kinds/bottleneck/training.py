"""New bottleneck adapters, before the residual is added.

They stand on the output of attention's and of the feed-forward network's last linear layer
(Houlsby et al. 2019), or of the latter alone (Pfeiffer et al. 2021). They are saved in the base's
dtype: exactly the numbers that were validated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....config import Bottleneck
from ....sites import Site
from ..kind import NewLayers
from .module import BottleneckLayers

# The last linear layers of attention and of feed-forward networks, by their names in transformers.
ATTENTION_OUTPUT = r"(?i:[^.]*att[^.]*)\.(o|o_proj|out_proj|c_proj|dense)$"
FEEDFORWARD_OUTPUT = r"\.(wo|down_proj|fc2|fc_out|dense_4h_to_h|w2)$|\bmlp\.c_proj$"
OUTPUTS = {  # patterns of sites by placement
    "houlsby": f"{ATTENTION_OUTPUT}|{FEEDFORWARD_OUTPUT}",
    "pfeiffer": FEEDFORWARD_OUTPUT,
}


class NewBottlenecks(NewLayers):
    def default_sites(self, model: PreTrainedModel, settings: Bottleneck) -> str:
        return OUTPUTS[settings.placement]

    def initial(self, settings: Bottleneck, site: Site) -> dict[str, Tensor]:
        d, m = site.out_features, settings.size
        down = torch.zeros(m, d)
        nn.init.normal_(down, std=settings.init_std)
        return {
            "down": down,
            "down_bias": torch.zeros(m),
            "up": torch.zeros(d, m),
            "up_bias": torch.zeros(d),
        }

    def module(self, settings: Bottleneck, parameters: Mapping[str, Tensor]) -> BottleneckLayers:
        return BottleneckLayers(**parameters, activation=settings.activation, scale=settings.scale)

    def strength(self, settings: Bottleneck) -> float:
        return settings.scale
