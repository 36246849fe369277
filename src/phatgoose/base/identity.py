"""What a base is, and which one: recognised by its weights, whatever its name."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Predicate
from torch import Tensor, nn

from ..errors import WrongBaseError
from ..files import shortened
from ..names import SMOLLM2, is_hub_id
from ..sites import FLOATS, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEP = r"\w[\w+-]*(\.[\w+-]+)*"
# A branch, tag or commit. huggingface_hub makes a path of it, so none may lead anywhere else.
REVISION = re.compile(rf"{STEP}(/{STEP})*", re.ASCII)

Text = Annotated[str, Predicate(str.isprintable)]


@dataclass(frozen=True)
class BaseReference:
    """Which base model something belongs to; `fingerprint` None means it was never recorded.

    Raises ValueError for a revision that can be none.
    """

    id: Text
    revision: Text | None = None
    fingerprint: Text | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and not REVISION.fullmatch(str(self.revision)):
            raise ValueError(
                f"revision is {shortened(self.revision)}, which is no branch, tag or commit"
            )


@dataclass(frozen=True)
class Base:
    """A loaded base model, and what identifies it.

    `id` is what the user named (a Hub id, a folder by its absolute path, or "smollm2"); `revision`
    is the requested Hub commit, None for the default one; `fingerprint` identifies the weights
    whatever their name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None
    fingerprint: str

    @property
    def reference(self) -> BaseReference:
        return BaseReference(self.id, self.revision, self.fingerprint)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)


def twin(base: Base) -> Base:
    """`base` with new modules over the same tensors: routing it leaves `base` unchanged."""
    tensors = (*base.model.parameters(), *base.model.buffers())
    # deepcopy takes what its memo has for a tensor's id: modules are copied, weights aren't.
    shared = {id(tensor): tensor for tensor in tensors}
    return replace(base, model=copy.deepcopy(base.model, shared))


def recorded_id(name: str | Path) -> str:
    """What is recorded of a base called `name`: of a folder here its absolute path, else itself."""
    is_folder = str(name) != SMOLLM2 and os.path.isdir(name)
    return os.path.abspath(name) if is_folder else str(name)


def published(name: str, revision: str | None = None) -> BaseReference | None:
    """By what others load the base `name`, without a fingerprint; None where that isn't known.

    A Hub id, or "smollm2".
    """
    return BaseReference(name, revision) if is_hub_id(name) and recorded_id(name) == name else None


def check_base(recorded: BaseReference, loaded: BaseReference, owner: str = "the experts") -> None:
    """Raise WrongBaseError unless `loaded` is `recorded`, the base of `owner`.

    Warns where no fingerprint is recorded.
    """
    if recorded.fingerprint is None:
        # From here, not from its caller: so it is said once, however often a base is resolved.
        warnings.warn(
            f"No fingerprint is recorded of the base of {owner}; taking {loaded.id!r} on trust. "
            f"'phatgoose import --fingerprint' records one.",
            stacklevel=1,
        )
    elif recorded.fingerprint != loaded.fingerprint:
        raise WrongBaseError(
            f"The base of {owner} is {recorded.id!r} with fingerprint "
            f"{recorded.fingerprint[:19]}…, but {loaded.id!r} has fingerprint "
            f"{str(loaded.fingerprint)[:19]}…."
        )


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """Equal fingerprints, or equal names where one of them has none."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.id == other.id


def surely_differs(model: PreTrainedModel, recorded: BaseReference) -> bool:
    """True when `model` hasn't the recorded weights; False where that is unknown."""
    # float16 rounds otherwise than the fingerprint's bfloat16.
    if not recorded.fingerprint or model.dtype == torch.float16 or quantisation(model):
        return False
    return fingerprint(model) != recorded.fingerprint


# The fingerprint: enough to distinguish two trainings of one architecture, and hashed in a second.

SAMPLES = 64  # numbers of a parameter
CONFIG_FIELDS = (
    "model_type",
    "is_encoder_decoder",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def fingerprint(model: nn.Module, parameters: Iterable[Tensor] | None = None) -> str:
    """A hash ("sha256:…") over architecture fields and sampled weights of `model`.

    `parameters` are read in place of its own. The same for every name, parameter naming
    (transformers changes it) and loading in float32 or bfloat16; quantised models have others.
    """
    fields = {key: getattr(model.config, key, None) for key in CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    # Sorted: names and order of parameters change between transformers' releases.
    for sample in sorted(map(_sample, parameters or model.parameters())):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of_files(skeleton: PreTrainedModel, weights: Tensors) -> str | None:
    """The fingerprint of the model that transformers would load of `weights`, none of it loaded.

    `skeleton` is the model without numbers (`load_skeleton`), `weights` the tensors of its
    files by name. None where a parameter isn't there under its own name and in its own shape:
    quantised files, and those that transformers takes apart or joins as it loads them.
    """
    parameters = []
    for name, parameter in skeleton.named_parameters():
        tensor = tensor_named(skeleton, name, weights)
        if tensor is not None and tensor.shape == parameter.shape and tensor.is_floating_point():
            parameters.append(nn.Parameter(tensor, requires_grad=False))
        elif name not in skeleton.all_tied_weights_keys:  # a tied one comes under its other name
            return None
    return fingerprint(skeleton, parameters)


def tensor_named(skeleton: PreTrainedModel, name: str, weights: Tensors) -> Tensor | None:
    """The tensor of a parameter in a model's files, which may leave out the outermost module."""
    if name in skeleton.all_tied_weights_keys:
        return None
    inner = name.removeprefix(f"{skeleton.base_model_prefix}.")
    return weights.get(name, weights.get(inner))


def _sample(parameter: Tensor) -> bytes:
    shape = tuple(parameter.shape)
    kind = _quantised_type(parameter)
    if kind:
        return hashlib.sha256(f"{shape} {kind}".encode()).digest()
    flat = parameter.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    # Rounded first, so that loading in float32 and in bfloat16 give the same bytes.
    sample: Tensor = flat[index].to("cpu", torch.bfloat16)
    content = sample.contiguous().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(shape).encode() + content).digest()


def quantisation(model: PreTrainedModel) -> str | None:
    """The types of quantised weights, such as "Int8Tensor" (torchao); None when there are none."""
    kinds = set(map(_quantised_type, model.parameters()))
    return ", ".join(sorted(filter(None, kinds))) or None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number_format(model: PreTrainedModel) -> str:
    """The dtype in which `model` computes, such as "torch.bfloat16", and its quantisation."""
    kinds = quantisation(model)
    return f"{model.dtype}, {kinds}" if kinds else str(model.dtype)


def _quantised_type(parameter: Tensor) -> str | None:
    is_plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return None if is_plain and parameter.dtype in FLOATS else type(parameter).__name__
