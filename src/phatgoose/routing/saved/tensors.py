"""What a saved routed model holds, read strictly: its description, routed.json, and its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...base.active_tokens import ActsOn
from ...base.fingerprint import BaseReference
from ...config import Routing
from ...errors import ConfigError, ExpertError, RoutingError
from ...experts.expert import check_name
from ...experts.hub import HubReference
from ...files.strict import one_line, read_json_object, shortened
from ...files.tensor_file import TensorFile, prefetch
from .. import stacks
from ..checks import LARGEST, SCALE, check_lookup, check_tensors, tensors_of_sites
from ..routers.prompt_router import ByPrompt, Tables
from ..routers.registry import choice_of
from ..routers.router import Router, router_of

ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"
VERSIONS = (1, 2, 3)  # 2 has segments; 3 has experts that act from a prompt's end on
HASHES = ("adapter_sha256", "vectors_sha256", "embeddings_sha256")  # in an expert's record


def version_of(records: Sequence[Mapping[str, Any]], otherwise: int) -> int:
    """The format version of a model of these experts: one that reads them as they are meant."""
    return 3 if any(record.get("acts_on") is not None for record in records) else otherwise


def shareable(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` with the last name alone in place of a path on this machine."""
    return [
        {**each, "path": path if HubReference.is_one(path) else Path(path).name}
        for each, path in ((each, each.get("path") or "") for each in records)
    ]


def in_segments(info: Mapping[str, Any]) -> bool:
    """True if a routed model of this `info` has a file for every time that it grew."""
    version = info["format_version"]
    return bool(version == 2 or (version == 3 and "segments" in info))


def read_description(path: Path) -> dict[str, Any]:
    """The description in the file `path`, as docs/format.md has it; else RoutingError."""
    try:
        info = read_json_object(path, RoutingError)
    except FileNotFoundError as error:
        raise RoutingError(
            f"{path.parent} holds no routed model: {path.name} can't be read."
        ) from error
    version = info.get("format_version")
    if version not in VERSIONS or type(version) is not int:
        raise RoutingError(
            f"{path}: format version {shortened(version)} is unknown, wanted "
            f"{' or '.join(map(str, VERSIONS))}."
        )
    missing = {"base", "routing", "experts"} - info.keys()
    missing |= {"segments" if in_segments(info) else "weights_sha256"} - info.keys()
    if missing:
        raise RoutingError(f"{path} lacks {', '.join(sorted(missing))}.")
    try:
        _check_experts(info)
        _check_lookup(info.get("lookup", {}), len(info["experts"]))
        base_in(info)
        routing_in(info)
    except (TypeError, ValueError, ConfigError, ExpertError) as error:
        raise RoutingError(
            f"{path} is not a valid description of a routed model: {one_line(error)}"
        ) from error
    return info


def base_in(info: Mapping[str, Any]) -> BaseReference:
    """The base that `info` names. Raises TypeError, KeyError or ValueError for what it can't be."""
    base = BaseReference(**info["base"])
    for key, value in vars(base).items():
        absent = value is None and key != "id"
        if not absent and not (isinstance(value, str) and value.isprintable()):
            raise ValueError(f"base.{key} is {shortened(value)}")
    return base


def removed_in(info: Mapping[str, Any]) -> frozenset[int]:
    """The indices of experts that were removed. Raises ValueError for what they can't be."""
    removed, count = info.get("removed", []), len(info["experts"])
    gone = frozenset(removed)
    are_indices = all(type(z) is int and 0 <= z < count for z in gone)
    if not isinstance(removed, list) or len(gone) < len(removed) or not are_indices:
        raise ValueError(f"removed is {shortened(removed)}")
    if len(gone) == count:
        raise ValueError("no expert is left")
    return gone


def routing_in(info: Mapping[str, Any]) -> Routing:
    """The routing that `info` names. Raises as `base_in`, and ConfigError."""
    if not isinstance(info["routing"], dict):
        raise TypeError(f"routing is {shortened(info['routing'])}")
    routing = Routing(**info["routing"])
    choice_of(routing.router)
    return routing


def routing_record(routing: Routing) -> dict[str, Any]:
    return {"router": routing.router, "k": routing.k, "kernel": routing.kernel}


def _check_experts(info: Mapping[str, Any]) -> None:
    records = info["experts"]
    if not isinstance(records, list) or not records:
        raise ValueError(f"experts is {shortened(records)}, not a list of some")
    removed, names = removed_in(info), set()
    for index, record in enumerate(records):
        name = record.get("name") if isinstance(record, dict) else None
        stays = index not in removed
        if not isinstance(name, str) or (stays and name in names):
            raise ValueError(f"expert {shortened(record)} has no name of its own")
        check_name(name)
        if stays:
            names.add(name)
        ActsOn.of(record.get("acts_on"))
        for key in ("path", *HASHES):
            if not isinstance(record.get(key), str | None):
                raise ValueError(f"{key} of expert {name} is {shortened(record[key])}")


def _check_lookup(lookup: Any, experts: int) -> None:
    if not isinstance(lookup, dict):
        raise ValueError(f"lookup is {shortened(lookup)}")
    for name in ("embedder", "embedding_form"):
        value = lookup.get(name, "")
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError(f"lookup.{name} is {shortened(value)}")
    chosen = lookup.get("experts_by_task", {})
    if not isinstance(chosen, dict):
        raise ValueError(f"lookup.experts_by_task is {shortened(chosen)}")
    for task, expert in chosen.items():
        if type(expert) is not int or not 0 <= expert < experts:
            raise ValueError(
                f"lookup.experts_by_task has {shortened(expert)} for {shortened(task)}; wanted 0 "
                f"to {experts - 1}"
            )


# A saved routed model's tensors: one file, or several that hold experts added later.
#
# A segment is a file of stacks and router tensors, by site, of some of the experts; together the
# segments are the pool, in order. Experts that were removed are left out here, while their rows
# stay in the files until these are compacted. A tensor of one segment is mapped, never copied.
#
# Factors may be stored in int8: each row of A and B as whole numbers from -127 to 127 times the
# row's largest magnitude / 127, so that every number is off by at most 1/254 of it.

LOOKUP = "lookup."  # begins the names of what a prompt router knows
SEGMENT_FILE = re.compile(r"routed(-[0-9a-f]{12})?\.safetensors")


def lookup_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(LOOKUP): tensors[n] for n in tensors if n.startswith(LOOKUP)}


@dataclass(frozen=True)
class Segment:
    """A file of a saved model; `first` is the index of its first expert, of `experts`."""

    tensors: TensorFile
    first: int
    experts: int


class SavedTensors(Mapping[str, Tensor]):
    """All tensors of a saved model by name, as one file of the experts that are left has them."""

    def __init__(self, segments: Sequence[Segment], left: Sequence[int]) -> None:
        self._segments = segments
        count = sum(segment.experts for segment in segments)
        self._place = stacks.renumbered(torch.tensor(left), count)
        self._are_all = len(left) == count
        self._stacked = stacks.declared().tensors
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})  # a site and its tensors, by kind
        self._kinds = self._kinds_by_site()
        self._names = dict.fromkeys(f"{k}.{site}" for site in self._kinds for k in self._held(site))
        self._latest = ("", {})

    def _kinds_by_site(self) -> dict[str, list[str]]:
        """The kinds of the files' tensors at each site that one of the experts left acts at."""
        scales = {name + SCALE for name in self._stacked}
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for segment in self._segments for name in segment.tensors):
            kind, _, site = name.partition(".")
            if kind not in scales:
                found.setdefault(site, []).append(kind)
        return {
            site: kinds
            for site, kinds in found.items()
            if "experts" not in kinds or (self._place[self._counted(f"experts.{site}")] >= 0).any()
        }

    def _held(self, site: str) -> list[str]:
        """The kinds of this site's tensors, as one file of the experts left has them."""
        kinds = self._kinds[site]
        stacked = [kind for kind in kinds if kind in self._stacked]
        if set(stacked) <= {"A", "B"}:  # plain LoRAs have these, whichever are left
            return kinds
        # Which tensors a stack of several kinds has depends on the experts that are left.
        rest = [kind for kind in kinds if kind not in stacked]
        return [*rest, *(kind for kind in self._site(site) if kind in self._stacked)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        kind, _, site = name.partition(".")
        if kind == "lookup":
            return self._tables.tensors[site]
        if kind == "experts":
            place = self._place[self._counted(name)]
            return place[place >= 0]
        return self._site(site)[kind]

    @cached_property
    def _tables(self) -> Tables:
        parts = [
            Tables(("",) * segment.experts, lookup_in(segment.tensors))
            for segment in self._segments
        ]
        tables = parts[0].grown(*parts[1:])
        return tables if self._are_all else tables.shrunk(self._place)

    def _site(self, site: str) -> dict[str, Tensor]:
        if self._latest[0] != site:
            parts = []
            for segment in self._segments:
                file = segment.tensors
                if f"experts.{site}" in file:
                    kinds = [kind for kind in self._kinds[site] if f"{kind}.{site}" in file]
                    held = {kind: dequantised(file, f"{kind}.{site}") for kind in kinds}
                    state = {k: held[k] for k in kinds if k not in (*self._stacked, "experts")}
                    experts = held["experts"] + segment.first
                    parts.append(stacks.SitePart(stacks.SiteStack.of(held, experts), state))
            part = stacks.joined_parts(parts)
            if not self._are_all:
                part = stacks.kept_part(part, self._place) or part
            # One site is kept: its tensors are asked for one after the other, and all sites may not
            # fit into memory.
            self._latest = (site, {**part.stack.tensors(), **part.state})
        return self._latest[1]

    def _counted(self, name: str) -> Tensor:
        held = (s for s in self._segments if name in s.tensors)
        return stacks.joined([segment.tensors[name] + segment.first for segment in held])


@dataclass(frozen=True)
class SavedModel:
    """A saved model as it lies in its folder: description, segments, and the experts that are left.

    `left` are indices into the description's experts, in order.
    """

    info: dict[str, Any]
    segments: tuple[Segment, ...]
    left: tuple[int, ...]

    @property
    def base(self) -> BaseReference:
        return base_in(self.info)

    @property
    def routing(self) -> Routing:
        return routing_in(self.info)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [self.info["experts"][z] for z in self.left]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(record["name"] for record in self.records)

    def stack(self, site: str) -> stacks.SiteStack:
        held = self.tensors
        stored = {
            kind: held[f"{kind}.{site}"]
            for kind in stacks.declared().tensors
            if f"{kind}.{site}" in held
        }
        return stacks.SiteStack.of(stored, held[f"experts.{site}"])

    @property
    def tables(self) -> Tables:
        return Tables(self.names, lookup_in(self.tensors), self.info.get("lookup", {}))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Where at least one of them acts."""
        begin = "experts."
        return tuple(n.removeprefix(begin) for n in self.tensors if n.startswith(begin))

    @cached_property
    def tensors(self) -> SavedTensors:
        """All tensors of the experts that are left."""
        return SavedTensors(self.segments, self.left)


def read_saved(directory: Path) -> SavedModel:
    """The saved model in `directory`, every file checked: its hash, finiteness, and each tensor.

    Tensors are checked against the description and each other (`checks`), without a base. Raises
    RoutingError when anything is missing or damaged, ConfigError for a router or kernel that
    isn't known.
    """
    return described_by(read_description(directory / ROUTED_INFO), directory)


def described_by(info: dict[str, Any], directory: Path) -> SavedModel:
    """The model that `info` says the files in `directory` are. Raises as `read_saved` does."""
    path = directory / ROUTED_INFO
    router = router_of(routing_in(info))
    count = len(info["experts"])
    try:
        entries = _entries(info, count)
    except (ValueError, KeyError, TypeError) as error:
        raise RoutingError(
            f"{path} is not a valid description of a routed model: {one_line(error)}."
        ) from error
    gone = removed_in(info)
    left = tuple(z for z in range(count) if z not in gone)
    names = dict.fromkeys((entry.file, entry.sha256) for entry in entries)
    files = {name: _read_weights(directory / name[0], name[1]) for name in names}
    segments, first, sizes = [], 0, _Sizes({}, {})
    for entry in entries:
        file = files[entry.file, entry.sha256]
        sizes = _checked(file, entry.experts, sizes, router)
        segments.append(Segment(file, first, entry.experts))
        first += entry.experts
    return SavedModel(info, tuple(segments), left)


class _Entry(NamedTuple):
    """A file of a saved model as its description names it."""

    file: str
    sha256: str
    experts: int


def _entries(info: Mapping[str, Any], count: int) -> list[_Entry]:
    """The files of a model of `count` experts. Raises ValueError, KeyError or TypeError."""
    if not in_segments(info):
        entries = [_Entry(ROUTED_WEIGHTS, info["weights_sha256"], count)]
    else:
        entries = [_Entry(e["file"], e["sha256"], e["experts"]) for e in info["segments"]]
    for entry in entries:
        named = SEGMENT_FILE.fullmatch(entry.file) and isinstance(entry.sha256, str)
        if not named or type(entry.experts) is not int or entry.experts < 1:
            raise ValueError(f"segment {shortened(tuple(entry))}")
    held = sum(entry.experts for entry in entries)
    if held != count:
        raise ValueError(f"{held} experts in segments, {count} described")
    return entries


def _read_weights(path: Path, sha256: str) -> TensorFile:
    try:
        tensors = TensorFile(path)
        # Both looks at once, while the file's pages are in memory.
        _, found = prefetch(lambda look: look(), (tensors.check_finite, tensors.sha256))
    except ExpertError as error:
        raise RoutingError(str(error)) from error
    if found != sha256:
        raise RoutingError(f"{path} was changed after it was written.")
    return tensors


class _Sizes(NamedTuple):
    """The sizes that segments have in common, by letter: those of each site, and of a lookup."""

    sites: dict[str, dict[str, int]]
    lookup: dict[str, int]


def _checked(file: TensorFile, experts: int, known: _Sizes, router: Router) -> _Sizes:
    """`known` and what `file`, a segment of that many experts, adds to it. Raises RoutingError."""
    by_site: dict[str, dict[str, Tensor]] = {}
    known_names = {*tensors_of_sites(), *router.form}
    prompt_form = router.prompt_form if isinstance(router, ByPrompt) else {}
    lookup = {}
    for name in file:
        kind, _, site = name.partition(".")
        if kind == "lookup" and site in prompt_form:
            lookup[site] = file[name]
            continue
        if kind not in known_names or not site:
            raise RoutingError(
                f"{file.path} holds {shortened(name, 200)}, which is no part of a routed model."
            )
        by_site.setdefault(site, {})[kind] = file[name]
    sites = dict(known.sites)
    for site, held in by_site.items():
        sites[site] = check_tensors(
            f"{file.path}, {site}", held, experts, sites.get(site, {}), router.form
        )
    if not prompt_form:
        return _Sizes(sites, known.lookup)
    found = check_lookup(str(file.path), lookup, experts, known.lookup, prompt_form)
    return _Sizes(sites, found)


def quantised(kind: str, site: str, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stack of factors [E, r, ..] in int8, and the scales of its rows [E, r], as named."""
    numbers = factor.float()
    scale = numbers.abs().amax(dim=-1) / LARGEST
    # A row of zeros has the scale 0.
    whole = (numbers / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    yield f"{kind}.{site}", whole.clamp(-LARGEST, LARGEST).to(torch.int8)
    yield f"{kind}{SCALE}.{site}", scale


def dequantised(file: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of this name: as it is stored, or in float32 if it was in int8."""
    tensor = file[name]
    if tensor.dtype != torch.int8:
        return tensor
    kind, _, site = name.partition(".")
    return tensor.float() * file[f"{kind}{SCALE}.{site}"][..., None]
