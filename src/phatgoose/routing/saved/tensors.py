"""What a saved routed model holds, read strictly: its description, routed.json, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base import BaseReference
from ...config import Routing
from ...errors import ConfigError, ExpertError, RoutingError
from ...experts.expert import check_name
from ...experts.hub import HubReference
from ...files import Group, TensorFile, one_line, prefetch, read_json_object, shortened
from ...passes import ActsOn
from ..checks import check_lookup, check_tensors, tensors_of_sites
from ..routers.prompt_router import ByPrompt, Tables
from ..routers.registry import choice_of
from ..routers.router import Router, router_of
from ..stacks import SitePart, SiteStack, declared

ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"
FORMAT_VERSION = 1
HASHES = ("adapter_sha256", "vectors_sha256", "embeddings_sha256")  # in an expert's record


def shareable(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`records` with the last name alone in place of a path on this machine."""
    return [
        {**each, "path": path if HubReference.is_one(path) else Path(path).name}
        for each, path in ((each, each.get("path") or "") for each in records)
    ]


def read_description(path: Path) -> dict[str, Any]:
    """The description in the file `path`, as docs/format.md has it; else RoutingError."""
    try:
        info = read_json_object(path, RoutingError)
    except FileNotFoundError as error:
        raise RoutingError(
            f"{path.parent} holds no routed model: {path.name} can't be read."
        ) from error
    version = info.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise RoutingError(
            f"{path}: format version {shortened(version)} is unknown, wanted {FORMAT_VERSION}."
        )
    if missing := {"base", "routing", "experts", "weights_sha256"} - info.keys():
        raise RoutingError(f"{path} lacks {', '.join(sorted(missing))}.")
    try:
        _check_experts(info["experts"])
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


def routing_in(info: Mapping[str, Any]) -> Routing:
    """The routing that `info` names. Raises as `base_in`, and ConfigError."""
    if not isinstance(info["routing"], dict):
        raise TypeError(f"routing is {shortened(info['routing'])}")
    routing = Routing(**info["routing"])
    choice_of(routing.router)
    return routing


def routing_record(routing: Routing) -> dict[str, Any]:
    return {"router": routing.router, "k": routing.k, "kernel": routing.kernel}


def _check_experts(records: Any) -> None:
    if not isinstance(records, list) or not records:
        raise ValueError(f"experts is {shortened(records)}, not a list of some")
    names = set()
    for record in records:
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(name, str) or name in names:
            raise ValueError(f"expert {shortened(record)} has no name of its own")
        check_name(name)
        names.add(name)
        ActsOn.of(record.get("acts_on"))
        for key in ("path", "measured_in", *HASHES):
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


@dataclass(frozen=True)
class SavedModel:
    """A saved model as it lies in its folder: description, and tensors as views of their file.

    `sizes` are those of each site, by letter ("n" and "d" are its inputs and outputs).
    """

    info: dict[str, Any]
    tensors: TensorFile
    sizes: Mapping[str, Mapping[str, int]]

    @property
    def base(self) -> BaseReference:
        return base_in(self.info)

    @property
    def routing(self) -> Routing:
        return routing_in(self.info)

    @cached_property
    def router(self) -> Router:
        return router_of(self.routing)

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self.info["experts"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(record["name"] for record in self.records)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where at least one of them acts."""
        return tuple(self.sizes)

    def at(self, site: str) -> SitePart:
        """The experts at `site`, and their router's tensors there."""
        form = self.router.form
        stored = {name: f"{name}.{site}" for name in ("experts", *declared().tensors, *form)}
        held = {name: self.tensors[full] for name, full in stored.items() if full in self.tensors}
        state = {name: held[name] for name in form if name in held}
        return SitePart(SiteStack.of(held, held["experts"]), state)

    @property
    def tables(self) -> Tables:
        return Tables(self.names, Group(self.tensors, "lookup"), self.info.get("lookup", {}))


def read_saved(directory: Path) -> SavedModel:
    """The saved model in `directory`, every file checked: its hash, finiteness, and each tensor.

    Tensors are checked against the description and each other (`checks`), without a base. Raises
    RoutingError when anything is missing or damaged, ConfigError for a router or kernel that
    isn't known.
    """
    info = read_description(directory / ROUTED_INFO)
    path = directory / ROUTED_WEIGHTS
    try:
        tensors = TensorFile(path)
        # Both looks at once, while the file's pages are in memory.
        _, sha256 = prefetch(lambda look: look(), (tensors.check_finite, tensors.sha256))
    except ExpertError as error:
        raise RoutingError(str(error)) from error
    if sha256 != info["weights_sha256"]:
        raise RoutingError(f"{path} was changed after it was written.")
    router = router_of(routing_in(info))
    return SavedModel(info, tensors, _checked(tensors, len(info["experts"]), router))


def _checked(file: TensorFile, experts: int, router: Router) -> dict[str, dict[str, int]]:
    """The sizes of each site's tensors, by letter, of that many experts. Raises RoutingError."""
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
    if prompt_form:
        check_lookup(str(file.path), lookup, experts, prompt_form)
    return {
        site: check_tensors(f"{file.path}, {site}", held, experts, {}, router.form)
        for site, held in by_site.items()
    }
