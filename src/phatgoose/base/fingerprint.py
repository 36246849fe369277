"""Recognise a base model by its weights, whatever it is called."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import WrongBaseError
from ..files.strict import shortened
from .sites import parameters_of

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


STEP = r"\w[\w+-]*(\.[\w+-]+)*"
# A branch, tag or commit. huggingface_hub makes a path of it, so none may lead anywhere else.
REVISION = re.compile(rf"{STEP}(/{STEP})*", re.ASCII)


@dataclass(frozen=True)
class BaseReference:
    """Which base model something belongs to; `fingerprint` None means it was never recorded.

    Raises ValueError for a revision that can be none.
    """

    id: str
    revision: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.revision, str) and not REVISION.fullmatch(self.revision):
            raise ValueError(
                f"revision is {shortened(self.revision)}, which is no branch, tag or commit"
            )


def check_base(wanted: BaseReference, found: BaseReference, owner: str = "the experts") -> None:
    """Raise WrongBaseError unless `found` is `wanted`, the base of `owner`; warn if unrecorded."""
    if wanted.fingerprint is None:
        warnings.warn(
            f"No fingerprint is recorded of the base of {owner}; taking {found.id!r} on trust. "
            f"'phatgoose import --fingerprint' records one.",
            stacklevel=4,
        )
    elif wanted.fingerprint != found.fingerprint:
        raise WrongBaseError(
            f"The base of {owner} is {wanted.id!r} with fingerprint {wanted.fingerprint[:19]}…, "
            f"but {found.id!r} has fingerprint {str(found.fingerprint)[:19]}…."
        )


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """Equal fingerprints, or equal names where one of them has none."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.id == other.id


def surely_differs(model: PreTrainedModel, known: BaseReference) -> bool:
    """True when `model` hasn't the recorded weights; False where that is unknown."""
    # float16 rounds otherwise than the fingerprint's bfloat16.
    if not known.fingerprint or model.dtype == torch.float16 or quantisation(model):
        return False
    return fingerprint(model) != known.fingerprint


def fingerprint(model: PreTrainedModel) -> str:
    """A hash ("sha256:…") over architecture fields and sampled weights of `model`.

    The same for every name, parameter naming (transformers changes it) and loading in float32 or
    bfloat16; quantised models have others. Raises BaseModelError for a model without weights.
    """
    return _fingerprint(model, (parameter for _, parameter in parameters_of(model)))


def fingerprint_of_files(skeleton: PreTrainedModel, weights: Mapping[str, Tensor]) -> str | None:
    """The fingerprint of the model that transformers would load of `weights`, none of it loaded.

    `skeleton` is the model without numbers (`loading.load_skeleton`), `weights` the tensors of its
    files by name. None where a parameter isn't there under its own name and in its own shape:
    quantised files, and those that transformers takes apart or joins as it loads them.
    """
    found = []
    for name, parameter in skeleton.named_parameters():
        tensor = tensor_named(skeleton, name, weights)
        if tensor is not None and tensor.shape == parameter.shape and tensor.is_floating_point():
            found.append(nn.Parameter(tensor, requires_grad=False))
        elif name not in skeleton.all_tied_weights_keys:  # a tied one comes under its other name
            return None
    return _fingerprint(skeleton, found)


def tensor_named(
    skeleton: PreTrainedModel, name: str, weights: Mapping[str, Tensor]
) -> Tensor | None:
    """The tensor of a parameter in a model's files, which may leave out the outermost module."""
    if name in skeleton.all_tied_weights_keys:
        return None
    inner = name.removeprefix(f"{skeleton.base_model_prefix}.")
    return weights.get(name, weights.get(inner))


def _fingerprint(model: PreTrainedModel, parameters: Iterable[Tensor]) -> str:
    fields = {key: getattr(model.config, key, None) for key in CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    # Sorted: names and order of parameters change between transformers' releases.
    for sample in sorted(map(_sample, parameters)):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _sample(parameter: Tensor) -> bytes:
    if kind := _quantised_type(parameter):
        return hashlib.sha256(f"{tuple(parameter.shape)} {kind}".encode()).digest()
    flat = parameter.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    # Rounded first, so that loading in float32 and in bfloat16 give the same bytes.
    chosen: Tensor = flat[index].to("cpu", torch.bfloat16)
    content = chosen.contiguous().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + content).digest()


def quantisation(model: PreTrainedModel) -> str | None:
    """The types of quantised weights, such as "Int8Tensor" (torchao); None when there are none."""
    kinds = {_quantised_type(parameter) for parameter in model.parameters()} - {None}
    return ", ".join(sorted(map(str, kinds))) or None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number_format(model: PreTrainedModel) -> str:
    """The dtype in which `model` computes, such as "torch.bfloat16", and its quantisation."""
    kinds = quantisation(model)
    return f"{model.dtype}, {kinds}" if kinds else str(model.dtype)


def _quantised_type(parameter: Tensor) -> str | None:
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return None if plain and parameter.is_floating_point() else type(parameter).__name__
