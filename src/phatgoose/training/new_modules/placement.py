"""Where a new expert acts: the sites of each kind, by default those of the papers.

LoRA: every site (METHOD section 1). (IA)³: what PEFT adapts in models of the base's kind, as Liu et
al. 2022 do it: keys, values, and the input of the feed-forward's last linear layer. Bottleneck
adapters: the output of attention's and of the feed-forward's last linear layer (Houlsby et al.
2019), or of the latter alone (Pfeiffer et al. 2021), before the residual is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES,
)
from transformers import PreTrainedModel

from ...base.sites import Site, find_sites
from ...config import IA3, Bottleneck, Lora, Peft
from ...errors import ConfigError

__all__ = ["parameters_at", "placed_sites", "scales_input"]

# The last linear layers of attention and of feed-forward networks, as transformers calls them.
ATTENTION_OUTPUT = r"(?i:[^.]*att[^.]*)\.(o|o_proj|out_proj|c_proj|dense)$"
FEEDFORWARD_OUTPUT = r"\.(wo|down_proj|fc2|fc_out|dense_4h_to_h|w2)$|\bmlp\.c_proj$"
OUTPUTS = {
    "houlsby": f"{ATTENTION_OUTPUT}|{FEEDFORWARD_OUTPUT}",
    "pfeiffer": FEEDFORWARD_OUTPUT,
}


def placed_sites(model: PreTrainedModel, peft: Peft) -> dict[str, Site]:
    """The sites of `model` at which a new expert of this shape acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None.
    """
    if isinstance(peft, Lora) or peft.sites is not None:
        return find_sites(model, peft.sites)
    if isinstance(peft, Bottleneck):
        pattern = OUTPUTS[peft.placement]
    else:
        pattern = _endings(_known(IA3_MODULES, model))
    try:
        return find_sites(model, pattern)
    except ConfigError as error:
        raise ConfigError(
            f"Where to place it in {type(model).__name__} isn't known; name the layers with sites."
        ) from error


def scales_input(model: PreTrainedModel, ia3: IA3, sites: Iterable[str]) -> set[str]:
    """Those of `sites` whose input an (IA)³ of this shape scales; it scales the others' output.

    Raises ConfigError when `feedforward` is None and none are known for such a model, or is no
    regular expression.
    """
    pattern = ia3.feedforward
    if pattern is None:
        pattern = _endings(_known(IA3_FEEDFORWARD, model))
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ConfigError(
            f"feedforward is {pattern!r}, not a regular expression: {error}."
        ) from error
    return {site for site in sites if matches(site)}


def parameters_at(model: PreTrainedModel, peft: Peft) -> int:
    """The number of trained parameters of a new expert of this shape on `model`, without gates."""
    sites = placed_sites(model, peft)
    if isinstance(peft, Lora):
        return sum(peft.rank * (s.in_features + s.out_features) for s in sites.values())
    if isinstance(peft, IA3):
        inputs = scales_input(model, peft, sites)
        return sum(s.in_features if s.name in inputs else s.out_features for s in sites.values())
    return sum((2 * peft.size + 1) * s.out_features + peft.size for s in sites.values())


def _known(mapping: dict[str, list[str]], model: PreTrainedModel) -> list[str]:
    """PEFT's names of layers for models of this type. Raises ConfigError when it has none."""
    kind = model.config.model_type
    if kind not in mapping:
        raise ConfigError(
            f"Where an (IA)³ belongs in a model of type {kind} isn't known to PEFT; name the "
            f"layers with sites and feedforward."
        )
    return mapping[kind]


def _endings(names: list[str]) -> str:
    """A pattern for sites that end in one of `names`; for no site when there are none."""
    return rf"(^|\.)({'|'.join(map(re.escape, names))})$" if names else r"(?!)"
