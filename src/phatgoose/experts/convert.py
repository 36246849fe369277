"""Adapters of other types that update linear layers, approximated by a LoRA.

LoHa, LoKr and others add a matrix to the base weight. Its truncated singular value decomposition
(PEFT's convert_to_lora) is a LoRA; the share that the truncation loses is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..base import load_base
from ..errors import ExpertError
from ..files import check_config, shortened
from ..sites import find_sites
from .lora import LoraFactors
from .peft_files import ADAPTER, ADAPTER_CONFIG, PEFT_FILES, PEFT_PREFIX, read_config
from .skeleton import peft_errors, spelled_out

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
