"""Saved routed models: a folder with a description and the experts' tensors (docs/format.md).

Saving, loading, and experts that join and leave a folder, which is written anew beside the old one
and replaces it in one step. A folder may come from anyone: `read_saved` checks all of it once, and
what it returns is trusted.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..base import Base, BaseReference, check_base, is_hub_id, surely_differs
from ..config import MODEL_TYPE, Routing, closest
from ..errors import ConfigError, ExpertError, PoolError, RoutingError, WrongBaseError
from ..experts.expert import check_name, code
from ..experts.hub import HubReference
from ..experts.kind import INDICES
from ..experts.pool import Pool, check_alike
from ..files import (
    WRITING_ERRORS,
    TensorFile,
    new_directory,
    new_file,
    one_line,
    prefetch,
    read_json,
    reason,
    sha256_of,
    shortened,
    write_text,
)
from ..passes import ActsOn
from ..sites import FLOATS, dtype_at, execution_device, find_sites
from .composition import Composition, composition_of, refuse_late, resolve_base
from .layers import FoldedLinear, RoutedLinear
from .routers.prompt import ByPrompt, Tables
from .routers.registry import router_of
from .routers.router import Router, check_measured, warn_of_lowered_k
from .stacks import (
    SitePart,
    SiteStack,
    check_numbers,
    declared,
    joined_parts,
    kept_part,
    renumbered,
    stack_of,
)

ROUTED_INFO, ROUTED_WEIGHTS = "routed.json", "routed.safetensors"
CONFIG, CARD = "config.json", "README.md"
FORMAT_VERSION = 1
HASHES = ("adapter_sha256", "vectors_sha256", "embeddings_sha256")  # in an expert's record
LIBRARY = "library_name: phatgoose"  # stands in our cards, and so tells them from a user's README
OWNERS = "owners"  # among a lookup's tensors, whose experts its rows are
UNIT = ("embeddings", "centroids")  # and which of them are unit vectors, or 0
LONGEST = 1.01  # of unit vectors that are rounded


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Config, tokenizer and card are written too, for transformers and people.

    Args:
        model: A routed model.
        directory: The folder to make.
        overwrite: Replace the folder if it is there.

    Raises:
        RoutingError: `model` is not routed, its base's weights have changed, or `directory` exists
            or can't be written.
    """
    _check_unchanged(model)
    with new_directory(Path(directory), RoutingError, overwrite=overwrite) as work:
        _write_model(model, work)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    **how: Any,
) -> None:
    """What `model.save_pretrained` is while `model` is routed: writes the files that `save` does.

    As transformers' own it writes into a folder that may be there already, replaces what it wrote
    there before, and leaves the rest alone. `phatgoose.load` reads the folder. `state_dict` and
    `how` (shards, say) are about the base's weights, of which none are written. Raises as `save`
    does, and RoutingError for a folder that holds another model's config.json.
    """
    if push_to_hub:
        raise RoutingError("A routed model goes to the Hub by model.push_to_hub(name).")
    _check_unchanged(model)
    target = Path(save_directory)
    config = target / CONFIG
    if config.exists() and read_json(config, dict, RoutingError).get("model_type") != MODEL_TYPE:
        raise RoutingError(f"{target} holds another model ({CONFIG}); choose another place.")
    try:
        if is_main_process:
            target.mkdir(parents=True, exist_ok=True)
            _write_model(model, target)
    except WRITING_ERRORS as error:
        raise RoutingError(f"{target} can't be written: {reason(error)}.") from error


def _check_unchanged(model: PreTrainedModel) -> None:
    base = composition_of(model).base
    if surely_differs(model, base):
        raise RoutingError(
            f"The weights of the base {base.id!r} have changed since it was loaded: trained or "
            f"resized? A routed model is saved without them; detach it and save the base."
        )


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    parts = composition_of(model)
    recorded = parts.router.recorded
    info = {
        "format_version": FORMAT_VERSION,
        "base": asdict(parts.base),
        "routing": {"router": recorded.router, "k": recorded.k, "kernel": recorded.kernel},
        "experts": shareable(parts.records),
        "weights_sha256": "",
        "lookup": dict(parts.prompt_router.tables.info) if parts.prompt_router else {},
    }
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "is_encoder_decoder": bool(model.config.is_encoder_decoder),
        "base_model": parts.base.id,
    }
    sites = {}
    for name, layer in parts.layers.items():
        if isinstance(layer, FoldedLinear):
            sites[name] = SitePart(SiteStack(layer.experts), {"folded": layer.folded})
        elif isinstance(layer, RoutedLinear):
            sites[name] = SitePart(layer.stack, layer.router.state())
    tables = parts.prompt_router.tables if parts.prompt_router else Tables(parts.experts)
    _write(folder, info, sites, tables)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n", RoutingError)
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)


def _write(
    folder: Path, info: Mapping[str, Any], sites: Mapping[str, SitePart], tables: Tables
) -> None:
    tensors = tables.saved()
    for site, (stack, state) in sites.items():
        at_site = {"experts": stack.experts, **stack.tensors(), **state}
        tensors |= {f"{name}.{site}": tensor for name, tensor in at_site.items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with new_file(folder / ROUTED_WEIGHTS) as unfinished:
        save_file(tensors, unfinished)
        (folder / ROUTED_INFO).unlink(missing_ok=True)  # no routed model until all is there
    info = {**info, "weights_sha256": sha256_of(folder / ROUTED_WEIGHTS)}
    write_card(folder, info)
    write_text(folder / ROUTED_INFO, json.dumps(info, indent=2) + "\n", RoutingError)


def shareable(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` with the last name alone in place of a path on this machine."""
    return [
        {**each, "path": path if HubReference.is_one(path) else Path(path).name}
        for each, path in ((each, each.get("path") or "") for each in records)
    ]


MODEL_CARD = """\
---
{front}{library}
tags:
- phatgoose
---

# Routed model of {count}

Router `{router}` chooses among {count} for the base `{base}`. The base's weights are not in this
folder: `phatgoose.load("path/to/this/folder")` loads them by its name and checks them.

{experts}
"""


def write_card(folder: Path, info: Mapping[str, Any]) -> None:
    """Write the card of the model that `info` describes; a README that isn't ours stays."""
    card = folder / CARD
    if card.exists() and LIBRARY not in card.read_text(encoding="utf-8", errors="replace"):
        return
    base, experts = info["base"]["id"], info["experts"]
    lines = [
        f"- {name}" + (f" (`{code(path)}`)" if HubReference.is_one(path) else "")
        for name, path in ((record["name"], record.get("path") or "") for record in experts)
    ]
    content = MODEL_CARD.format(
        front=f"base_model: {json.dumps(base)}\n" if is_hub_id(base) and "/" in base else "",
        library=LIBRARY,
        count="1 expert" if len(experts) == 1 else f"{len(experts)} experts",
        router=code(info["routing"]["router"]),
        base=code(base),
        experts="\n".join(lines),
    )
    write_text(card, content, RoutingError)


# Reading: the description, then every tensor against it and the others.


@dataclass(frozen=True)
class SavedModel:
    """A saved model as it lies in its folder: description, and tensors as views of their file.

    `sizes` are those of each site, by letter ("n" and "d" are its inputs and outputs).
    """

    info: dict[str, Any]
    tensors: TensorFile
    router: Router
    sizes: Mapping[str, Mapping[str, int]]

    @property
    def base(self) -> BaseReference:
        return BaseReference(**self.info["base"])

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self.info["experts"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(record["name"] for record in self.records)

    def at(self, site: str) -> SitePart:
        """The experts at `site`, and their router's tensors there."""
        names = ("experts", "folded", *declared().tensors, *self.router.sizes)
        full = {name: f"{name}.{site}" for name in names}
        tensors = {name: self.tensors[key] for name, key in full.items() if key in self.tensors}
        state = {name: tensors[name] for name in ("folded", *self.router.sizes) if name in tensors}
        return SitePart(SiteStack.of(tensors, tensors["experts"]), state)

    @property
    def tables(self) -> Tables:
        return Tables(self.names, self.tensors.under("lookup"), self.info.get("lookup", {}))


def read_saved(directory: Path) -> SavedModel:
    """The saved model in `directory`, every file checked: its hash, finiteness, and each tensor.

    Tensors are checked against the description and each other, without a base. Raises RoutingError
    when anything is missing or damaged, ConfigError for a router or kernel that isn't known.
    """
    info = read_description(directory / ROUTED_INFO)
    path = directory / ROUTED_WEIGHTS
    try:
        tensors = TensorFile(path)
        # Both looks at once, while the file's pages are in memory.
        _, sha256 = prefetch(lambda look: look(), (tensors.check_finite, tensors.sha256))
    except ExpertError as error:
        raise RoutingError(str(error)) from error
    if sha256 != info.get("weights_sha256"):
        raise RoutingError(f"{path} was changed after it was written.")
    router = router_of(Routing(**info["routing"]))
    return SavedModel(info, tensors, router, _checked(tensors, len(info["experts"]), router))


def read_description(path: Path) -> dict[str, Any]:
    """The description in the file `path`, as docs/format.md has it; else RoutingError."""
    hint = f" A pool is routed with compose({str(path.parent)!r})."
    info = read_json(path, dict, RoutingError, hint)
    version = info.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise RoutingError(
            f"{path}: format version {shortened(version)} is unknown, wanted {FORMAT_VERSION}."
        )
    try:
        if problem := _problem(info):
            raise ValueError(problem)
        router_of(Routing(**info["routing"]))
        BaseReference(**info["base"])
    except (TypeError, KeyError, ValueError, ConfigError, ExpertError) as error:
        raise RoutingError(
            f"{path} is not a valid description of a routed model: {one_line(error)}."
        ) from error
    return info


def _problem(info: Mapping[str, Any]) -> str | None:
    lookup, experts = info.get("lookup", {}), info["experts"]
    if not all(isinstance(each, dict) for each in (info["base"], info["routing"], lookup)):
        return "base, routing and lookup must be objects"
    if not isinstance(experts, list) or not experts:
        return f"experts is {shortened(experts)}, not a list of some"
    names = [_checked_name(record) for record in experts]
    if len(set(names)) < len(names):
        return f"of {shortened(names)} one name appears twice"
    base = {key: text for key, text in info["base"].items() if key == "id" or text is not None}
    embedding = {key: lookup[key] for key in ("embedder", "embedding_form") if key in lookup}
    for key, text in (base | embedding).items():
        if not (isinstance(text, str) and text.isprintable()):
            return f"{key} is {shortened(text)}"
    for task, expert in dict(lookup.get("experts_by_task", {})).items():
        if type(expert) is not int or not 0 <= expert < len(experts):
            return f"lookup.experts_by_task has {shortened(expert)} for {shortened(task)}"
    return None


def _checked_name(record: Any) -> str:
    name = record.get("name") if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"expert {shortened(record)} has no name")
    check_name(name)
    ActsOn.of(record.get("acts_on"))
    for key in ("path", "measured_in", *HASHES):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{key} of expert {name} is {shortened(record[key])}")
    return name


@dataclass(frozen=True)
class Form:
    """What a tensor looks like: a letter for each of its sizes, and the types it may have.

    E are the experts of a site, n its inputs, d its outputs. Other letters of a part of a stack,
    such as the rank, are its own: they have its name before them.
    """

    letters: Sequence[str]
    types: tuple[torch.dtype, ...] = FLOATS


def _forms(router: Router) -> dict[str, Form]:
    """The form of each tensor that a saved model may have at a site."""
    forms = {"experts": Form("E", INDICES), "folded": Form("dn")}
    for part in declared().parts.values():
        for field, form in part.forms().items():
            letters = [x if x in "nd" else f"{part.name}.{x}" for x in f"E{form.sizes}"]
            forms[part.names()[field]] = Form(letters, form.types)
    return forms | {name: Form(letters) for name, letters in router.sizes.items()}


def _checked(file: TensorFile, experts: int, router: Router) -> dict[str, dict[str, int]]:
    """The sizes of each site's tensors, by letter, of that many experts. Raises RoutingError."""
    by_site: dict[str, dict[str, Tensor]] = defaultdict(dict)
    prompt_form = router.prompt_sizes if isinstance(router, ByPrompt) else {}
    forms, types = _forms(router), {OWNERS: INDICES}
    lookup = {n: Form(x, types.get(n, (torch.float32,))) for n, x in prompt_form.items()}
    for name in file:
        kind, _, site = name.partition(".")
        if kind == "lookup":
            kind, site = site, kind
        if not site or kind not in (lookup if site == "lookup" else forms):
            raise RoutingError(
                f"{file.path} holds {shortened(name, 200)}, which is no part of a routed model."
            )
        by_site[site][kind] = file[name]
    tables = by_site.pop("lookup", {})
    where = f"{file.path}, lookup"
    told = f"there are {_named(tables)}; wanted {_named(lookup)}"
    _require(tables.keys() == lookup.keys(), where, told)
    _sizes(where, tables, lookup, {"E": experts})
    if OWNERS in tables:
        _check_range(where, OWNERS, tables[OWNERS], experts)
    for name, tensor in tables.items():
        if name.endswith(".rest"):
            _require(not bool((tensor < 0).any()), where, f"{name} has variances below 0")
        if name in UNIT:
            longest = float(tensor.float().norm(dim=-1).max())
            _require(longest <= LONGEST, where, f"{name} has rows that are longer than 1")
    return {
        site: _check_site(f"{file.path}, {site}", tensors, experts, router, forms)
        for site, tensors in by_site.items()
    }


def _check_site(
    where: str,
    tensors: Mapping[str, Tensor],
    pool_size: int,
    router: Router,
    forms: Mapping[str, Form],
) -> dict[str, int]:
    """The sizes of one site's tensors, by letter, which belong together; else RoutingError."""
    is_folded = "folded" in tensors
    needed = ["experts"] if is_folded else ["experts", *router.sizes]
    for part in declared().parts.values():
        if any(name in tensors for name in part.names().values()):
            needed += [part.names()[f] for f, form in part.forms().items() if not form.optional]
    for name in needed:
        _require(name in tensors, where, f"there are {_named(tensors)}, but no {name}")
    sizes, experts = _sizes(where, tensors, forms, {}), tensors["experts"]
    _check_range(where, "experts", experts, pool_size)
    is_in_order = bool((experts.diff() > 0).all())
    _require(is_in_order, where, "experts must be in order, each of them once")
    stack = SiteStack.of(tensors, experts)
    rows = list(stack.rows().values())  # of a part without rows: all of them
    every = torch.cat(rows).sort().values if rows else torch.empty(0)
    count = sum(len(next(iter(each.tensors().values()))) for each in stack.parts.values())
    is_whole = count == sizes["E"] and every.equal(torch.arange(count))
    is_whole = not rows and router.folds if is_folded else is_whole
    told = f"{_named(tensors)} are not one module for each of the {sizes['E']} experts there"
    _require(is_whole, where, f"{told} under router {router.name}")
    return sizes


def _sizes(
    where: str, tensors: Mapping[str, Tensor], forms: Mapping[str, Form], known: Mapping[str, int]
) -> dict[str, int]:
    sizes = dict(known)
    for name, tensor in tensors.items():
        letters, types = forms[name].letters, forms[name].types
        shape = dict(zip(letters, tensor.shape, strict=False))
        fits = len(letters) == tensor.dim() and 0 not in tensor.shape
        fits = fits and all(sizes.get(letter, size) == size for letter, size in shape.items())
        if not fits or tensor.dtype not in types:
            wanted = (f"{x[-1]} = {sizes[x]}" if x in sizes else x[-1] for x in letters)
            got = f"{name} has shape {list(tensor.shape)} and type {tensor.dtype}"
            types_told = " or ".join(map(str, types))
            _require(False, where, f"{got}; wanted [{', '.join(wanted)}] in {types_told}")
        sizes |= shape
    return sizes


def _check_range(where: str, name: str, indices: Tensor, count: int) -> None:
    least, most = (int(end) for end in indices.aminmax())
    told = f"{name} has numbers from {least} to {most}; wanted 0 to {count - 1}"
    _require(least >= 0 and most < count, where, told)


def _require(holds: bool, where: str, told: str) -> None:
    if not holds:
        raise RoutingError(f"{where}: {told}.")


def _named(names: Iterable[str]) -> str:
    return ", ".join(names) or "no tensors"


# Loading: beside a base that is loaded by its name.


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
    embedder: str | None = None,
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    Args:
        directory: The folder.
        base: A name, a loaded `Base` or a transformers model; None loads the base by its recorded
            name.
        dtype: "auto", "float32", "bfloat16" or "float16", for a base that is loaded here.
        embedder: The embedder of a router that uses one, if it isn't the default one.

    Raises:
        RoutingError: The folder is missing or damaged.
        WrongBaseError: The base is another one.
        ConfigError: The router needs an embedder that wasn't named.
    """
    folder = Path(directory)
    saved = read_saved(folder)
    loaded = resolve_base(base, saved.base, dtype)
    model, sites = loaded.model, find_sites(loaded.model)
    router = router_of(replace(saved.router.routing, embedder=embedder))
    tables = saved.tables if isinstance(router, ByPrompt) else None
    parts = Composition(loaded, router, saved.names, saved.records, tables)
    for name, sizes in saved.sizes.items():
        site = sites.get(name)
        wanted = {"n": site.in_features, "d": site.out_features} if site else {}
        if site is None:
            raise WrongBaseError(f"In {folder}, experts act on {name}, which the base lacks.")
        if any(sizes.get(letter, size) != size for letter, size in wanted.items()):
            raise RoutingError(
                f"{folder}, {name}: the experts' tensors have {dict(sizes)}; wanted {wanted}."
            )
        original: Any = model.get_submodule(name)
        device, kind = execution_device(original), dtype_at(original, model)
        stack, state = saved.at(name)
        if "folded" in state:
            folded, experts = state["folded"].to(device, kind), stack.experts.to(device)
            layer = FoldedLinear(original, site, folded, experts, len(saved.names))
            parts.layers[name] = layer
        else:
            parts.add(original, site, stack.to(device, kind), state)
    parts.install(model)
    model.save_pretrained = partial(save_pretrained, model)
    return model


def base_of(directory: str | Path) -> BaseReference:
    """The base of the routed model in `directory`. Raises RoutingError when that is damaged."""
    return BaseReference(**read_description(Path(directory) / ROUTED_INFO)["base"])


# Changing: experts join and leave, without the base.


def add_to_saved(directory: str | Path, pool: Pool | str | Path) -> SavedModel:
    """The saved model in `directory` with the experts of `pool` too, after its own.

    It is then, byte for byte, what composing the larger pool would have saved. Raises RoutingError
    when its router can't take more, the folder is damaged, can't be written, or changed meanwhile;
    PoolError when a name is taken or vectors are missing, WrongBaseError and ExpertError when an
    expert doesn't fit.
    """
    pool, folder = Pool.open(pool), Path(directory).resolve()  # a link stays
    saved = read_saved(folder)
    _check_changeable(saved)
    router, tables, records = saved.router, saved.tables, [*saved.records, *pool.records()]
    if taken := sorted({*saved.names} & {*pool.names}):
        raise PoolError(f"An expert named {taken[0]!r} is there already; rename one.")
    config = folder / CONFIG
    if config.exists() and read_json(config, dict, RoutingError).get("is_encoder_decoder"):
        refuse_late(records)
    router.check(pool)
    check_measured(router, pool, records)
    check_base(pool.base, saved.base)
    sizes = {s: {x: each[x] for x in "nd" if x in each} for s, each in saved.sizes.items()}
    check_alike(pool.experts, sizes)
    if isinstance(router, ByPrompt):
        tables = tables.grown(router.tables(pool))
    parts = {site: saved.at(site) for site in saved.sizes}
    for site in pool.sites:
        # Without a stack to go by, float32: the base rounds it when it is loaded.
        dtype = parts[site].stack.dtype if site in parts else torch.float32
        stack = stack_of(pool, site, dtype, torch.device("cpu"))
        check_numbers(stack, site, pool.names)
        later = replace(stack, experts=stack.experts + len(saved.names))
        joining = SitePart(later, router.table(pool, site))
        parts[site] = joined_parts([parts[site], joining]) if site in parts else joining
    return _rewritten(folder, saved, parts, tables, records)


def remove_from_saved(directory: str | Path, names: Iterable[str]) -> SavedModel:
    """The saved model in `directory` without the experts of these `names`.

    Raises RoutingError as `add_to_saved`, PoolError for a name that it lacks and when no expert
    would be left.
    """
    folder = Path(directory).resolve()
    saved = read_saved(folder)
    _check_changeable(saved)
    leaving = set(names)
    for name in sorted(leaving - {*saved.names}):
        hint = closest(name, saved.names)
        raise PoolError(f"There is no expert {name!r}; there are {', '.join(saved.names)}.{hint}")
    staying = [z for z, name in enumerate(saved.names) if name not in leaving]
    if not staying:
        raise PoolError("No expert would be left.")
    warn_of_lowered_k(saved.router, len(staying), "the pool then has", stacklevel=3)
    place = renumbered(torch.tensor(staying), len(saved.names))
    kept = {site: kept_part(saved.at(site), place) for site in saved.sizes}
    sites = {site: part for site, part in kept.items() if part}
    records = [saved.records[z] for z in staying]
    return _rewritten(folder, saved, sites, saved.tables.shrunk(place), records)


def _check_changeable(saved: SavedModel) -> None:
    if saved.router.why_fixed is not None:
        raise RoutingError(saved.router.why_fixed)
    if any(name.startswith("folded.") for name in saved.tensors):
        raise RoutingError(
            "The merged experts are folded into the base's weights and can't be separated any "
            "more; compose the pool again."
        )


def _rewritten(
    folder: Path,
    saved: SavedModel,
    sites: Mapping[str, SitePart],
    tables: Tables,
    records: list[dict[str, Any]],
) -> SavedModel:
    with new_directory(folder, RoutingError, overwrite=True) as work:
        shutil.copytree(
            folder,
            work,
            symlinks=True,
            ignore=lambda place, _: [ROUTED_WEIGHTS] if place == str(folder) else [],
            dirs_exist_ok=True,
        )
        _write(work, {**saved.info, "experts": shareable(records)}, sites, tables)
        changed = read_saved(work)
        if read_description(folder / ROUTED_INFO) != saved.info:
            raise RoutingError(f"Another process has changed {folder} meanwhile; try again.")
    return changed
