"""Experts made of other people's adapters, from a folder or the Hub; some adapters are refused.

PEFT itself says, on a model without weights, where an adapter acts, and at which rank and scale
(`resolve`). Its tensors must be exactly the ones that PEFT wants there. An adapter that reads the
same without PEFT's help is copied byte for byte. One whose tensors had to be renamed or converted
is written again, with every site, rank and scale spelled out.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
from ..files import one_line, require_free, sha256_of, shortened
from ..sites import Site, find_sites, linear_shape
from . import ia3, lora
from .convert import convert, peft_errors, spelled_out
from .dora import DoraFactors
from .expert import (
    LAYOUT,
    Expert,
    adapter_files,
    check_name,
    formats,
    read_modules,
)
from .hub import HubReference, fetch, reference_of
from .kind import SiteModule, check_fit
from .peft_files import (
    ACTING,
    ADAPTER,
    CONFIGS,
    CONVERTIBLE,
    INVOCATION,
    PEFT_FILES,
    PEFT_PREFIX,
    read_config,
)

UNINITIALISED = {"LORA": {"init_lora_weights": False}, "IA3": {"init_ia3_weights": False}}
MAGNITUDE = ".lora_magnitude_vector"  # of a DoRA
KEPT = ("task_type", PEFT_FILES.base_key, "revision", "fan_in_fan_out", INVOCATION)  # of a config


def import_adapter(
    source: str | Path, out: str | Path, *, name: str | None = None, **options: Any
) -> Expert:
    """The adapter at `source` as an expert without gates, written to `out`, called `name`.

    `options` are those of `read_adapter`, which says what is refused. Raises ExpertError when `out`
    exists, too.
    """
    target = Path(out)
    require_free(target, ExpertError)
    with tempfile.TemporaryDirectory() as work:
        expert = read_adapter(source, Path(work), name=name or target.name, **options)
        return expert.save(target)


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
    """The adapter at `source` as an expert in memory, of its own files or of others in `work`.

    `source` is a folder, or a Hub id with `@revision` where needed (`hub:owner/name/folder@…`).
    `base` is the base model to check the adapter against; None takes the one that the adapter
    names, at the revision that it names. It is recorded by `base_id`, else by its Hub id where that
    is known (`base.published`), else by its folder's path, unless not `by_path`. Only the base's
    config is read. `fingerprint` None records that of its weights where they are on this machine,
    True loads the base for it, False leaves it out: the adapter is taken to be trained on them.
    `allow_loss` lets an adapter of another type be approximated by a LoRA that loses at most that
    share of each update's squared norm; the hyper-parameters record the loss.

    Raises ExpertError naming what can't be routed and why, when `source` is an expert, and for a
    base's path where not `by_path`; ConfigError unless 0 <= allow_loss < 1; BaseModelError when the
    base can't be found.
    """
    check_name(name)
    if allow_loss is not None and not 0 <= allow_loss < 1:
        raise ConfigError(f"allow_loss is {allow_loss!r}, but must be from 0 to below 1.")
    folder, reference = _find(source)
    if (folder / LAYOUT.info).exists():
        raise ExpertError(
            f"{reference or folder} is an expert already ({LAYOUT.info}), whose gates an import "
            f"would drop; use it as it is, or fetch it with 'phatgoose pull'."
        )
    config = _config_of(folder, lossy=allow_loss is not None)
    place, revision, known = _base_of(config, folder, reference, base, base_id)
    if known is None and not by_path:
        raise ExpertError(
            f"The base is named by a path, {shortened(place)}, by which nobody else can load it. "
            f"If it is on the Hub, give its id with --base-id; --by-path records the path."
        )
    record: dict[str, Any] = {"imported_from": str(reference or folder.resolve().name)}
    if allow_loss is not None and config.get("peft_type") in CONVERTIBLE:
        converted, kept = convert(folder, place, allow_loss, revision=revision)
        record |= {"converted_from": str(config["peft_type"]), **kept}
        folder = _write(work, converted, config)
    else:
        modules, untouched = resolved_modules(folder, config, place, revision)
        folder = folder if untouched else _write(work, modules, config)
    marks = None if fingerprint is False else fingerprint_here(place, revision=revision)
    if marks is None and fingerprint:
        marks = load_base(place, revision=revision).fingerprint
    recorded = replace(known or BaseReference(recorded_id(place), revision), fingerprint=marks)
    return Expert.from_peft(folder, {}, base=recorded, name=name, hyperparameters=record)


def _base_of(
    config: Mapping[str, Any],
    folder: Path,
    reference: HubReference | None,
    base: str | None,
    base_id: str | None,
) -> tuple[str, str | None, BaseReference | None]:
    """Where to load the base, at which revision, and how others can name it, None if by a path."""
    if base_id and not is_hub_id(base_id):
        raise ExpertError(f"{shortened(base_id)} is no Hub id, OWNER/NAME, to record the base by.")
    named = config.get(adapter_files(folder).base_key)
    place, revision = base or named, None if base else config.get("revision") or None
    if not isinstance(place, str) or not place:
        raise ExpertError("The adapter doesn't name its base model; name it with --base.")
    if base is None and reference and published(place) is None:
        raise ExpertError(
            f"The adapter names its base by a path of its author's machine, {shortened(named)}; "
            f"name the base with --base."
        )
    known = BaseReference(base_id) if base_id else published(place, revision)
    if known is not None and not base_id and not os.path.isdir(place):
        place, revision = known.id, known.revision  # a path of another machine, or no path
    return place, revision, known


def _write(folder: Path, modules: Mapping[str, SiteModule], config: Mapping[str, Any]) -> Path:
    kind = type(next(iter(modules.values())))
    about = {key: config[key] for key in KEPT if config.get(key) is not None}
    if kind.files is not PEFT_FILES:
        about = {kind.files.base_key: config.get(PEFT_FILES.base_key) or ""}
    return kind.write(folder, modules, about)


@dataclass(frozen=True)
class Imports:
    """What came of several adapters: the experts, and the refused sources with the reasons."""

    experts: tuple[Expert, ...]
    refused: Mapping[str, str]


def adapters_in(place: Path) -> list[Path]:
    """`place` if it is the folder of an adapter or expert, else those of its folders that are."""
    if _is_adapter(place):
        return [place]
    inside = place.iterdir() if place.is_dir() else ()
    return sorted(each for each in inside if not each.name.startswith(".") and _is_adapter(each))


def _is_adapter(place: Path) -> bool:
    names = (LAYOUT.info, *(files.config for files in formats()))
    return any((place / name).is_file() for name in names)


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
        paths = [place / file for file in (files.config, files.weights)]
        # A missing one is `read_adapter`'s to tell.
        return _read_once(place, name, *(sha256_of(each) for each in paths if each.is_file()))

    return _all_of(folders, read)


@cache
def _read_once(source: Path, name: str, *_: str) -> Expert:
    """An adapter in memory; opened again with the same files, the same, since files stay."""
    expert = read_adapter(source, Path(tempfile.mkdtemp(dir=_scratch())), name=name)
    return replace(expert, source=source)


def _all_of(sources: Iterable[str | Path], make: Callable[[str | Path, str], Expert]) -> Imports:
    experts: dict[str, Expert] = {}
    refused: dict[str, str] = {}
    for source in sources:
        try:
            is_here = isinstance(source, Path) or Path(source).exists()
            reference = None if is_here else HubReference.parse(str(source))
            place = PurePosixPath(reference.folder or reference.repo) if reference else Path(source)
            name = place.name if reference else Path(source).resolve().name
            if name in experts:
                raise ExpertError(f"Another adapter is named {name!r} too; import it alone.")
            experts[name] = make(source, name)
        except PhatgooseError as error:
            refused[str(source)] = one_line(error)
    return Imports(tuple(experts.values()), refused)


@cache
def _scratch() -> Path:
    # For as long as the process: experts in memory are views of these files.
    scratch, owner = tempfile.mkdtemp(prefix="phatgoose-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a fork must leave it alone
            shutil.rmtree(scratch, ignore_errors=True)

    atexit.register(remove)
    return Path(scratch)


def resolved_modules(
    folder: Path, config: Mapping[str, Any], base: str, revision: str | None = None
) -> tuple[Mapping[str, SiteModule], bool]:
    """The modules by site of the adapter in `folder` on the base named `base`.

    With them True when the adapter's files can stay as they are, since `read_modules` reads the
    same modules from them without the base. The base's weights are read only for a DoRA. Raises
    ExpertError when a tensor is missing, left over or of another shape than PEFT wants.
    """
    if adapter_files(folder) is not PEFT_FILES:
        modules = read_modules(folder)
        sites = find_sites(load_skeleton(base, revision=revision, offline=False))
        check_fit(folder.resolve().name, modules, sites)
        return modules, True
    is_dora, tensors = bool(config.get("use_dora")), PEFT_FILES.read_weights(folder)
    try:
        skeleton = resolve(base, config, revision)
        if config.get(INVOCATION) and skeleton.model.config.is_encoder_decoder:
            raise ExpertError(f"{INVOCATION} is not supported on an encoder-decoder.")
        left = skeleton.rename(tensors)
        modules = {site: each.module(site, left) for site, each in skeleton.targets.items()}
        if is_dora:
            modules = _with_magnitudes(modules, left, base, revision)
        if left:
            raise ExpertError(f"It holds {shortened(min(left), 200)}, no part of a plain adapter.")
    except ExpertError as error:
        raise ExpertError(f"{folder} can't be imported. {error}") from error
    if not is_dora:
        with suppress(ExpertError):  # its tensors may have older names, which only PEFT can read
            return modules, _same(read_modules(folder, tensors), modules)
    return modules, False


def _config_of(folder: Path, *, lossy: bool) -> dict[str, Any]:
    """What the adapter's config says; ExpertError where that can't be routed on any base."""
    files = adapter_files(folder)
    if files is not PEFT_FILES:
        return files.read_config(folder)
    config = read_config(folder)
    if lossy and config.get("peft_type") in CONVERTIBLE:
        return config
    is_dora = config.get("peft_type") == "LORA" and config.get("use_dora") is True
    if is_dora and config.get(INVOCATION):
        raise ExpertError(f"{folder} uses use_dora with {INVOCATION}.")
    PEFT_FILES.checked({**config, "use_dora": False} if is_dora else config, folder)
    return config


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
    return folder, reference_of(folder) or reference


def _with_magnitudes(
    modules: Mapping[str, SiteModule], left: dict[str, Tensor], base: str, revision: str | None
) -> dict[str, SiteModule]:
    """The LoRAs `modules` as DoRAs of the magnitudes in `left`, which are taken out of it."""
    loaded = load_base(base, revision=revision, dtype="float32", device="cpu").model
    doras: dict[str, SiteModule] = {}
    for site, module in modules.items():
        magnitude = left.pop(f"{PEFT_PREFIX}{site}{MAGNITUDE}", torch.empty(0))
        layer: Any = loaded.get_submodule(site)
        wanted = linear_shape(layer)[1:]
        if not isinstance(module, lora.LoraFactors) or magnitude.shape != wanted:
            got = tuple(magnitude.shape)
            raise ExpertError(f"Site {site}: wanted a magnitude of {wanted}, got {got}.")
        doras[site] = DoraFactors.of(module, magnitude, layer)
    return doras


def _same(one: Mapping[str, SiteModule], other: Mapping[str, SiteModule]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for site in one
        for a, b in zip(vars(one[site]).values(), vars(other[site]).values(), strict=True)
    )


# Where a LoRA or (IA)³ config acts on a base: PEFT's own answer, from a model without weights.
#
# PEFT resolves target_modules (names, regular expressions, all-linear), layers_to_transform,
# exclude_modules, rank_pattern, alpha_pattern and rsLoRA. Only regular expressions are matched
# beforehand, without backtracking (`spelled_out`), and PEFT is given the names that match. The
# model is built on torch's meta device, once per distinct config.


@dataclass(frozen=True)
class Target:
    """A linear layer that a config adapts: the shapes of its tensors by field, a LoRA's scale."""

    shapes: Mapping[str, tuple[int, ...]]
    scale: float | None = None

    def module(self, site: str, tensors: dict[str, Tensor]) -> SiteModule:
        """The module of the tensors for `site`, which are taken out; ExpertError for others."""
        endings = ia3.ENDINGS if self.scale is None else lora.ENDINGS
        parts = {}
        for name in self.shapes:
            if f"{PEFT_PREFIX}{site}{endings[name]}" in tensors:
                parts[name] = tensors.pop(f"{PEFT_PREFIX}{site}{endings[name]}")
        got = {name: tuple(part.shape) for name, part in parts.items()}
        if got != self.shapes:
            raise ExpertError(f"Site {site}: its config wants {self.shapes}, got {got}.")
        if self.scale is None:
            vector = parts["vector"]
            return ia3.ScalingVector(vector.flatten(), on_input=vector.shape[0] == 1)
        return lora.LoraFactors(**parts, scale=self.scale)


@dataclass(frozen=True)
class Skeleton:
    """A base under a config, without weights: `targets` by site, in the model's order."""

    model: PeftModel
    targets: Mapping[str, Target]

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` under this transformers' names of the layers; ExpertError if PEFT can't."""
        with peft_errors("Its tensors can't be converted to this transformers"):
            return dict(
                convert_peft_adapter_state_dict_for_transformers(
                    model=self.model,
                    peft_config=self.model.peft_config[ADAPTER],
                    adapter_state_dict=dict(tensors),
                    adapter_name=ADAPTER,
                )
            )


def resolve(base: str, config: Mapping[str, Any], revision: str | None = None) -> Skeleton:
    """The base `base` under a plain `config` (as `PEFT_FILES` reads it), without weights.

    Raises BaseModelError without the base's config, ExpertError when `config` doesn't fit it.
    """
    options = {key: config[key] for key in ACTING if config.get(key) is not None}
    return _resolve(base, revision, config["peft_type"], json.dumps(options))


@lru_cache(maxsize=8)
def _resolve(base: str, revision: str | None, kind: str, options: str) -> Skeleton:
    model = load_skeleton(base, revision=revision, offline=False)
    sites = find_sites(model)
    plain = spelled_out(json.loads(options), model)
    with peft_errors(f"PEFT can't apply its config to {base!r}"):
        # On the meta device: PEFT says where and how, and no number is made.
        adapted = get_peft_model(model, CONFIGS[kind](**plain, **UNINITIALISED[kind]))
    fused = getattr(adapted.peft_config[ADAPTER], "target_parameters", None)
    if fused:
        raise ExpertError(
            f"The adapter acts on layers of {base!r} that transformers 5 has fused into parameters "
            f"({', '.join(sorted(fused))}), which are no linear layers."
        )
    targets = {}
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer | IA3Layer):
            continue
        original = layer.get_base_layer()
        if name not in sites or not isinstance(original, nn.Linear | Conv1D):
            raise ExpertError(
                f"The adapter acts on {name} ({type(original).__name__}), but sites are linear "
                f"layers inside the blocks of {base!r}; embeddings and output layers are none."
            )
        targets[name] = _target(layer, sites[name])
    return Skeleton(adapted, targets)


def _target(layer: LoraLayer | IA3Layer, site: Site) -> Target:
    n, d = site.in_features, site.out_features
    if isinstance(layer, IA3Layer):
        return Target({"vector": (1, n) if layer.is_feedforward else (d, 1)})
    rank = layer.r[ADAPTER]
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, n), "B": (d, rank)}
    shapes |= {"bias": (d,)} if layer.lora_bias[ADAPTER] else {}
    return Target(shapes, float(layer.scaling[ADAPTER]))
