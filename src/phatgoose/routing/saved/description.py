"""routed.json: the description of a saved routed model, read strictly, as from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...base.fingerprint import BaseReference
from ...config import Routing
from ...errors import ConfigError, ExpertError, RoutingError
from ...experts.expert_info import check_name
from ...files.quoting import one_line, shortened
from ...files.strict_json import read_json_object

__all__ = ["HASHES", "ROUTED_INFO", "ROUTED_WEIGHTS", "base_in", "read_description", "routing_in"]
__all__ += ["removed_in", "routing_record"]

ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"
VERSIONS = (1, 2)  # 2 has segments
NAMED_ANEW = "retrieval_embedder"  # by the user who loads the model: a file can't have one loaded
HASHES = ("adapter_sha256", "vectors_sha256", "embeddings_sha256")  # in an expert's record


def read_description(path: Path) -> dict[str, Any]:
    """The description in the file `path`, of which every value is what docs/format.md says.

    What it says of files is left to who reads them. Raises RoutingError when it is missing or
    anything is wrong.
    """
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
    missing |= {"weights_sha256" if version == 1 else "segments"} - info.keys()
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
    """The base that a description names. Raises TypeError or ValueError when it names none."""
    base = BaseReference(**info["base"])
    for key, value in vars(base).items():
        absent = value is None and key != "id"
        if not absent and not (isinstance(value, str) and value.isprintable()):
            raise ValueError(f"base.{key} is {shortened(value)}")
    return base


def removed_in(info: Mapping[str, Any]) -> frozenset[int]:
    """The indices of the experts that a description leaves out.

    Raises TypeError or ValueError when they are none, or no expert is left.
    """
    removed, count = info.get("removed", []), len(info["experts"])
    gone = frozenset(removed)
    are_indices = all(type(z) is int and 0 <= z < count for z in gone)
    if not isinstance(removed, list) or len(gone) < len(removed) or not are_indices:
        raise ValueError(f"removed is {shortened(removed)}")
    if len(gone) == count:
        raise ValueError("no expert is left")
    return gone


def routing_in(info: Mapping[str, Any]) -> Routing:
    """The settings in a description. Raises TypeError or ConfigError when they are none."""
    return Routing(**{**info["routing"], NAMED_ANEW: None})


def routing_record(routing: Routing) -> dict[str, Any]:
    """What a description says of `routing`: all but the embedder."""
    return {key: value for key, value in asdict(routing).items() if key != NAMED_ANEW}


def _check_experts(info: Mapping[str, Any]) -> None:
    """Raise TypeError, ValueError or ExpertError unless `info` has records of experts.

    Names of those that are left differ; one that was removed leaves its name to another. Paths may
    be anything that a file system allows.
    """
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
        for key in ("path", *HASHES):
            if not isinstance(record.get(key), str | None):
                raise ValueError(f"{key} of expert {name} is {shortened(record[key])}")


def _check_lookup(lookup: Any, experts: int) -> None:
    """Raise ValueError unless `lookup` is what a looked-up router keeps beside its tensors."""
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
