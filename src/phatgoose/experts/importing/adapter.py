"""Experts made of other people's adapters, from a folder or the Hub; some adapters are refused.

PEFT itself says, on a model without weights, where an adapter acts, and at which rank and scale
(`peft_skeleton`). Its tensors must be exactly the ones that PEFT wants there. An adapter that reads
the same without PEFT's help is copied byte for byte. One whose tensors had to be renamed or
converted is written anew, with every site, rank and scale spelled out. So is one that trained
biases of the base: what it added to them becomes biases of its own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from ...base.fingerprint import BaseReference
from ...base.loading import is_hub_id, load_base, load_skeleton, recorded_id
from ...base.sites import find_sites
from ...errors import ConfigError, ExpertError
from ...files.atomic import require_free
from ...files.strict import shortened
from ..adapter import adapter_files, check_fit, named_base, read_modules
from ..expert import LAYOUT, Expert, check_name, named_revision
from ..hub import HubReference, fetch, reference_of
from ..kinds.ia3.module import IA3_ENDING, ScalingVector
from ..kinds.kind import SiteModule
from ..kinds.lora.module import LORA_ENDINGS, LoraFactors
from ..kinds.peft import (
    ADAPTER_WEIGHTS,
    CONVERTIBLE,
    INVOCATION,
    PEFT_FILES,
    PEFT_PREFIX,
    PICKLED_WEIGHTS,
    read_config,
    tensor_refusal,
)
from .peft_skeleton import Target, resolve
from .to_lora import convert

WANTED = dict(  # for messages, by the end of a tensor's name
    zip(
        (*LORA_ENDINGS, IA3_ENDING),
        ("A of shape", "B of", "a bias of B of", "a vector of shape"),
        strict=True,
    )
)
BASE_LAYER = ".base_layer."  # PEFT's name for the base's layer inside its own


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
    `base` is the base model to check the adapter against and to record; None takes the one that the
    adapter names, at the revision that it names. Only the base's config is read, unless
    `fingerprint` asks to record the fingerprint of its weights: ask only if the adapter was trained
    on them. `allow_loss` lets an adapter of another type be approximated by a LoRA that loses at
    most that share of each update's squared norm; the hyper-parameters record the loss.

    Raises ExpertError naming what can't be routed and why, when `source` is an expert, or when
    `out` exists; ConfigError unless 0 <= allow_loss < 1; BaseModelError when the base can't be
    found.
    """
    if allow_loss is not None and not 0 <= allow_loss < 1:
        raise ConfigError(f"allow_loss is {allow_loss!r}, but must be from 0 to below 1.")
    target = Path(out)
    require_free(target, ExpertError)
    check_name(name or target.name)
    folder, reference = _find(source)
    if (folder / LAYOUT.info).exists():
        remedy = "fetch it with 'phatgoose pull'" if reference else "use it as it is"
        raise ExpertError(
            f"{reference or folder} is an expert already ({LAYOUT.info}); {remedy}, since an "
            f"import would drop its gates and statistics."
        )
    config = _config_of(folder)
    lossy = allow_loss is not None and config.get("peft_type") in CONVERTIBLE
    if not lossy:
        named_base(folder)  # what can't be routed on any base is refused first
    revision = None if base else named_revision(config)
    base = base or require_named_base(
        config.get(PEFT_FILES.base_key), from_hub=reference is not None
    )
    place = str(reference or folder.resolve().name)  # an expert may be published
    record: dict[str, Any] = {"imported_from": place}
    with tempfile.TemporaryDirectory() as work:
        if lossy and allow_loss is not None:
            conversion = convert(folder, base, allow_loss, revision=revision)
            record |= {
                "converted_from": str(config["peft_type"]),
                "kept_of_update": round(conversion.kept, 6),
                "kept_at_worst_site": round(conversion.least, 6),
            }
            adapter = _write_adapter(Path(work), conversion.factors, config)
        else:
            _check_invocation(config, folder, base, revision)
            modules, untouched = resolved_modules(folder, base, revision)
            adapter = folder if untouched else _write_adapter(Path(work), modules, config)
        found = BaseReference(recorded_id(base), revision)
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

    With them True when the adapter's files can stay as they are, since `read_modules` reads the
    same modules from them without the base. The base's weights are read only where the adapter
    trained biases of it. Raises ExpertError when a tensor is missing, left over or of another shape
    than PEFT wants.
    """
    if adapter_files(folder) is not PEFT_FILES:
        found = read_modules(folder)
        sites = find_sites(load_skeleton(base, revision=revision, offline=False))
        check_fit(folder.resolve().name, found, sites)
        return found, True
    config, tensors = PEFT_FILES.read_config(folder), PEFT_FILES.read_weights(folder)
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
        if str(error).startswith(str(folder)):
            raise
        raise ExpertError(f"{folder} can't be imported. {error}") from error
    try:
        return modules, _same(read_modules(folder), modules)
    except ExpertError:  # its tensors have older names, which only PEFT can read
        return modules, False


def _check_invocation(
    config: Mapping[str, Any], folder: Path, base: str, revision: str | None
) -> None:
    if not config.get(INVOCATION):
        return
    if config.get("bias", "none") != "none":
        raise ExpertError(
            f"{folder} uses {INVOCATION} and trained biases of the base, which act on all tokens; "
            f"an expert acts either on all of them or from there on."
        )
    if load_skeleton(base, revision=revision, offline=False).config.is_encoder_decoder:
        raise ExpertError(
            f"{folder} uses {INVOCATION}, which is not supported on an encoder-decoder: prompts "
            f"have a stack of their own there, and PEFT adds nothing in it."
        )


def _write_adapter(
    folder: Path, modules: Mapping[str, SiteModule], config: Mapping[str, Any]
) -> Path:
    kept = ("task_type", PEFT_FILES.base_key, "revision", "fan_in_fan_out", INVOCATION)
    about = {key: config[key] for key in kept if config.get(key) is not None}
    made = next((type(module) for module in modules.values()), LoraFactors)
    return made.write(folder, modules, about)


def _config_of(folder: Path) -> dict[str, Any]:
    if adapter_files(folder) is not PEFT_FILES:
        return {PEFT_FILES.base_key: named_base(folder)}
    return read_config(folder)


def _find(source: str | Path) -> tuple[Path, HubReference | None]:
    if isinstance(source, Path) or Path(source).exists():
        if not Path(source).is_dir():
            raise ExpertError(f"{source} is no folder; wanted the folder of an adapter.")
        return Path(source), None
    try:
        reference = HubReference.parse(source)
    except ExpertError as error:
        raise ExpertError(
            f"{source!r} is neither a folder nor a Hub id; wanted a folder of a PEFT adapter, or "
            f"OWNER/NAME with @REVISION where needed."
        ) from error
    folder = fetch(reference, inner=())
    pinned = reference_of(folder) or reference
    if not (folder / ADAPTER_WEIGHTS).is_file() and _has_pickle(pinned):
        raise ExpertError(
            f"{pinned} holds pickled weights ({PICKLED_WEIGHTS}), which are never read: they could "
            f"run code. Ask for the adapter as safetensors."
        )
    return folder, pinned


def _has_pickle(reference: HubReference) -> bool:
    file = f"{reference.folder}/{PICKLED_WEIGHTS}".lstrip("/")
    try:
        return HfApi().file_exists(reference.repo, file, revision=reference.revision)
    except Exception:
        return False


def require_named_base(named: object, *, from_hub: bool) -> str:
    if not isinstance(named, str) or not named:
        raise ExpertError("The adapter doesn't name its base model; name it with --base.")
    if from_hub and not is_hub_id(named):
        raise ExpertError(
            f"The adapter names its base by a path of its author's machine, {shortened(named)}; "
            f"name the base with --base."
        )
    return named


def _module(site: str, target: Target, left: dict[str, Tensor], folder: Path) -> SiteModule:
    parts = [left.pop(f"{PEFT_PREFIX}{site}{ending}", None) for ending in target.shapes]
    got = [None if part is None else tuple(part.shape) for part in parts]
    present = [part for part in parts if part is not None]
    if got != list(target.shapes.values()):
        wanted = " and ".join(f"{WANTED[end]} {shape}" for end, shape in target.shapes.items())
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
    """`modules` with what the adapter added to the base's biases, taken out of `left`."""
    trained = {name: left[name] for name in left if name.endswith(".bias")}
    if not trained:
        return dict(modules)
    loaded = load_base(base, revision=revision, dtype="float32", device="cpu")
    original = loaded.model.state_dict()
    found = dict(modules)
    for name, bias in trained.items():
        plain = name.removeprefix(PEFT_PREFIX).replace(BASE_LAYER, ".")
        site = plain.removesuffix(".bias")
        if plain not in original or original[plain].shape != bias.shape:
            continue
        added, lora = bias.float() - original[plain], modules.get(site)
        # Divided by the scale, which multiplies a LoRA's bias too.
        if isinstance(lora, LoraFactors) and lora.scale and BASE_LAYER in name:
            own = 0 if lora.bias is None else lora.bias
            found[site] = replace(lora, bias=own + added / lora.scale)
        # A bias that was trained where nothing is routed stays in `left`, which is refused.
        elif added.any():
            continue
        del left[name]
    return found


def _same(one: Mapping[str, SiteModule], other: Mapping[str, SiteModule]) -> bool:
    return one.keys() == other.keys() and all(
        type(module) is type(other[site])
        and all(_alike(value, getattr(other[site], name)) for name, value in vars(module).items())
        for site, module in one.items()
    )


def _alike(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and torch.equal(one, other)  # type: ignore[arg-type]
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other)
    return one == other
