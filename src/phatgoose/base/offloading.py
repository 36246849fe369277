"""Weights that come when they are needed: what accelerate's hooks keep elsewhere between passes.

Under a `device_map`, `cpu_offload` or `disk_offload` a layer's parameters lie on torch's meta
device, without values, until its own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import BaseModelError, RoutingError

__all__ = ["check_in_place", "execution_device", "input_device", "parameters_of"]

NOWHERE = (
    "The base model has no weights: they are on torch's meta device, and no hook of accelerate's "
    "brings them in layer by layer. Load it with weights."
)


def execution_device(layer: Any) -> torch.device:
    """Where `layer` computes: the device of its weight, or the one that this is brought to.

    Raises BaseModelError for a layer whose weight is nowhere.
    """
    if has_offloaded_params(layer):
        return torch.device(layer._hf_hook.execution_device)
    device: torch.device = layer.weight.device
    if device.type == "meta":
        raise BaseModelError(NOWHERE)
    return device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where `model` takes its inputs."""
    device = model.device
    return execution_device(model.get_input_embeddings()) if device.type == "meta" else device


def parameters_of(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters of `model`, each once, those that are kept elsewhere brought in one by one.

    Raises BaseModelError for one that is nowhere.
    """
    tied = model.all_tied_weights_keys
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield parameter
        elif name not in tied:  # whose other name has it, with or without values
            place, _, own = name.rpartition(".")
            module: Any = model.get_submodule(place)
            if not has_offloaded_params(module):  # a routed layer's are held for its base's layer
                module = getattr(module, "base", module)
            if not has_offloaded_params(module):
                raise BaseModelError(NOWHERE)
            with align_module_device(module):
                yield getattr(module, own)


def check_in_place(layers: Iterable[nn.Module]) -> None:
    """Raise RoutingError if hooks of accelerate's were put on routed `layers`."""
    if any(has_offloaded_params(layer) for layer in layers):
        raise RoutingError(
            "The routed model was offloaded by accelerate, so its experts can't be changed or "
            "taken out; take the hooks off first (accelerate.hooks.remove_hook_from_submodules)."
        )
