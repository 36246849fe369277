"""Weights that accelerate's hooks keep elsewhere between forward passes.

Under a `device_map`, `cpu_offload` or `disk_offload` a layer's parameters are on torch's meta
device, without values, except during its own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BaseModelError, RoutingError

NOWHERE = (
    "The base model has no weights: they are on torch's meta device, and no hook of accelerate "
    "loads them layer by layer. Load it with weights."
)


def execution_device(layer: Any) -> torch.device:
    """The device on which `layer` computes: that of its weight, or the one its hook loads it to.

    Raises BaseModelError for a layer whose weight has no values.
    """
    if has_offloaded_params(layer):
        return torch.device(layer._hf_hook.execution_device)
    device: torch.device = layer.weight.device
    if device.type == "meta":
        raise BaseModelError(NOWHERE)
    return device


def input_device(model: PreTrainedModel) -> torch.device:
    device = model.device
    return execution_device(model.get_input_embeddings()) if device.type == "meta" else device


def parameters_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `model` by name, each once; offloaded ones are loaded one by one.

    Raises BaseModelError for one without values.
    """
    tied = model.all_tied_weights_keys
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield name, parameter
        elif name not in tied:  # a tied one comes under its other name
            place, _, own = name.rpartition(".")
            module: Any = model.get_submodule(place)
            if not has_offloaded_params(module):  # a routed layer's hook is on its base layer
                module = getattr(module, "base", module)
            if not has_offloaded_params(module):
                raise BaseModelError(NOWHERE)
            with align_module_device(module):
                yield name, getattr(module, own)


def check_in_place(layers: Iterable[nn.Module]) -> None:
    """Raise RoutingError if any of the routed `layers` has hooks of accelerate."""
    if any(has_offloaded_params(layer) for layer in layers):
        raise RoutingError(
            "The routed model was offloaded by accelerate, so its experts can't be changed or "
            "removed; remove the hooks first (accelerate.hooks.remove_hook_from_submodules)."
        )
