"""Adapters of other types that update linear layers, approximated by a LoRA.

LoHa, LoKr and others add a matrix to the base weight. Its truncated singular value decomposition
(PEFT's convert_to_lora) is a LoRA; the share that the truncation loses is reported.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..base import load_base
from ..errors import ExpertError
from ..files import (
    BY_PATTERN,
    LISTS_OF_NAMES,
    ByName,
    check_config,
    first_line,
    matching,
    shortened,
    value_at,
)
from ..sites import find_sites
from .lora import LoraFactors
from .peft_files import ADAPTER, ADAPTER_CONFIG, PEFT_FILES, PEFT_PREFIX, read_config

ALL_LINEAR = "all-linear"  # a word of PEFT's, no pattern
SIZES = ("r", "n_frequency", "block_size", "gralora_k")  # sizes of the tensors that PEFT makes


def convert(
    folder: Path, base: str, allow_loss: float, *, revision: str | None = None
) -> tuple[dict[str, LoraFactors], dict[str, float]]:
    """The adapter in `folder` as a LoRA that loses at most `allow_loss` of each update's energy.

    With it what is recorded: the share that is kept of all updates together, and at the worst site.
    Energy is the squared Frobenius norm. Ranks are as small as that allows, each site's own. The
    base's weights are loaded. Raises ExpertError when a tensor is missing or left over or PEFT
    can't convert the adapter.
    """
    config, tensors = read_config(folder), PEFT_FILES.read_weights(folder)
    kind = config["peft_type"]
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise ExpertError(f"{folder} replaces modules or biases of the base beside its {kind}.")
    check_config(config, str(folder / ADAPTER_CONFIG))
    _refuse_sizes(config, tensors, folder)
    model = load_base(base, dtype="float32", revision=revision).model
    sites = find_sites(model)
    options = _plain_options(config, model)
    with peft_errors(f"{folder} can't be converted from {kind} to LoRA"):
        adapted = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
        loaded = set_peft_model_state_dict(adapted, dict(tensors))
        missing = [name for name in loaded.missing_keys if adapted.base_model.prefix in name]
        for name in [*missing, *loaded.unexpected_keys]:
            raise ValueError(f"tensor {name} is {'missing' if name in missing else 'left over'}")
        updates = _energies(adapted)
        _, converted = convert_to_lora(adapted, rank=1.0 - allow_loss)
    factors, energies = {}, {}
    for site in updates:
        if site not in sites:
            raise ExpertError(
                f"{folder} adapts {site}, which is no linear layer inside the blocks of {base!r}."
            )
        A, B = (converted[f"{PEFT_PREFIX}{site}.lora_{side}.weight"] for side in "AB")
        factors[site] = LoraFactors(A, B, 1.0)
        energies[site] = float((B.double() @ A.double()).square().sum())
    shares = [energies[site] / updates[site] for site in updates if updates[site] > 0]
    total = sum(updates.values())
    kept = min(sum(energies.values()) / total, 1.0) if total else 1.0
    worst = min([*shares, 1.0])
    return factors, {"kept_of_update": round(kept, 6), "kept_at_worst_site": round(worst, 6)}


def _refuse_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    # PEFT allocates what the config names before it looks at tensors. Of a LoKr a greater rank
    # means a whole matrix.
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    named = [config.get(key) for key in SIZES]
    ranks = config.get("rank_pattern")
    named += ranks.values() if isinstance(ranks, Mapping) else ()
    for number in named if config["peft_type"] != "LOKR" else ():
        if isinstance(number, int | float) and number > most:
            raise ExpertError(
                f"{folder}: its config names a size of {shortened(number)}, but none of its "
                f"tensors has more than {most} rows or columns."
            )


def _plain_options(config: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])
    known = {field.name for field in fields if field.init} - {"peft_type", "auto_mapping"}
    return spelled_out({key: config[key] for key in config if key in known}, model)


def _energies(adapted: torch.nn.Module) -> dict[str, float]:
    energies = {}
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if isinstance(layer, BaseTunerLayer) and hasattr(layer, "get_delta_weight"):
                update = layer.get_delta_weight(ADAPTER)
                energies[name.removeprefix(PEFT_PREFIX)] = float(update.double().square().sum())
    return energies


def spelled_out(options: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """`options` of a PEFT config, checked already, with layers' names in place of patterns.

    Raises ExpertError when a pattern matches nothing, or PEFT would ignore an option beside it.
    """
    names = [name for name, _ in model.named_modules()]
    plain = dict(options)
    for key, value in options.items():
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            values = {name: value_at(value, name) for name in names}
            plain[key] = ByName({name: each for name, each in values.items() if each is not None})
        elif key in LISTS_OF_NAMES and isinstance(value, str) and value.lower() != ALL_LINEAR:
            # Matched here, without backtracking: a stranger's pattern could take PEFT hours.
            plain[key] = matching(value, names)
            if key == "target_modules" and not plain[key]:
                raise ExpertError(f"Its target_modules {shortened(value)} matches no layer.")
            if key == "target_modules" and options.get("layers_to_transform") is not None:
                raise ExpertError("layers_to_transform can't be used with a pattern of layers.")
    targets = plain.get("target_modules")
    if isinstance(options.get("feedforward_modules"), str) and isinstance(targets, list):
        # PEFT wants the one within the other.
        endings = tuple(f".{each}" for each in targets)
        inside = [name for name in names if f".{name}".endswith(endings)]
        plain["target_modules"] = sorted(inside)
        plain["feedforward_modules"] = [n for n in plain["feedforward_modules"] if n in inside]
    return plain


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """What PEFT raises inside becomes an ExpertError that begins with `what`."""
    try:
        with warnings.catch_warnings():
            # What PEFT warns of (fan_in_fan_out, tied layers) shows in the tensors, which are
            # compared.
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # odd values in a config make it raise anything
        raise ExpertError(f"{what}: {first_line(error)}.") from error
