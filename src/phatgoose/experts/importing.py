"""Experts made of other people's adapters, from a folder or the Hub; some adapters are refused.

PEFT itself says, on a model without weights, where an adapter acts, and at which rank and scale
(`_resolve`). Its tensors must be exactly the ones that PEFT wants there. An adapter that reads the
same without PEFT's help is copied byte for byte. One whose tensors had to be renamed or converted
is written again, with every site, rank and scale spelled out.

LoHa, LoKr and others add a matrix to the base weight. Its truncated singular value decomposition
(PEFT's convert_to_lora) is a LoRA; the share that the truncation loses is reported.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.identity import BaseReference, published, recorded_id
from ..base.loading import fingerprint_here, load_base, load_skeleton
from ..config import READER
from ..errors import ExpertError, PhatgooseError
from ..files import one_line, require_free, shortened
from ..names import check_name
from ..reader import open_reader
from ..sites import Tensors, find_sites
from .adapter_files import (
    ACTING,
    ADAPTER_CONFIG,
    BY_PATTERN,
    CONVERTIBLE,
    LISTS_OF_NAMES,
    PEFT_FILES,
    PEFT_PREFIX,
    ByName,
    check_config,
    check_parts,
    matching,
    value_at,
)
from .expert import LAYOUT, Expert, Record, read_modules
from .expert import adapters_in as adapters_in  # of the command line
from .hub import REFERENCE, HubReference, fetch, reference_of, reported
from .ia3 import ScalingVector
from .lora import DoraFactors, LoraFactors
from .module import Modules, SiteModule, check_fit

UNINITIALISED = {"LORA": {"init_lora_weights": False}, "IA3": {"init_ia3_weights": False}}
ADAPTER = "default"  # PEFT's name for the one adapter of a model
MAGNITUDE = ".lora_magnitude_vector"  # of a DoRA
KEPT = ("task_type", PEFT_FILES.base_key, "revision", "fan_in_fan_out")  # of a config
ALL_LINEAR = "all-linear"  # a word of PEFT's, no pattern
SIZES = ("r", "n_frequency", "block_size", "gralora_k")  # sizes of the tensors that PEFT makes


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    reader: str = READER,
    **options: Any,
) -> Expert:
    """The adapter at `source` as an expert without gates, written to `out`, called `name`.

    With statistics of the prompts that it brings, made by `reader`. `options` are those of
    `read_adapter`, which says what is refused. Raises ExpertError when `out` exists, too.
    """
    target = Path(out)
    require_free(target, ExpertError)
    expert = read_adapter(source, name or target.name, **options)
    if expert.prompts:
        expert = expert.with_prompts_read(open_reader(reader))
    saved = expert.save(target)
    if expert.directory.parent == Path(_scratch().name):
        shutil.rmtree(expert.directory, ignore_errors=True)
    return saved


def read_adapter(
    source: str | Path,
    name: str,
    *,
    base: str | None = None,
    base_id: str | None = None,
    allow_loss: float | None = None,
    fingerprint: bool | None = None,
) -> Expert:
    """The adapter at `source` as an expert in memory, of its own files or of temporary ones.

    `source` is a folder, or a Hub id with `@revision` where needed (`hub:owner/name/folder@…`).
    `base` is the base model to check the adapter against; None takes the one that the adapter
    names, at the revision that it names. It is recorded by `base_id`, else by its Hub id where that
    is known (`base.published`), else by its folder's path. Only the base's config is read.
    `fingerprint` None records that of its weights where they are on this machine, True loads the
    base for it, False leaves it out: the adapter is taken to be trained on them. `allow_loss`, from
    0 to below 1, lets an adapter of another type be approximated by a LoRA that loses at most that
    share of each update's squared norm; the hyper-parameters record the loss.

    Raises ExpertError naming what can't be routed and why, and when `source` is an expert;
    BaseModelError when the base can't be found.
    """
    check_name(name)
    reference = _reference(source)
    folder = fetch(reference, inner=False) if reference else Path(source)
    reference = reference_of(folder) or reference
    if (folder / LAYOUT.info).exists():
        raise ExpertError(
            f"{reference or folder} is an expert already ({LAYOUT.info}), whose gates an import "
            f"would drop; use it as it is, or fetch it with 'phatgoose pull'."
        )
    config = PEFT_FILES.read_any_config(folder)
    is_lossy = allow_loss is not None and config.get("peft_type") in CONVERTIBLE
    if not is_lossy:
        PEFT_FILES.checked({**config, "use_dora": False}, folder)
    place = str(base or config.get(PEFT_FILES.base_key) or "")
    revision = None if base else config.get("revision") or None
    if not place or (base is None and reference and published(place) is None):
        raise ExpertError(
            f"The adapter names its base by {place or 'nothing'}, which nobody else can load; name "
            f"the base with --base."
        )
    modules: Modules
    record: dict[str, object] = {"imported_from": str(reference or folder.resolve().name)}
    with warnings.catch_warnings(), reported(f"{reference or folder} can't be imported"):
        # What PEFT warns of (fan_in_fan_out, tied layers) shows in the tensors, which are compared.
        warnings.simplefilter("ignore")
        local = BaseReference(place, revision)  # which refuses what is no revision
        if is_lossy:
            modules, kept = _converted(folder, config, local, allow_loss or 0)
            record |= {"converted_from": config["peft_type"], **kept}
        else:
            modules = _resolved(folder, config, local)
        recorded = BaseReference(base_id) if base_id else published(place, revision)
    files = folder
    if not _is_read_as(modules, folder):
        kind = type(next(iter(modules.values())))
        files = Path(tempfile.mkdtemp(dir=_scratch().name))
        about = _kept(config, KEPT)
        if kind.files is not PEFT_FILES:
            about = {kind.files.base_key: config.get(PEFT_FILES.base_key) or ""}
        kind.write(files, modules, about)
    mark = None
    if fingerprint is not False:
        mark = fingerprint_here(place, revision=revision)
    if fingerprint and mark is None:
        mark = load_base(place, revision=revision).fingerprint
    recorded = replace(recorded or BaseReference(recorded_id(place), revision), fingerprint=mark)
    expert = Expert.from_peft(files, {}, base=recorded, name=name, hyperparameters=record)
    return replace(expert, source=folder)


def _reference(source: str | Path) -> HubReference | None:
    is_here = isinstance(source, Path) or Path(source).exists()
    is_named = HubReference.is_one(source) or REFERENCE.fullmatch(str(source))
    if is_here or not is_named:
        return None
    return HubReference.parse(str(source))


@dataclass(frozen=True)
class Imports:
    """What came of several adapters: the experts, and the refused sources with the reasons."""

    experts: tuple[Expert, ...]
    refused: Mapping[str, str]


def import_adapters(sources: Iterable[str | Path], out: str | Path, **options: Any) -> Imports:
    """Each of `sources` imported into the folder `out`, under its own last name.

    `options` are those of `import_adapter` but `name`. One that is refused doesn't keep the others
    back.
    """
    return _all_of(
        sources, lambda source, name: import_adapter(source, Path(out) / name, **options)
    )


def read_adapters(folders: Iterable[Path]) -> Imports:
    """The adapters in `folders` as experts in memory, of which nothing is written beside them."""
    return _all_of(map(Path.resolve, folders), read_adapter)


def _last_name(source: str | Path) -> str:
    # In the Hub's cache a repository's folder is called by its commit.
    reference = _reference(source) or reference_of(Path(source))
    if reference is None:
        return Path(source).resolve().name
    return Path(reference.folder or reference.repo).name


def _all_of(sources: Iterable[str | Path], make: Callable[[str | Path, str], Expert]) -> Imports:
    experts = []
    refused = {}
    for source in sources:
        try:
            experts.append(make(source, _last_name(source)))
        except PhatgooseError as error:
            refused[str(source)] = one_line(error)
    return Imports(tuple(experts), refused)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    # For as long as the process: experts in memory are views of these files.
    return tempfile.TemporaryDirectory(prefix="phatgoose-", ignore_cleanup_errors=True)


# Where a LoRA or (IA)³ config acts on a base: PEFT's own answer, from a model without weights.
#
# PEFT resolves target_modules (names, regular expressions, all-linear), layers_to_transform,
# exclude_modules, rank_pattern, alpha_pattern and rsLoRA. Only regular expressions are matched
# beforehand, without backtracking (`_spelled_out`), and PEFT is given the names that match. The
# model is built on torch's meta device, once per distinct config.


def _resolved(folder: Path, config: Record, base: BaseReference) -> Modules:
    """The modules by site of the adapter in `folder` on this base.

    The base's weights are read only for a DoRA. Raises ExpertError when a tensor is missing, left
    over or of another shape than PEFT wants.
    """
    is_dora = bool(config.get("use_dora"))
    tensors = PEFT_FILES.read_weights(folder)
    options = _kept(config, ACTING)
    model, layers = _resolve(base, config["peft_type"], json.dumps(options))
    renamed: Tensors = convert_peft_adapter_state_dict_for_transformers(
        model=model,
        peft_config=model.peft_config[ADAPTER],
        adapter_state_dict=dict(tensors),
        adapter_name=ADAPTER,
    )
    shapes = _shapes(model)
    if is_dora:
        for site, layer in layers.items():
            shapes[f"{PEFT_PREFIX}{site}{MAGNITUDE}"] = (layer.out_features,)
    check_parts(str(folder), shapes, renamed)
    modules = {}
    for site, layer in layers.items():
        modules[site] = _module(site, layer, renamed)
    if is_dora:
        loaded = load_base(base.id, revision=base.revision, dtype="float32", device="cpu").model
        for site, module in modules.items():
            magnitude = renamed[f"{PEFT_PREFIX}{site}{MAGNITUDE}"]
            modules[site] = DoraFactors.of(module, magnitude, loaded.get_submodule(site))
    return modules


def _kept(config: Record, keys: Iterable[str]) -> dict[str, object]:
    return {key: config[key] for key in keys if config.get(key) is not None}


def _module(site: str, layer: Any, tensors: Tensors) -> Any:
    place = f"{PEFT_PREFIX}{site}"
    if isinstance(layer, IA3Layer):
        return ScalingVector(tensors[f"{place}.ia3_l"].flatten(), on_input=layer.is_feedforward)
    A = tensors[f"{place}.lora_A.weight"]
    B = tensors[f"{place}.lora_B.weight"]
    return LoraFactors(A, B, float(layer.scaling[ADAPTER]), tensors.get(f"{place}.lora_B.bias"))


def _shapes(adapted: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors, by their names in its file."""
    state: Tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor.shape for name, tensor in state.items()}


def _is_read_as(modules: Modules, folder: Path) -> bool:
    """Whether the files in `folder` can stay: `read_modules` reads these without the base."""
    try:
        read = read_modules(folder)
    except ExpertError:  # its tensors may have older names, which only PEFT can read
        return False
    return read.keys() == modules.keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for site in read
        for a, b in zip(vars(read[site]).values(), vars(modules[site]).values(), strict=True)
    )


@lru_cache(maxsize=8)
def _resolve(base: BaseReference, kind: str, options: str) -> tuple[PeftModel, Mapping[str, Any]]:
    """A base under a plain config, without weights, and PEFT's layers by site, in its order."""
    model = load_skeleton(base.id, revision=base.revision, offline=False)
    sites = find_sites(model)
    plain = _spelled_out(json.loads(options), model)
    with torch.device("meta"):  # PEFT says where and how, and no number is made, whatever the rank
        adapted = get_peft_model(
            model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**plain, **UNINITIALISED[kind])
        )
    layers = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer | IA3Layer):
            original = layer.get_base_layer()
            if name not in sites or not isinstance(original, nn.Linear | Conv1D):
                raise ValueError(
                    f"it acts on {name} ({type(original).__name__}), but sites are linear layers "
                    f"inside the blocks of {base.id!r}; embeddings and output layers are none"
                )
            layers[name] = layer
    return adapted, layers


def _spelled_out(options: Record, model: nn.Module) -> dict[str, Any]:
    """`options` of a PEFT config, checked already, with layers' names in place of patterns.

    Raises ValueError when a pattern matches nothing, or PEFT would ignore an option beside it.
    """
    names = [name for name, _ in model.named_modules()]
    plain = dict(options)
    for key, value in options.items():
        if key.endswith(BY_PATTERN) and isinstance(value, Mapping):
            values = {name: value_at(value, name) for name in names}
            plain[key] = ByName(_kept(values, names))
        elif key in LISTS_OF_NAMES and isinstance(value, str) and value.lower() != ALL_LINEAR:
            # Matched here, without backtracking: a stranger's pattern could take PEFT hours.
            plain[key] = matching(value, names)
            ignored = options.get("layers_to_transform") is not None
            if key == "target_modules" and (ignored or not plain[key]):
                raise ValueError(
                    f"target_modules {shortened(value)} matches no layer, or stands beside "
                    f"layers_to_transform"
                )
    targets = plain.get("target_modules")
    if isinstance(options.get("feedforward_modules"), str) and isinstance(targets, list):
        # PEFT wants the one within the other.
        endings = tuple(f".{target}" for target in targets)
        inside = [name for name in names if f".{name}".endswith(endings)]
        plain["target_modules"] = sorted(inside)
        plain["feedforward_modules"] = [n for n in plain["feedforward_modules"] if n in inside]
    return plain


# Adapters of other types that update linear layers, approximated by a LoRA.


def _converted(
    folder: Path, config: Record, base: BaseReference, allow_loss: float
) -> tuple[Modules, dict[str, float]]:
    """The adapter in `folder` as a LoRA that loses at most `allow_loss` of each update's energy.

    With it what is recorded: the share that is kept of all updates together, and at the worst site.
    Energy is the squared Frobenius norm. Ranks are as small as that allows, each site's own. The
    base's weights are loaded. Raises ExpertError when a tensor is missing or left over, any
    exception when PEFT can't convert the adapter.
    """
    tensors = PEFT_FILES.read_weights(folder)
    check_config(config, str(folder / ADAPTER_CONFIG))
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise ValueError("it replaces modules or biases of the base")
    _refuse_sizes(config, tensors)
    model = load_base(base.id, dtype="float32", revision=base.revision).model
    of_kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    names = {option.name for option in dataclasses.fields(of_kind) if option.init}
    names -= {"peft_type", "auto_mapping"}
    options = {name: config[name] for name in config if name in names}
    adapted = get_peft_model(model, of_kind(**_spelled_out(options, model)))
    check_parts(str(folder), _shapes(adapted), tensors)
    set_peft_model_state_dict(adapted, dict(tensors))
    updates = _energies(adapted)
    _, converted = convert_to_lora(adapted, rank=1.0 - allow_loss)
    factors: dict[str, SiteModule] = {}
    kept_energy = 0.0
    shares = [1.0]
    for site, energy in updates.items():
        A = converted[f"{PEFT_PREFIX}{site}.lora_A.weight"]
        B = converted[f"{PEFT_PREFIX}{site}.lora_B.weight"]
        factors[site] = LoraFactors(A, B)
        kept = float((B.double() @ A.double()).square().sum())
        kept_energy += kept
        if energy > 0:
            shares.append(kept / energy)
    check_fit("adapter", factors, find_sites(model))
    share = 1.0
    total = sum(updates.values())
    if total:
        share = min(kept_energy / total, 1.0)
    return factors, {"kept_of_update": round(share, 6), "kept_at_worst_site": round(min(shares), 6)}


def _refuse_sizes(config: Record, tensors: Tensors) -> None:
    # PEFT allocates what the config names before it looks at tensors. Of a LoKr a greater rank
    # means a whole matrix.
    if config["peft_type"] == "LOKR":
        return
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    numbers = [config.get(key) for key in SIZES]
    ranks = config.get("rank_pattern")
    if isinstance(ranks, Mapping):
        numbers += ranks.values()
    for number in numbers:
        if isinstance(number, int | float) and number > most:
            raise ValueError(
                f"its config names a size of {shortened(number)}, but none of its tensors has more "
                f"than {most} rows or columns"
            )


def _energies(adapted: nn.Module) -> dict[str, float]:
    energies = {}
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if isinstance(layer, BaseTunerLayer) and hasattr(layer, "get_delta_weight"):
                update = layer.get_delta_weight(ADAPTER)
                energies[name.removeprefix(PEFT_PREFIX)] = float(update.double().square().sum())
    return energies
