"""Pools that a gateway takes: of several bases, or names and prompts of what engines have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen
from pydantic import BaseModel, StringConstraints

from ....base.identity import BaseReference, same_base
from ....errors import ConfigError, PoolError
from ....experts.expert import LAYOUT, Expert, ExpertInfo, adapters_in
from ....experts.hub import HubReference
from ....experts.pool import TABLE, Pool
from ....files import read_table, reading
from ....names import check_name
from ....routing.opening import require_pool
from ....tasks.loading import prompts_beside
from ....tasks.task import refuse_twice


@dataclass(frozen=True, eq=False)
class NamedExpert(Expert):
    """An expert of which a name and prompts are known, and neither the adapter nor its base."""

    brought: tuple[str, ...] = ()

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        return self.brought


class _Row(BaseModel, extra="forbid", strict=True):
    prompts: Annotated[list[Annotated[str, StringConstraints(pattern=r"\S")]], MinLen(1)]


class _Table(BaseModel, extra="forbid"):
    experts: Annotated[dict[str, _Row], MinLen(1)]


def open_pool(place: str) -> Pool:
    """The pool at `place`, whose experts may be of several bases.

    A folder without adapters, of folders with `prompts.txt`, is a pool of NamedExperts, and so is a
    TOML file (`[experts.NAME]` with `prompts`). Raises ConfigError for what is no pool, PoolError
    for a wrong TOML file, and what opening a pool raises.
    """
    require_pool(place)
    path = Path(place)
    if path.suffix == TABLE:
        what = "Pool"
        table = read_table(path, what, PoolError)
        with reading(f"{what} {path}", PoolError):
            rows = _Table.model_validate(table).experts
        return _named(path, {name: row.prompts for name, row in rows.items()})
    if HubReference.is_one(place) or adapters_in(path):
        return Pool.open(place, one_base=False)
    folders = [file.parent for file in sorted(path.glob(f"*/{LAYOUT.prompts}"))]
    prompts = {folder.name: prompts_beside(folder) for folder in folders}
    return _named(path, prompts) if prompts else Pool.open(place)


def _named(place: Path, prompts: Mapping[str, Sequence[str]]) -> Pool:
    experts = []
    for name, texts in prompts.items():
        check_name(name)
        info = ExpertInfo(name, BaseReference(""), "")
        experts.append(NamedExpert(info, place, {}, {}, {}, brought=tuple(texts)))
    return Pool(tuple(experts))


def bases_of(experts: Sequence[Expert]) -> dict[BaseReference, str]:
    """The name of each expert's base: one for all that are the same, "" where it isn't known.

    Raises ConfigError for one name of two bases, which an engine's name can't tell apart.
    """
    recorded = {expert.info.base for expert in experts}
    references = sorted(recorded, key=lambda base: base.fingerprint is None)
    distinct = list[BaseReference]()
    names = {}
    for base in references:
        same = next((other for other in distinct if same_base(base, other)), base)
        if same is base:
            distinct.append(base)
        names[base] = same.id
    ids = [base.id for base in distinct]
    refuse_twice("bases", ids, ConfigError, "their fingerprints differ, so serve one's experts")
    return names
