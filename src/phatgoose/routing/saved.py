"""Saved routed models: a folder with a description and the experts' tensors (docs/format.md).

A folder may come from anyone: `read_saved` checks all of it once, and what it returns is trusted.
Experts join and leave a folder, which is written anew beside the old one and then replaces it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from ..base.identity import BaseReference, Text, check_base
from ..config import Routing, closest
from ..errors import ConfigError, PoolError, RoutingError
from ..experts.adapter_files import check_parts
from ..experts.expert import ActsOn, Name
from ..experts.hub import HubReference
from ..experts.pool import Pool, check_alike
from ..experts.stack import INDICES
from ..files import (
    JsonObject,
    TensorFile,
    new_directory,
    new_file,
    parse_json,
    read_json,
    reading,
    sha256_of,
    shortened,
    write_text,
    writing,
)
from ..names import ROUTED_INFO
from ..reader import ReaderReference
from ..sites import FLOATS
from .routers.prompt import OWNERS, ByPrompt, Tables
from .routers.router import Router, check_measured, router_of, warn_of_lowered_k
from .stacks import (
    SitePart,
    SiteStack,
    check_numbers,
    joined_parts,
    kept_part,
    parts_of_kinds,
    renumbered,
    stack_of,
)

ROUTED_WEIGHTS = "routed.safetensors"
FORMAT_VERSION = 1
FOLDED = "Merged experts are folded into the base's weights for good; compose the pool again."
UNIT = ("embeddings", "centroids")  # and which of them are unit vectors, or 0
LONGEST = 1.01  # of unit vectors that are rounded


def write_saved(
    folder: Path, info: JsonObject, sites: Mapping[str, SitePart], tables: Tables
) -> None:
    """Write a saved model's own files to `folder`: the description `info` and tensors."""
    tensors = tables.saved()
    for site, (stack, state) in sites.items():
        at_site = {"experts": stack.experts, **stack.tensors(), **state}
        for name, tensor in at_site.items():
            tensors[f"{name}.{site}"] = tensor
    for key, tensor in tensors.items():
        tensors[key] = tensor.detach().cpu().contiguous()
    with new_file(folder / ROUTED_WEIGHTS) as unfinished:
        save_file(tensors, unfinished)
        (folder / ROUTED_INFO).unlink(missing_ok=True)  # no routed model until all is there
    info = {**info, "weights_sha256": sha256_of(folder / ROUTED_WEIGHTS)}
    write_text(folder / ROUTED_INFO, json.dumps(info, indent=2) + "\n", RoutingError)


def shareable(records: Sequence[JsonObject]) -> list[JsonObject]:
    """`records` with the last name alone in place of a path on this machine."""
    shared = []
    for record in records:
        path = record.get("path") or ""
        if not HubReference.is_one(path):
            path = Path(path).name
        shared.append({**record, "path": path})
    return shared


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
    reader: ReaderReference | None = None
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
        count = len({record.name for record in self.experts})
        numbers = {0, *self.lookup.experts_by_task.values()}
        if count < len(self.experts) or not numbers <= {*range(count)}:
            raise ValueError(
                "experts must be some, each name once, and experts_by_task number them"
            )


def read_description(path: Path) -> tuple[JsonObject, Description]:
    """The description in the file `path`, as it is and as what it says; else RoutingError."""
    info = read_json(path, dict, RoutingError, f" Pools are routed: compose({str(path.parent)!r}).")
    with reading(path, RoutingError):
        return info, parse_json(json.dumps(info), Description)


@dataclass(frozen=True)
class SavedModel:
    """A saved model as it lies in its folder: description, and tensors as views of their file.

    `sizes` are those of each site, by letter ("n" and "d" are its inputs and outputs).
    """

    info: JsonObject
    base: BaseReference
    tensors: TensorFile
    router: Router
    sizes: Mapping[str, Mapping[str | int, int]]

    @property
    def records(self) -> list[JsonObject]:
        return list(self.info["experts"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(record["name"] for record in self.records)

    def at(self, site: str) -> SitePart:
        """The experts at `site`, and their router's tensors there."""
        state = self._at(site, ("folded", *self.router.sizes))
        tensors = self._at(site, ("experts",))
        for part in parts_of_kinds().values():
            tensors |= self._at(site, part.names().values())
        return SitePart(SiteStack.of(tensors, tensors["experts"]), state)

    def _at(self, site: str, names: Iterable[str]) -> dict[str, Tensor]:
        keys = {name: f"{name}.{site}" for name in names}
        return {name: self.tensors[key] for name, key in keys.items() if key in self.tensors}

    @property
    def tables(self) -> Tables:
        # A copy of a model has one of its tables, and of an open file there is none.
        tensors = dict(self.tensors.under("lookup"))
        return Tables(self.names, tensors, self.info.get("lookup", {}))


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
    # Both at once, while the file's pages are in memory.
    with ThreadPoolExecutor(1) as worker:
        hashing = worker.submit(tensors.sha256)
        tensors.check_finite()
    if hashing.result() != about.weights_sha256:
        raise RoutingError(f"{path}: it was changed after it was written.")
    count = len(about.experts)
    by_site = defaultdict[str, dict[str, Tensor]](dict)
    for key, tensor in tensors.items():
        name, _, site = key.partition(".")
        if name == "lookup":
            name, site = site, name
        by_site[site][name] = tensor
    _check_tables(f"{path}, lookup", by_site.pop("lookup", {}), count, router)
    sizes = {}
    for site, at_site in by_site.items():
        sizes[site] = _check_site(f"{path}, {site}", at_site, count, router)
    return SavedModel(info, about.base, tensors, router, sizes)


def _check_tables(where: str, tables: Mapping[str, Tensor], pool_size: int, router: Router) -> None:
    forms: dict[str, Sequence[str | int]] = {}
    if isinstance(router, ByPrompt):
        forms |= router.prompt_sizes
    for name, form in forms.items():
        forms[name] = [pool_size if size == "E" else size for size in form]
    check_parts(where, forms, tables, (torch.float32,), {OWNERS: INDICES})
    if OWNERS in tables and not _is_within(tables[OWNERS], pool_size):
        raise RoutingError(f"{where}: owners must number experts.")
    for name, table in tables.items():
        if name.endswith(".rest") and (table < 0).any():
            raise RoutingError(f"{where}: variances are below 0.")
    for name in UNIT:
        if name in tables and tables[name].norm(dim=-1).max() > LONGEST:
            raise RoutingError(f"{where}: unit vectors are longer than 1.")


def _check_site(
    where: str, tensors: Mapping[str, Tensor], pool_size: int, router: Router
) -> dict[str | int, int]:
    """The sizes of one site's tensors, by letter, which belong together; else ExpertError.

    E are the experts of the site, n its inputs, d its outputs. Other letters of a part of a stack,
    such as the rank, are its own: they have its name before them.
    """
    is_folded = "folded" in tensors
    types = {"experts": INDICES}
    forms: dict[str, Sequence[str]] = {"experts": "E"}
    forms |= {"folded": "dn"} if is_folded else router.sizes
    for part in parts_of_kinds().values():
        names = part.names()
        if tensors.keys().isdisjoint(names.values()):
            continue
        for field_name, form in part.forms().items():
            name = names[field_name]
            if name in tensors or not form.optional:
                letters = [x if x in "nd" else f"{part.name}.{x}" for x in form.sizes]
                forms[name] = [f"{part.name}.E", *letters]
                types[name] = form.types
    sizes = check_parts(where, forms, tensors, FLOATS, types)
    experts = tensors["experts"]
    if not _is_within(experts, pool_size) or (experts.diff() <= 0).any():
        raise RoutingError(f"{where}: experts must be the pool's, in order, each of them once.")
    stack = SiteStack.of(tensors, experts)
    if is_folded:
        has_modules = router.folds and not stack.parts
    else:
        has_modules = _has_one_for_each(stack, sizes["E"])
    if not has_modules:
        raise RoutingError(f"{where}: there isn't one module for each of {sizes['E']} experts.")
    return sizes


def _has_one_for_each(stack: SiteStack, count: int) -> bool:
    modules = sum(len(next(iter(part.tensors().values()))) for part in stack.parts.values())
    rows = list(stack.rows().values())  # of a part without rows: all of them
    if modules != count or not rows:
        return False
    return torch.cat(rows).sort().values.equal(torch.arange(count))


def _is_within(indices: Tensor, count: int) -> bool:
    return int(indices.min()) >= 0 and int(indices.max()) < count


def base_of(directory: str | Path) -> BaseReference:
    """The base of the routed model in `directory`. Raises RoutingError when that is damaged."""
    return read_description(Path(directory) / ROUTED_INFO)[1].base


# Changing: experts join and leave. The base is loaded only to read prompts that no one has read.


def add_to_saved(
    directory: str | Path, pool: Pool | str | Path, reader: str | None = None
) -> SavedModel:
    """The saved model in `directory` with the experts of `pool` too, after its own.

    Prompts that no one has read are read by the pool's own reader, which the user must name as
    `reader` if it isn't a known one.

    It is then, byte for byte, what composing the larger pool would have saved. Raises RoutingError
    when its router can't take more, the folder is damaged, can't be written, or changed meanwhile;
    PoolError when a name is taken or vectors are missing, WrongBaseError and ExpertError when an
    expert doesn't fit, ConfigError when a reader is needed and can't be used.
    """
    pool = Pool.open(pool)
    folder = Path(directory).resolve()  # a link stays
    saved = read_saved(folder)
    _check_changeable(saved)
    router = saved.router
    tables = saved.tables
    taken = sorted({*saved.names} & {*pool.names})
    if taken:
        raise PoolError(f"An expert named {taken[0]!r} is there already; rename one.")
    check_base(pool.base, saved.base)
    if isinstance(router, ByPrompt):
        pool = pool.measured(reader)
    records = [*saved.records, *pool.records()]
    router.check(pool)
    check_measured(router, records)
    sizes = {}
    for site, by_letter in saved.sizes.items():
        sizes[site] = {letter: by_letter[letter] for letter in "nd" if letter in by_letter}
    check_alike(pool.experts, sizes)
    if isinstance(router, ByPrompt):
        tables = tables.grown(router.tables(pool))
    parts = {site: saved.at(site) for site in saved.sizes}
    for site in pool.sites:
        # Without a stack to go by, float32: the base rounds it when it is loaded.
        dtype = torch.float32
        if site in parts:
            dtype = parts[site].stack.dtype
        stack = stack_of(pool, site, dtype, torch.device("cpu"))
        check_numbers(stack, site, pool.names)
        later = replace(stack, experts=stack.experts + len(saved.names))
        joining = SitePart(later, router.table(pool, site))
        if site in parts:
            joining = joined_parts(parts[site], joining)
        parts[site] = joining
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
    missing = [name for name in leaving if name not in saved.names]
    if missing or not staying:
        hint = "".join(closest(name, saved.names) for name in missing)
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
    if any(name.startswith("folded.") for name in saved.tensors):
        raise RoutingError(FOLDED)
    if saved.router.why_fixed:
        raise RoutingError(saved.router.why_fixed)


def _rewritten(
    folder: Path,
    saved: SavedModel,
    sites: Mapping[str, SitePart],
    tables: Tables,
    records: list[JsonObject],
) -> SavedModel:
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
        if now != saved.info:
            raise RoutingError(f"{folder}: another process has changed it meanwhile; try again.")
    return changed
