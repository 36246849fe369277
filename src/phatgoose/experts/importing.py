"""Experts made of other people's adapters, from a folder or the Hub; some adapters are refused.

PEFT itself says, on a model without weights, where an adapter acts, and at which rank and scale
(`peft_skeleton`). Its tensors must be exactly the ones that PEFT wants there. An adapter that reads
the same without PEFT's help is copied byte for byte. One whose tensors had to be renamed or
converted is written again, with every site, rank and scale spelled out. So is one that trained
biases of the base: what it added to them becomes biases of its own.
"""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from ..base import (
    BaseReference,
    fingerprint_here,
    is_hub_id,
    load_base,
    load_skeleton,
    published,
    recorded_id,
)
from ..errors import ConfigError, ExpertError, PhatgooseError
from ..files import one_line, read_json_object, require_free, sha256_of, shortened
from ..sites import find_sites, linear_shape
from .convert import convert
from .dora import DoraFactors
from .expert import (
    LAYOUT,
    Expert,
    adapter_files,
    check_name,
    formats,
    kind_of,
    named_base,
    named_revision,
    read_modules,
)
from .hub import HubReference, fetch, reference_of
from .ia3 import IA3_ENDING, ScalingVector
from .kind import AdapterFiles, SiteModule, check_fit
from .lora import LORA_ENDINGS, LoraFactors
from .peft_files import (
    ADAPTER_WEIGHTS,
    CONVERTIBLE,
    INVOCATION,
    PEFT_FILES,
    PEFT_PREFIX,
    PICKLED_WEIGHTS,
    read_config,
    tensor_refusal,
)
from .skeleton import Target, resolve

WANTED = dict(  # for messages, by the end of a tensor's name
    zip(
        (*LORA_ENDINGS, IA3_ENDING),
        ("A of shape", "B of", "a bias of B of", "a vector of shape"),
        strict=True,
    )
)
MAGNITUDE = ".lora_magnitude_vector"  # of a DoRA
BASE_LAYER = ".base_layer."  # PEFT's name for the base's layer inside its own


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    base_id: str | None = None,
    by_path: bool = True,
    name: str | None = None,
    allow_loss: float | None = None,
    fingerprint: bool | None = None,
) -> Expert:
    """The PEFT or bottleneck adapter at `source` as an expert without gates, written to `out`.

    `source` is a folder, or a Hub id with `@revision` where needed (`hub:owner/name/folder@…`).
    `base` is the base model to check the adapter against; None takes the one that the adapter
    names, at the revision that it names. It is recorded by `base_id`, else by its Hub id where that
    is known (`base.published`), else by its folder's path, unless not `by_path`. Only the
    base's config is read. `fingerprint` None records that of its weights where they are on this
    machine, True loads the base for it, False leaves it out: the adapter is taken to be trained on
    them. `allow_loss` lets an adapter of another type be approximated by a LoRA that loses at
    most that share of each update's squared norm; the hyper-parameters record the loss.

    Raises ExpertError naming what can't be routed and why, when `source` is an expert, when `out`
    exists, or for a base's path where not `by_path`; ConfigError unless 0 <= allow_loss < 1;
    BaseModelError when the base can't be found.
    """
    if allow_loss is not None and not 0 <= allow_loss < 1:
        raise ConfigError(f"allow_loss is {allow_loss!r}, but must be from 0 to below 1.")
    target = Path(out)
    require_free(target, ExpertError)
    with tempfile.TemporaryDirectory() as work:
        made = read_adapter(
            source,
            Path(work),
            name=name or target.name,
            base=base,
            base_id=base_id,
            by_path=by_path,
            allow_loss=allow_loss,
            fingerprint=fingerprint,
        )
        return made.save(target)


def read_adapter(
    source: str | Path,
    work: Path,
    *,
    name: str,
    base: str | None = None,
    base_id: str | None = None,
    by_path: bool = True,
    allow_loss: float | None = None,
    fingerprint: bool | None = None,
) -> Expert:
    """What `import_adapter` writes, not yet written: the adapter's own files, or others in `work`.

    Raises as `import_adapter` does.
    """
    check_name(name)
    if base_id and not is_hub_id(base_id):
        raise ExpertError(f"{shortened(base_id)} is no Hub id, OWNER/NAME, to record the base by.")
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
        plain_config(folder, config)  # what can't be routed on any base is refused first
    named = config.get(PEFT_FILES.base_key)
    revision = None if base else named_revision(config)
    place = base or require_named_base(named, from_hub=reference is not None)
    known = BaseReference(base_id) if base_id else published(place, revision)
    if known is None and not by_path:
        raise ExpertError(_told_of_path(place, named))
    if known is not None and not os.path.isdir(place):  # a path of another machine, or no path
        place, revision = (known.id, known.revision) if not base_id else (place, revision)
    record: dict[str, Any] = {"imported_from": str(reference or folder.resolve().name)}
    if lossy and allow_loss is not None:
        conversion = convert(folder, place, allow_loss, revision=revision)
        record |= {
            "converted_from": str(config["peft_type"]),
            "kept_of_update": round(conversion.kept, 6),
            "kept_at_worst_site": round(conversion.least, 6),
        }
        adapter = _write_adapter(work, conversion.factors, config)
    else:
        _check_invocation(config, folder, place, revision)
        modules, untouched = resolved_modules(folder, config, place, revision)
        adapter = folder if untouched else _write_adapter(work, modules, config)
    marks = None if fingerprint is False else fingerprint_here(place, revision=revision)
    if marks is None and fingerprint:
        marks = load_base(place, revision=revision).fingerprint
    found = replace(known or BaseReference(recorded_id(place), revision), fingerprint=marks)
    return Expert.from_peft(adapter, {}, base=found, name=name, hyperparameters=record)


@dataclass(frozen=True)
class Imports:
    """What came of several adapters: the experts, and the refused sources with the reasons."""

    experts: tuple[Expert, ...]
    refused: Mapping[str, str]


def adapters_in(place: Path) -> list[Path]:
    """`place` where it is the folder of an adapter, else those of its folders that are."""
    if _is_adapter(place):
        return [place]
    inside = place.iterdir() if place.is_dir() else ()
    return sorted(each for each in inside if not each.name.startswith(".") and _is_adapter(each))


def _is_adapter(place: Path) -> bool:
    return any((place / files.config).is_file() for files in formats())


def import_adapters(sources: Iterable[str | Path], out: str | Path, **options: Any) -> Imports:
    """Each of `sources` imported into the folder `out`, under its own last name.

    `options` are those of `import_adapter` but `name`. One that is refused doesn't keep the others
    back.
    """
    folder = Path(out)
    return _all_of(sources, lambda source, name: import_adapter(source, folder / name, **options))


def read_adapters(folders: Iterable[Path]) -> Imports:
    """The adapters in `folders` as experts in memory, of which nothing is written beside them."""

    def read(source: str | Path, name: str) -> Expert:
        place, files = Path(source).resolve(), adapter_files(Path(source))
        held = [place / file for file in (files.config, files.weights)]
        # A missing one is `read_adapter`'s to tell: there may be pickled weights instead.
        return _read_once(place, name, *(sha256_of(each) for each in held if each.is_file()))

    return _all_of(folders, read)


@cache
def _read_once(source: Path, name: str, *_: str) -> Expert:
    """An adapter in memory; opened again with the same files, the same, since files stay."""
    expert = read_adapter(source, Path(tempfile.mkdtemp(dir=_scratch())), name=name)
    return replace(expert, source=source)


def _all_of(sources: Iterable[str | Path], make: Callable[[str | Path, str], Expert]) -> Imports:
    made: dict[str, Expert] = {}
    refused: dict[str, str] = {}
    for source in sources:
        try:
            name = _name_of(source)
            if name in made:
                raise ExpertError(f"Another adapter is named {name!r} too; import it alone.")
            made[name] = make(source, name)
        except PhatgooseError as error:
            refused[str(source)] = one_line(error)
    return Imports(tuple(made.values()), refused)


def _name_of(source: str | Path) -> str:
    if isinstance(source, Path) or Path(source).exists():
        return Path(source).resolve().name
    reference = HubReference.parse(source)
    return PurePosixPath(reference.folder or reference.repo).name


@cache
def _scratch() -> Path:
    # For as long as the process: experts in memory are views of these files.
    made, owner = tempfile.mkdtemp(prefix="phatgoose-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a fork must leave it alone
            shutil.rmtree(made, ignore_errors=True)

    atexit.register(remove)
    return Path(made)


def _told_of_path(place: str, named: object) -> str:
    hints = []
    if isinstance(named, str) and named != place and published(named):
        hints.append(f"the adapter names {named}")
    with suppress(ExpertError, OSError):
        origin = read_json_object(Path(place) / "config.json").get("_name_or_path")
        if isinstance(origin, str) and origin != place and published(origin):
            hints.append(f"its config.json names {shortened(origin)}")
    hint = f" ({', '.join(hints)})" if hints else ""
    return (
        f"The base is named by a path, {shortened(place)}, by which nobody else can load it. If it "
        f"is on the Hub{hint}, give its id with --base-id; --by-path records the path."
    )


def resolved_modules(
    folder: Path, config: Mapping[str, Any], base: str, revision: str | None = None
) -> tuple[Mapping[str, SiteModule], bool]:
    """The modules by site of the adapter in `folder` on the base named `base`.

    `config` is that of PEFT's files, checked by `plain_config`. With the modules True when the
    adapter's files can stay as they are, since `read_modules` reads the same modules from them
    without the base. The base's weights are read only for a DoRA, and where the adapter trained
    biases of it. Raises ExpertError when a tensor is missing, left over or of another shape than
    PEFT wants.
    """
    if adapter_files(folder) is not PEFT_FILES:
        found = read_modules(folder)
        sites = find_sites(load_skeleton(base, revision=revision, offline=False))
        check_fit(folder.resolve().name, found, sites)
        return found, True
    is_dora, tensors = bool(config.get("use_dora")), PEFT_FILES.read_weights(folder)
    try:
        skeleton = resolve(base, config, revision)
        left = skeleton.rename(tensors)
        modules = {
            site: _module(site, target, left, folder) for site, target in skeleton.targets.items()
        }
        if config.get("bias", "none") != "none":
            modules = _with_biases(modules, left, base, revision)
        if is_dora:
            modules = _with_magnitudes(modules, left, base, revision)
        for name in sorted(left):
            raise tensor_refusal(name, folder, ADAPTER_WEIGHTS)
    except ExpertError as error:
        if str(error).startswith(str(folder)):
            raise
        raise ExpertError(f"{folder} can't be imported. {error}") from error
    if is_dora:
        return modules, False
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
    made = next((type(module) for module in modules.values()), LoraFactors)
    kept = ("task_type", PEFT_FILES.base_key, "revision", "fan_in_fan_out", INVOCATION)
    about = {key: config[key] for key in kept if config.get(key) is not None}
    if made.files is not PEFT_FILES:
        about = {made.files.base_key: config.get(PEFT_FILES.base_key) or ""}
    return made.write(folder, modules, about)


def imported_kind(files: AdapterFiles, config: Mapping[str, Any]) -> str:
    """The kind that an adapter of this config is imported as."""
    return DoraFactors.kind if config.get("use_dora") else kind_of(files, config).name


def plain_config(folder: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The adapter's config (`config` if it was read), checked; ExpertError for others."""
    files = adapter_files(folder)
    if files is not PEFT_FILES:
        return files.read_config(folder)
    config = read_config(folder) if config is None else config
    is_dora = config.get("peft_type") == "LORA" and config.get("use_dora") is True
    if is_dora and (config.get("bias", "none") != "none" or config.get(INVOCATION)):
        raise ExpertError(f"{folder} uses use_dora with biases or {INVOCATION}.")
    PEFT_FILES.checked({**config, "use_dora": False} if is_dora else config, folder)
    return config


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
    """`named`, if it can be loaded by others than its author.

    Raises ExpertError where it is missing, or a path of another machine (`from_hub`).
    """
    if not isinstance(named, str) or not named:
        raise ExpertError("The adapter doesn't name its base model; name it with --base.")
    if from_hub and published(named) is None:
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


def _with_magnitudes(
    modules: Mapping[str, SiteModule],
    left: dict[str, Tensor],
    base: str,
    revision: str | None,
) -> dict[str, SiteModule]:
    """The LoRAs `modules` as DoRAs of the magnitudes in `left`, which are taken out of it."""
    loaded = load_base(base, revision=revision, dtype="float32", device="cpu").model
    found: dict[str, SiteModule] = {}
    for site, lora in modules.items():
        m = left.pop(f"{PEFT_PREFIX}{site}{MAGNITUDE}", None)
        layer: Any = loaded.get_submodule(site)
        wanted = linear_shape(layer)[1:]
        if not isinstance(lora, LoraFactors) or m is None or m.shape != wanted:
            got = None if m is None else tuple(m.shape)
            raise ExpertError(f"Site {site}: wanted a magnitude of {wanted}, got {got}.")
        found[site] = DoraFactors.of(lora, m, layer)
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
