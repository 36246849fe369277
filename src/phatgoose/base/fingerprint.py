"""Recognise a base model by its weights, whatever it is called."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import WrongBaseError
from .offloading import parameters_of

__all__ = [
    "BaseReference",
    "check_base",
    "dtype_name",
    "fingerprint",
    "number_format",
    "quantisation",
    "same_base",
]

# Enough to distinguish two trainings of one architecture, few enough to hash in a second.
SAMPLES = 64
CONFIG_FIELDS = (
    "model_type",
    "is_encoder_decoder",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class BaseReference:
    """Which base model something belongs to; `fingerprint` None means it was never recorded."""

    id: str
    revision: str | None = None
    fingerprint: str | None = None


def check_base(wanted: BaseReference, found: BaseReference, owner: str = "the experts") -> None:
    """Raise WrongBaseError unless `found` has the fingerprint of `wanted`, the base of `owner`.

    Without a recorded fingerprint it warns and takes `found` on trust. `owner` is for messages.
    """
    if wanted.fingerprint is None:
        warnings.warn(
            f"No fingerprint is recorded of the base of {owner}; taking {found.id!r} on trust.",
            stacklevel=4,
        )
    elif wanted.fingerprint != found.fingerprint:
        raise WrongBaseError(
            f"The base of {owner} is {wanted.id!r} with fingerprint {wanted.fingerprint[:19]}…, "
            f"but {found.id!r} has fingerprint {str(found.fingerprint)[:19]}…."
        )


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """True for the same fingerprint where both record one, otherwise for the same id."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.id == other.id


def fingerprint(model: PreTrainedModel) -> str:
    """A hash ("sha256:…") over architecture fields and sampled weights of `model`.

    It does not depend on the model's name, on parameter names (they change between transformers
    releases) or on float32 or bfloat16 loading (samples are rounded to bfloat16 first). Of a
    quantised weight only shape and type count, so a quantised model has another fingerprint than
    the model it was made from. Raises BaseModelError for a model without weights.
    """
    fields = {key: getattr(model.config, key, None) for key in CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for sample in sorted(_sample(parameter) for parameter in parameters_of(model)):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _sample(parameter: Tensor) -> bytes:
    """A hash of the shape of `parameter` and of evenly spaced elements."""
    if kind := _quantised_type(parameter):
        return hashlib.sha256(f"{tuple(parameter.shape)} {kind}".encode()).digest()
    flat = parameter.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    chosen: Tensor = flat[index].to("cpu", torch.bfloat16)
    content = chosen.contiguous().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + content).digest()


def quantisation(model: PreTrainedModel) -> str | None:
    """The types of the quantised weights of `model`, None when all are plain floating point.

    For example "Int8Tensor" (torchao) or "Params4bit" (bitsandbytes).
    """
    kinds = {_quantised_type(parameter) for parameter in model.parameters()} - {None}
    return ", ".join(sorted(map(str, kinds))) or None


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as settings name it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def number_format(model: PreTrainedModel) -> str:
    """The dtype in which `model` computes, such as "torch.bfloat16", and its quantisation."""
    kinds = quantisation(model)
    return f"{model.dtype}, {kinds}" if kinds else str(model.dtype)


def _quantised_type(parameter: Tensor) -> str | None:
    """The type of a quantised weight, None for plain floating point numbers."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return None if plain and parameter.is_floating_point() else type(parameter).__name__
