"""Saved routed models: a folder with a description and the experts' tensors (docs/format.md).

A folder may come from anyone: `read_saved` checks all of it once, and what it returns is trusted.
Experts join and leave a folder, which is written anew beside the old one and replaces it in one
step.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from ..base import BaseReference, Text, check_base, load_base
from ..config import Routing, closest
from ..errors import ConfigError, PoolError, RoutingError
from ..experts.expert import ActsOn, Name, trained_in_chats
from ..experts.hub import HubReference
from ..experts.kind import INDICES, check_parts
from ..experts.pool import Pool, check_alike
from ..files import (
    TensorFile,
    new_directory,
    new_file,
    parse_json,
    prefetch,
    read_json,
    reading,
    sha256_of,
    shortened,
    write_text,
    writing,
)
from ..names import ROUTED_INFO
from ..sites import FLOATS
from .layers import (
    SitePart,
    SiteStack,
    check_numbers,
    joined_parts,
    kept_part,
    parts_of_kinds,
    renumbered,
    stack_of,
)
from .routers.prompt import OF_BASE, OWNERS, ByPrompt, Tables
from .routers.router import Router, check_measured, router_of, warn_of_lowered_k

ROUTED_WEIGHTS = "routed.safetensors"
FORMAT_VERSION = 1
FOLDED = "Merged experts are folded into the base's weights for good; compose the pool again."
UNIT = ("embeddings", "centroids")  # and which of them are unit vectors, or 0
LONGEST = 1.01  # of unit vectors that are rounded


def write_saved(
    folder: Path, info: Mapping[str, Any], sites: Mapping[str, SitePart], tables: Tables
) -> None:
    """Write a saved model's own files to `folder`: the description `info` and tensors."""
    tensors = tables.saved()
    for site, (stack, state) in sites.items():
        at_site = {"experts": stack.experts, **stack.tensors(), **state}
        tensors |= {f"{name}.{site}": tensor for name, tensor in at_site.items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with new_file(folder / ROUTED_WEIGHTS) as unfinished:
        save_file(tensors, unfinished)
        (folder / ROUTED_INFO).unlink(missing_ok=True)  # no routed model until all is there
    info = {**info, "weights_sha256": sha256_of(folder / ROUTED_WEIGHTS)}
    write_text(folder / ROUTED_INFO, json.dumps(info, indent=2) + "\n", RoutingError)


def shareable(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` with the last name alone in place of a path on this machine."""
    return [
        {**each, "path": path if HubReference.is_one(path) else Path(path).name}
        for each, path in ((each, each.get("path") or "") for each in records)
    ]


# Reading: the description, then every tensor against it and the others.


@dataclass(frozen=True)
class ExpertRecord:
    """What is read of an expert's record, besides what later versions may add."""

    name: Name
    path: str | None = None
    adapter_sha256: str | None = None
    vectors_sha256: str | None = None
    embeddings_sha256: str | None = None
    measured_in: str | None = None
    acts_on: ActsOn | None = None


@dataclass(frozen=True)
class Lookup:
    """What is read of a prompt router's own description."""

    embedder: Text | None = None
    embedding_form: Text | None = None
    experts_by_task: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What is read of a saved model's description (docs/format.md)."""

    format_version: Literal[1]
    base: BaseReference
    routing: Routing
    experts: list[ExpertRecord]
    weights_sha256: str
    lookup: Lookup = field(default_factory=Lookup)

    def __post_init__(self) -> None:
        count = len({each.name for each in self.experts})
        numbers = {0, *self.lookup.experts_by_task.values()}
        if count < len(self.experts) or not numbers <= {*range(count)}:
            raise ValueError(
                "experts must be some, each name once, and experts_by_task number them"
            )


def read_description(path: Path) -> tuple[dict[str, Any], Description]:
    """The description in the file `path`, as it is and as what it says; else RoutingError."""
    info = read_json(path, dict, RoutingError, f" Pools are routed: compose({str(path.parent)!r}).")
    with reading(path, RoutingError):
        return info, parse_json(json.dumps(info), Description)


@dataclass(frozen=True)
class SavedModel:
    """A saved model as it lies in its folder: description, and tensors as views of their file.

    `sizes` are those of each site, by letter ("n" and "d" are its inputs and outputs).
    """

    info: dict[str, Any]
    base: BaseReference
    tensors: TensorFile
    router: Router
    sizes: Mapping[str, Mapping[Any, int]]

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self.info["experts"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(record["name"] for record in self.records)

    def at(self, site: str) -> SitePart:
        """The experts at `site`, and their router's tensors there."""
        of_kinds = (name for part in parts_of_kinds().values() for name in part.names().values())
        full = {n: f"{n}.{site}" for n in ("experts", "folded", *self.router.sizes, *of_kinds)}
        tensors = {name: self.tensors[key] for name, key in full.items() if key in self.tensors}
        state = {name: tensors[name] for name in ("folded", *self.router.sizes) if name in tensors}
        return SitePart(SiteStack.of(tensors, tensors["experts"]), state)

    @property
    def tables(self) -> Tables:
        every = self.tensors.under("lookup")
        tensors = {name: each for name, each in every.items() if not name.startswith(OF_BASE)}
        base = dict(every.under(OF_BASE[:-1]))
        return Tables(self.names, tensors, self.info.get("lookup", {}), base)


def read_saved(directory: Path) -> SavedModel:
    """The saved model in `directory`, every file checked: its hash, finiteness, and each tensor.

    Tensors are checked against the description and each other, without a base. Raises RoutingError
    or ExpertError when anything is missing or damaged.
    """
    info, about = read_description(directory / ROUTED_INFO)
    try:
        router = router_of(about.routing)
    except ConfigError as error:
        raise RoutingError(f"{directory / ROUTED_INFO} is not valid: {error}") from error
    path = directory / ROUTED_WEIGHTS
    tensors = TensorFile(path)
    # Both looks at once, while the file's pages are in memory.
    _, sha256 = prefetch(lambda look: look(), (tensors.check_finite, tensors.sha256))
    _require(sha256 == about.weights_sha256, path, "it was changed after it was written")
    return SavedModel(info, about.base, tensors, router, _checked(tensors, info, router))


def _checked(
    file: TensorFile, info: Mapping[str, Any], router: Router
) -> dict[str, dict[str | int, int]]:
    """The sizes of each site's tensors, by letter; ExpertError where tensors don't fit."""
    count, by_site = len(info["experts"]), defaultdict[str, dict[str, Tensor]](dict)
    for name in file:
        kind, _, site = name.partition(".")
        place, short = (kind, site) if kind == "lookup" else (site, kind)
        by_site[place][short] = file[name]
    tables, where = by_site.pop("lookup", {}), f"{file.path}, lookup"
    forms: dict[str, Sequence[str | int]] = {}
    if isinstance(router, ByPrompt):
        forms |= router.prompt_sizes
        has_base = any(name.startswith(OF_BASE) for name in tables)
        for name, form in router.later_sizes.items():
            if name in tables or (has_base and name.startswith(OF_BASE)):
                forms[name] = form
    sized = {name: [count if x == "E" else x for x in form] for name, form in forms.items()}
    check_parts(where, sized, tables, (torch.float32,), {OWNERS: INDICES})
    owners = tables.get(OWNERS, torch.zeros(1))
    _require(_is_within(owners, count), where, "owners must number experts")
    rests = [tensor for name, tensor in tables.items() if name.endswith(".rest")]
    _require(not any(bool((each < 0).any()) for each in rests), where, "variances are below 0")
    lengths = [tables[name].norm(dim=-1).max() for name in UNIT if name in tables]
    _require(all(each <= LONGEST for each in lengths), where, "unit vectors are longer than 1")
    return {
        site: _check_site(f"{file.path}, {site}", tensors, count, router)
        for site, tensors in by_site.items()
    }


def _check_site(
    where: str, tensors: Mapping[str, Tensor], pool_size: int, router: Router
) -> dict[str | int, int]:
    """The sizes of one site's tensors, by letter, which belong together; else ExpertError.

    E are the experts of the site, n its inputs, d its outputs. Other letters of a part of a stack,
    such as the rank, are its own: they have its name before them.
    """
    is_folded, types = "folded" in tensors, {"experts": INDICES}
    forms: dict[str, Sequence[str]] = {"experts": "E"}
    forms |= {"folded": "dn"} if is_folded else router.sizes
    for part in parts_of_kinds().values():
        names = part.names()
        if any(name in tensors for name in names.values()):
            for each, form in part.forms().items():
                letters = [x if x in "nd" else f"{part.name}.{x}" for x in form.sizes]
                if not form.optional or names[each] in tensors:
                    forms[names[each]] = [f"{part.name}.E", *letters]
                    types[names[each]] = form.types
    sizes, experts = check_parts(where, forms, tensors, FLOATS, types), tensors["experts"]
    in_order = _is_within(experts, pool_size) and bool((experts.diff() > 0).all())
    _require(in_order, where, "experts must be the pool's, in order, each of them once")
    stack = SiteStack.of(tensors, experts)
    rows = list(stack.rows().values())  # of a part without rows: all of them
    every = torch.cat(rows).sort().values if rows else torch.empty(0)
    count = sum(len(next(iter(each.tensors().values()))) for each in stack.parts.values())
    is_whole = count == sizes["E"] and every.equal(torch.arange(count))
    is_whole = not rows and router.folds if is_folded else is_whole
    _require(is_whole, where, f"there isn't one module for each of {sizes['E']} experts")
    return sizes


def _is_within(indices: Tensor, count: int) -> bool:
    least, most = (int(end) for end in indices.aminmax())
    return least >= 0 and most < count


def _require(holds: bool, where: object, told: str) -> None:
    if not holds:
        raise RoutingError(f"{where}: {told}.")


def base_of(directory: str | Path) -> BaseReference:
    """The base of the routed model in `directory`. Raises RoutingError when that is damaged."""
    return read_description(Path(directory) / ROUTED_INFO)[1].base


# Changing: experts join and leave. The base is loaded only to read prompts that no one has read.


def add_to_saved(directory: str | Path, pool: Pool | str | Path) -> SavedModel:
    """The saved model in `directory` with the experts of `pool` too, after its own.

    It is then, byte for byte, what composing the larger pool would have saved. A router per prompt
    has the base loaded where experts bring prompts that no base has read. Raises RoutingError when
    its router can't take more, the folder is damaged, can't be written, or changed meanwhile;
    PoolError when a name is taken or vectors are missing, WrongBaseError and ExpertError when an
    expert doesn't fit, BaseModelError when a base that is needed can't be loaded.
    """
    pool, folder = Pool.open(pool), Path(directory).resolve()  # a link stays
    saved = read_saved(folder)
    _check_changeable(saved)
    router, tables = saved.router, saved.tables
    if taken := sorted({*saved.names} & {*pool.names}):
        raise PoolError(f"An expert named {taken[0]!r} is there already; rename one.")
    check_base(pool.base, saved.base)
    if pool.unread and isinstance(router, ByPrompt):
        base = load_base(saved.base.id, revision=saved.base.revision)
        check_base(saved.base, base.reference)
        pool = pool.measured(base)
    records = [*saved.records, *pool.records()]
    router.check(pool)
    check_measured(router, pool, records)
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
        parts[site] = joined_parts(parts[site], joining) if site in parts else joining
    return _rewritten(folder, saved, parts, tables, records)


def remove_from_saved(directory: str | Path, names: Iterable[str]) -> SavedModel:
    """The saved model in `directory` without the experts of these `names`.

    Raises RoutingError as `add_to_saved`, PoolError for a name that it lacks and when no expert
    would be left.
    """
    folder = Path(directory).resolve()
    saved = read_saved(folder)
    _check_changeable(saved)
    leaving = sorted(set(names))
    staying = [z for z, name in enumerate(saved.names) if name not in leaving]
    if len(staying) + len(leaving) > len(saved.names) or not staying:
        hint = "".join(closest(name, saved.names) for name in leaving if name not in saved.names)
        raise PoolError(
            f"{', '.join(map(shortened, leaving))} can't leave: there must be such experts, and "
            f"others besides; there are {', '.join(saved.names)}.{hint}"
        )
    warn_of_lowered_k(saved.router, len(staying), "the pool then has", stacklevel=3)
    place = renumbered(torch.tensor(staying), len(saved.names))
    kept = {site: kept_part(saved.at(site), place) for site in saved.sizes}
    sites = {site: part for site, part in kept.items() if part}
    records = [saved.records[z] for z in staying]
    return _rewritten(folder, saved, sites, saved.tables.shrunk(place), records)


def _check_changeable(saved: SavedModel) -> None:
    folded = any(name.startswith("folded.") for name in saved.tensors)
    if why := FOLDED if folded else saved.router.why_fixed:
        raise RoutingError(why)


def _rewritten(
    folder: Path,
    saved: SavedModel,
    sites: Mapping[str, SitePart],
    tables: Tables,
    records: list[dict[str, Any]],
) -> SavedModel:
    if trained_in_chats(records) != trained_in_chats(saved.records):
        tables = replace(tables, base={})  # read in another form, and again when it is needed
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # the folder itself is replaced
    with (
        writing(folder, RoutingError),
        lock,
        new_directory(folder, RoutingError, overwrite=True) as work,
    ):
        shutil.copytree(
            folder,
            work,
            symlinks=True,
            ignore=lambda place, _: [ROUTED_WEIGHTS] if place == str(folder) else [],
            dirs_exist_ok=True,
        )
        write_saved(work, {**saved.info, "experts": shareable(records)}, sites, tables)
        changed = read_saved(work)
        now, _ = read_description(folder / ROUTED_INFO)
        _require(now == saved.info, folder, "another process has changed it meanwhile; try again")
    return changed
