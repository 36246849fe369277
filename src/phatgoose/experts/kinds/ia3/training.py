"""New (IA)³ vectors, as PEFT makes them, where it puts them in models of the base's type.

By default these are keys, values, and the input of the feed-forward network's last linear layer
(Liu et al. 2022). Vectors stay float32, in use and on disk: bfloat16 has steps of 1/128 around 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import IA3Config
from peft.tuners.ia3 import Linear as PeftScaling
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES
from torch import Tensor
from transformers import PreTrainedModel

from ....base import Base
from ....config import IA3
from ....errors import ConfigError
from ....passes import active_share
from ....sites import Site
from ..kind import FreshExpert, NewModules, new_gate, openness
from ..peft import ADAPTER, peft_options, save_peft, under_peft
from .module import ScalingVector


class NewScalings(NewModules):
    dtype = torch.float32
    acts_from_ends = True

    def default_sites(self, model: PreTrainedModel, settings: IA3) -> str:
        return _endings(_known(IA3_MODULES, model))

    def count(self, model: PreTrainedModel, settings: IA3, sites: Iterable[Site]) -> int:
        sites = list(sites)
        inputs = scales_input(model, settings, [site.name for site in sites])
        return sum(s.in_features if s.name in inputs else s.out_features for s in sites)

    @contextmanager
    def create(
        self, base: Base, settings: IA3, sites: dict[str, Site], *, joint: bool
    ) -> Iterator[FreshExpert]:
        inputs = sorted(scales_input(base.model, settings, sites))
        config = IA3Config(feedforward_modules=inputs, **peft_options(base, sites))
        with under_peft(base, config) as model:
            layers = {site: base.model.get_submodule(site) for site in sites}
            for site, layer in layers.items():
                # The class alone changes: PEFT's state, hooks and names stay.
                layer.__class__ = _Scaling
                if joint:
                    layer.gate = new_gate(sites[site].in_features, layer.weight.device)
            # PEFT shortens long lists of targets, but then misses the feed-forward's among them;
            # and it writes sets in any order.
            model.peft_config[ADAPTER].target_modules = sorted(sites)
            model.peft_config[ADAPTER].feedforward_modules = inputs
            yield FreshExpert(model, layers, lambda folder: save_peft(model, base, folder))


def scales_input(model: PreTrainedModel, ia3: IA3, sites: Iterable[str]) -> set[str]:
    """Those of `sites` whose input is scaled; ConfigError where settings and PEFT don't tell."""
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


class _Scaling(PeftScaling):  # type: ignore[misc]  # peft is untyped
    """PEFT's (IA)³ layer whose distance from 1 passes the module's joint gate, if it has one.

    It is 1 at tokens that the expert doesn't act on.
    """

    def forward(self, u: Tensor) -> Tensor:
        gate, active = self._parameters.get("gate"), active_share(u)
        if gate is None and active is None:
            plain: Tensor = super().forward(u)
            return plain
        strength: Tensor | float = 1.0 if gate is None else openness(u, gate)
        module = ScalingVector(self.ia3_l[ADAPTER].flatten(), self.is_feedforward)
        return module.apply(self.base_layer, u, strength if active is None else strength * active)


def _known(mapping: dict[str, list[str]], model: PreTrainedModel) -> list[str]:
    kind = model.config.model_type
    if kind not in mapping:
        raise ConfigError(
            f"Where an (IA)³ belongs in a model of type {kind} isn't known to PEFT; name the "
            f"layers with sites and feedforward."
        )
    return mapping[kind]


def _endings(names: list[str]) -> str:
    # (?!) matches nothing.
    return rf"(^|\.)({'|'.join(map(re.escape, names))})$" if names else r"(?!)"
