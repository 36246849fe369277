"""Adapters of others made experts: any PEFT LoRA, from a folder or the Hub, or refused by name.

PEFT itself says, on a model without weights, where the adapter acts, at which rank and scale
(`skeletons`). Its tensors must then be exactly the factors wanted there. An adapter that reads the
same without PEFT's help is copied byte for byte; one whose tensors had to be renamed or converted
is written anew, with every site, rank and scale spelled out.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor

from .adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    LoraFactors,
    read_adapter_config,
    read_config,
    read_lora,
    read_weights,
)
from .bases import BaseReference, load_base
from .conversion import Conversion, convert
from .errors import ExpertError
from .expert import Expert, check_name
from .files import shortened
from .hub import HubReference, fetch, reference_of
from .refusals import CONVERTIBLE, tensor_refusal
from .skeletons import Skeleton, resolve

__all__ = ["import_adapter", "resolved_factors"]

PICKLED = "adapter_model.bin"


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    name: str | None = None,
    allow_loss: float | None = None,
    fingerprint: bool = False,
) -> Expert:
    """The PEFT adapter at `source` as an expert without gates, written to `out`.

    `source` is a folder, or a Hub id with `@revision` where needed (`hub:owner/name/folder@…`).
    `base` names the base model to hold it against and to record; None takes the one that the
    adapter names, at the revision that it names. Only the base's config is read, unless
    `fingerprint` asks to record that of its weights: whoever asks vouches that the adapter was
    trained on them. `allow_loss` lets kinds that are no LoRA be approximated by one that keeps all
    but that share of each update's squared norm; what was lost is recorded among the
    hyper-parameters.

    Raises ExpertError naming what can't be routed and why, or when `out` exists; BaseModelError
    when the base can't be found.
    """
    target = Path(out)
    if target.exists():
        raise ExpertError(f"{target} exists already; choose another place.")
    check_name(name or target.name)
    folder, reference = _find(source)
    config = read_config(folder)
    lossy = allow_loss is not None and config.get("peft_type") in CONVERTIBLE
    if not lossy:
        read_adapter_config(folder)  # what can't be routed on any base is refused first
    revision = None if base else _revision_of(config)
    base = base or _base_of(config, from_hub=reference is not None)
    record: dict[str, Any] = {"imported_from": str(reference or folder.resolve())}
    with tempfile.TemporaryDirectory() as work:
        if lossy and allow_loss is not None:
            conversion = convert(folder, base, allow_loss, revision=revision)
            record |= _loss_record(str(config["peft_type"]), conversion)
            adapter = write_adapter(Path(work), conversion.factors, config)
        else:
            factors, untouched = resolved_factors(folder, base, revision)
            adapter = folder if untouched else write_adapter(Path(work), factors, config)
        found = BaseReference(base, revision)
        if fingerprint:
            found = load_base(base, revision=revision).reference
        expert = Expert.from_peft(
            adapter, {}, base=found, name=name or target.name, hyperparameters=record
        )
        return expert.save(target)


def resolved_factors(
    folder: Path, base: str, revision: str | None = None
) -> tuple[dict[str, LoraFactors], bool]:
    """The factors by site of the LoRA adapter in `folder` on the base named `base`.

    With them True when the adapter can stay as it is: `read_lora` says the same without the base.
    Raises ExpertError when a tensor is missing, left over or of another shape than PEFT wants.
    """
    config, tensors = read_adapter_config(folder), read_weights(folder)
    try:
        skeleton = resolve(base, config, revision)
        factors = _factors(tensors, skeleton, folder)
    except ExpertError as error:
        told = str(error).startswith(str(folder))
        raise error if told else ExpertError(f"{folder} can't be imported. {error}") from error
    try:
        return factors, _same(read_lora(folder), factors)
    except ExpertError:  # its tensors have older names; PEFT's answer above stands
        return factors, False


def write_adapter(
    folder: Path, factors: Mapping[str, LoraFactors], config: Mapping[str, Any]
) -> Path:
    """`folder`, with `factors` as a PEFT LoRA whose config spells every site out.

    What `config` says of task and base is kept.
    """
    ranks = {site: lora.A.shape[0] for site, lora in factors.items()}
    alphas = {site: lora.scale * ranks[site] for site, lora in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kept = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out")
    content = {
        "peft_type": "LORA",
        **{key: config[key] for key in kept if config.get(key) is not None},
        "bias": "none",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {site: own for site, own in ranks.items() if own != rank},
        "alpha_pattern": {site: own for site, own in alphas.items() if own != alpha},
        "target_modules": sorted(factors),
    }
    tensors = {
        f"{PEFT_PREFIX}{site}.lora_{side}.weight": getattr(lora, side).contiguous()
        for site, lora in factors.items()
        for side in "AB"
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _find(source: str | Path) -> tuple[Path, HubReference | None]:
    """The adapter's folder, and the pinned reference where it came from the Hub."""
    if isinstance(source, Path) or Path(source).is_dir():
        if not Path(source).is_dir():
            raise ExpertError(f"{source} is no folder.")
        return Path(source), None
    try:
        reference = HubReference.parse(source)
    except ExpertError as error:
        raise ExpertError(
            f"{source!r} is neither a folder nor a Hub id; wanted a folder of a PEFT adapter, or "
            f"OWNER/NAME with @REVISION where needed."
        ) from error
    folder = fetch(reference)
    pinned = reference_of(folder) or reference
    if not (folder / ADAPTER_WEIGHTS).is_file() and _has_pickle(pinned):
        raise ExpertError(
            f"{pinned} holds pickled weights ({PICKLED}), which are never read: they could run "
            f"code. Ask for the adapter as safetensors."
        )
    return folder, pinned


def _has_pickle(reference: HubReference) -> bool:
    """True when the Hub has the adapter's weights as a pickle; False too when it can't be asked."""
    file = f"{reference.folder}/{PICKLED}".lstrip("/")
    try:
        return HfApi().file_exists(reference.repo, file, revision=reference.revision)
    except Exception:
        return False


def _base_of(config: Mapping[str, Any], *, from_hub: bool) -> str:
    """The base that the adapter names. Raises ExpertError when it names none that can be meant."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ExpertError("The adapter doesn't name its base model; name it with --base.")
    if from_hub and (os.path.isabs(named) or named.startswith(".") or Path(named).exists()):
        raise ExpertError(
            f"The adapter names its base by a path of its author's machine, {shortened(named)}; "
            f"name the base with --base."
        )
    return named


def _revision_of(config: Mapping[str, Any]) -> str | None:
    """The base's revision that the adapter was trained on, None where it names none."""
    named = config.get("revision")
    if named is not None and not (isinstance(named, str) and named.isprintable()):
        raise ExpertError(f"The adapter names revision {shortened(named)} of its base.")
    return named or None


def _factors(
    tensors: Mapping[str, Tensor], skeleton: Skeleton, folder: Path
) -> dict[str, LoraFactors]:
    """`tensors` as the factors of every target of `skeleton`, none missing and none left over."""
    left = skeleton.rename(tensors)
    factors = {}
    for site, target in skeleton.targets.items():
        A, B = (left.pop(f"{PEFT_PREFIX}{site}.lora_{side}.weight", None) for side in "AB")
        wanted = ((target.rank, target.in_features), (target.out_features, target.rank))
        got = tuple(None if side is None else tuple(side.shape) for side in (A, B))
        if A is None or B is None or got != wanted:
            raise ExpertError(
                f"{folder}, site {site}: its config wants A of shape {wanted[0]} and B of "
                f"{wanted[1]}, got {got[0]} and {got[1]}."
            )
        factors[site] = LoraFactors(A, B, target.scale)
    for name in sorted(left):
        raise tensor_refusal(name, folder, ADAPTER_WEIGHTS)
    return factors


def _same(one: Mapping[str, LoraFactors], other: Mapping[str, LoraFactors]) -> bool:
    return one.keys() == other.keys() and all(
        math.isclose(lora.scale, other[site].scale)
        and torch.equal(lora.A, other[site].A)
        and torch.equal(lora.B, other[site].B)
        for site, lora in one.items()
    )


def _loss_record(kind: str, conversion: Conversion) -> dict[str, Any]:
    """What an expert records of an approximation."""
    return {
        "converted_from": kind,
        "kept_of_update": round(conversion.kept, 6),
        "kept_at_worst_site": round(conversion.least, 6),
    }
