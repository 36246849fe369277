"""Adapters of others made experts: PEFT's LoRA or (IA)³, from a folder or the Hub, or refused.

PEFT itself says, on a model without weights, where the adapter acts, at which rank and scale
(`skeletons`). Its tensors must then be exactly the factors wanted there. An adapter that reads the
same without PEFT's help is copied byte for byte; one whose tensors had to be renamed or converted
is written anew, with every site, rank and scale spelled out. So is one that trained biases of the
base: what it added to them becomes biases of its own.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor

from ...base.fingerprint import BaseReference
from ...base.loading import load_base, load_skeleton
from ...base.sites import find_sites
from ...errors import ExpertError
from ...files.quoting import shortened
from ..adapter import check_fit, is_bottleneck, named_base, read_modules
from ..expert import Expert, check_name
from ..hub import HubReference, fetch, reference_of
from ..kinds.modules import LoraFactors, ScalingVector, SiteModule
from ..kinds.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    IA3_ENDING,
    LORA_ENDINGS,
    PEFT_PREFIX,
    read_adapter_config,
    read_config,
    read_weights,
)
from .peft_skeleton import Target, resolve
from .refusals import CONVERTIBLE, tensor_refusal
from .to_lora import Conversion, convert

__all__ = ["import_adapter", "resolved_modules"]

PICKLED = "adapter_model.bin"
CALLED = dict(zip((*LORA_ENDINGS, IA3_ENDING), ("A", "B", "a bias of B", "a vector"), strict=True))
BASE_LAYER = ".base_layer."  # how PEFT calls the base's own layer inside its own


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    name: str | None = None,
    allow_loss: float | None = None,
    fingerprint: bool = False,
) -> Expert:
    """The PEFT or bottleneck adapter at `source` as an expert without gates, written to `out`.

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
    config = _config_of(folder)
    lossy = allow_loss is not None and config.get("peft_type") in CONVERTIBLE
    if not lossy:
        named_base(folder)  # what can't be routed on any base is refused first
    revision = None if base else _revision_of(config)
    base = base or _base_of(config, from_hub=reference is not None)
    place = str(reference or folder.resolve().name)  # an expert may be published
    record: dict[str, Any] = {"imported_from": place}
    with tempfile.TemporaryDirectory() as work:
        if lossy and allow_loss is not None:
            conversion = convert(folder, base, allow_loss, revision=revision)
            record |= _loss_record(str(config["peft_type"]), conversion)
            adapter = write_adapter(Path(work), conversion.factors, config)
        else:
            modules, untouched = resolved_modules(folder, base, revision)
            adapter = folder if untouched else write_adapter(Path(work), modules, config)
        found = BaseReference(base, revision)
        if fingerprint:
            found = load_base(base, revision=revision).reference
        expert = Expert.from_peft(
            adapter, {}, base=found, name=name or target.name, hyperparameters=record
        )
        return expert.save(target)


def resolved_modules(
    folder: Path, base: str, revision: str | None = None
) -> tuple[Mapping[str, SiteModule], bool]:
    """The modules by site of the adapter in `folder` on the base named `base`.

    With them True when the adapter can stay as it is: `read_modules` says the same without the
    base. The base's weights are read only where the adapter trained biases of it. Raises
    ExpertError when a tensor is missing, left over or of another shape than PEFT wants.
    """
    if is_bottleneck(folder):
        found = read_modules(folder)
        sites = find_sites(load_skeleton(base, revision=revision, offline=False))
        check_fit(folder.resolve().name, found, sites)
        return found, True
    config, tensors = read_adapter_config(folder), read_weights(folder)
    try:
        skeleton = resolve(base, config, revision)
        left = skeleton.rename(tensors)
        modules = {
            site: _module(site, target, left, folder) for site, target in skeleton.targets.items()
        }
        if config.get("bias", "none") != "none":
            modules = _with_biases(modules, left, base, revision)
        for name in sorted(left):
            raise tensor_refusal(name, folder, ADAPTER_WEIGHTS)
    except ExpertError as error:
        told = str(error).startswith(str(folder))
        raise error if told else ExpertError(f"{folder} can't be imported. {error}") from error
    try:
        return modules, _same(read_modules(folder), modules)
    except ExpertError:  # its tensors have older names; PEFT's answer above stands
        return modules, False


def write_adapter(
    folder: Path, modules: Mapping[str, SiteModule], config: Mapping[str, Any]
) -> Path:
    """`folder`, with `modules` as a PEFT LoRA or (IA)³ whose config spells every site out.

    What `config` says of task and base is kept.
    """
    kept = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out")
    loras = {site: m for site, m in modules.items() if isinstance(m, LoraFactors)}
    scalings = {site: m for site, m in modules.items() if isinstance(m, ScalingVector)}
    content = {
        **{key: config[key] for key in kept if config.get(key) is not None},
        **(_lora_config(loras) if loras else _ia3_config(scalings)),
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    tensors = _lora_tensors(loras) if loras else _ia3_tensors(scalings)
    save_file({PEFT_PREFIX + name: t for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _lora_config(loras: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """What a config says of these LoRAs' ranks, scales and biases."""
    ranks = {site: lora.A.shape[0] for site, lora in loras.items()}
    alphas = {site: lora.scale * ranks[site] for site, lora in loras.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "bias": "none",
        "lora_bias": any(lora.bias is not None for lora in loras.values()),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {site: own for site, own in ranks.items() if own != rank},
        "alpha_pattern": {site: own for site, own in alphas.items() if own != alpha},
    }


def _lora_tensors(loras: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Their tensors; with biases everywhere, as PEFT wants it, where there are any."""
    tensors = {}
    has_biases = any(lora.bias is not None for lora in loras.values())
    for site, lora in loras.items():
        bias = lora.B.new_zeros(lora.B.shape[0]) if lora.bias is None else lora.bias
        parts = (lora.A, lora.B, bias) if has_biases else (lora.A, lora.B)
        for ending, part in zip(LORA_ENDINGS, parts, strict=False):
            tensors[site + ending] = part.contiguous()
    return tensors


def _ia3_config(scalings: Mapping[str, ScalingVector]) -> dict[str, Any]:
    inputs = sorted(site for site, scaling in scalings.items() if scaling.on_input)
    return {"peft_type": "IA3", "feedforward_modules": inputs}


def _ia3_tensors(scalings: Mapping[str, ScalingVector]) -> dict[str, Tensor]:
    return {
        site + IA3_ENDING: scaling.vector.view(
            (1, -1) if scaling.on_input else (-1, 1)
        ).contiguous()
        for site, scaling in scalings.items()
    }


def _config_of(folder: Path) -> dict[str, Any]:
    """The adapter's configuration; of a bottleneck adapter what PEFT's would say of the base."""
    if is_bottleneck(folder):
        return {"base_model_name_or_path": named_base(folder)}
    return read_config(folder)


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


def _module(site: str, target: Target, left: dict[str, Tensor], folder: Path) -> SiteModule:
    """What the adapter does at `site`; its tensors are taken out of `left`."""
    parts = [left.pop(f"{PEFT_PREFIX}{site}{ending}", None) for ending in target.shapes]
    got = [None if part is None else tuple(part.shape) for part in parts]
    present = [part for part in parts if part is not None]
    if got != list(target.shapes.values()):
        first, *more = (f"{CALLED[key]} of {{}}{shape}" for key, shape in target.shapes.items())
        wanted = " and ".join([first.format("shape "), *(each.format("") for each in more)])
        raise ExpertError(
            f"{folder}, site {site}: its config wants {wanted}, got {' and '.join(map(str, got))}."
        )
    if target.scale is None:
        return ScalingVector(present[0].flatten(), on_input=present[0].shape[0] == 1)
    return LoraFactors(present[0], present[1], target.scale, present[2] if present[2:] else None)


def _with_biases(
    modules: Mapping[str, SiteModule],
    left: dict[str, Tensor],
    base: str,
    revision: str | None,
) -> dict[str, SiteModule]:
    """`modules` with what the adapter added to the base's biases at its sites as biases of theirs.

    The biases are taken out of `left`, but for those that were trained elsewhere: nothing is routed
    there.
    """
    trained = {name: left[name] for name in left if name.endswith(".bias")}
    if not trained:
        return dict(modules)
    original = load_base(base, revision=revision, dtype="float32").model.state_dict()
    found = dict(modules)
    for name, bias in trained.items():
        plain = name.removeprefix(PEFT_PREFIX).replace(BASE_LAYER, ".")
        site, lora = plain.removesuffix(".bias"), None
        if plain not in original or original[plain].shape != bias.shape:
            continue
        added, lora = bias.float() - original[plain], modules.get(site)
        if isinstance(lora, LoraFactors) and lora.scale and BASE_LAYER in name:
            own = 0 if lora.bias is None else lora.bias
            found[site] = replace(lora, bias=own + added / lora.scale)
        elif added.any():
            continue
        del left[name]
    return found


def _same(one: Mapping[str, SiteModule], other: Mapping[str, SiteModule]) -> bool:
    return one.keys() == other.keys() and all(
        _equal(module, other[site]) for site, module in one.items()
    )


def _equal(one: SiteModule, other: SiteModule) -> bool:
    """True for modules of the same numbers; scales may differ in rounding."""
    if isinstance(one, LoraFactors) and isinstance(other, LoraFactors):
        pairs = ((one.A, other.A), (one.B, other.B), (one.bias, other.bias))
        return math.isclose(one.scale, other.scale) and all(
            x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs
        )
    if isinstance(one, ScalingVector) and isinstance(other, ScalingVector):
        return one.on_input == other.on_input and torch.equal(one.vector, other.vector)
    return False


def _loss_record(kind: str, conversion: Conversion) -> dict[str, Any]:
    """What an expert records of an approximation."""
    return {
        "converted_from": kind,
        "kept_of_update": round(conversion.kept, 6),
        "kept_at_worst_site": round(conversion.least, 6),
    }
