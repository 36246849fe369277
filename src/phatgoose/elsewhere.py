"""What is loaded in this process, by name and place, so that another one can load the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .bases import Base, BaseReference, load_base
from .config import Routing
from .errors import PoolError, WrongBaseError
from .expert import Expert
from .hub import HubReference, local_folder
from .methods import Row, pool_row
from .pool import Pool

__all__ = ["BasePlace", "RowPlace", "absolute"]


def absolute(place: str | Path) -> str:
    """`place` as it is found from any working directory: ids and references stay as they are."""
    is_path = not HubReference.is_one(place) and Path(place).exists()
    return str(Path(place).resolve()) if is_path else str(place)


@dataclass(frozen=True)
class BasePlace:
    """Where a base is found, in which dtype, and how it is recognised and recorded."""

    place: str
    dtype: str
    reference: BaseReference

    @classmethod
    def of(cls, base: Base) -> BasePlace:
        """The place of a base that is loaded here."""
        dtype = str(base.model.dtype).removeprefix("torch.")
        return cls(absolute(base.id), dtype, base.reference)

    def load(self) -> Base:
        """The base, under the id it had. Raises WrongBaseError when other weights are there now."""
        base = load_base(self.place, dtype=self.dtype, revision=self.reference.revision)
        if self.reference.fingerprint not in (None, base.fingerprint):
            raise WrongBaseError(
                f"Base model {self.reference.id!r} is another one for this worker: its weights "
                f"differ from those that the work was begun with."
            )
        return replace(base, id=self.reference.id)


@dataclass(frozen=True)
class RowPlace:
    """A comparison's row by the places of its experts; `experts` None: it has no pool."""

    row: Row
    experts: tuple[str, ...] | None

    @classmethod
    def of(cls, row: Row) -> RowPlace:
        """The places of a row that is open here."""
        place = None if row.place is None else absolute(row.place)
        records = None if row.pool is None else row.pool.records()
        experts = None if records is None else tuple(record["path"] for record in records)
        return cls(replace(row, pool=None, place=place), experts)

    def open(self, loaded: dict[str, Expert]) -> Row:
        """The row; experts are taken from `loaded`, by place, and those missing are added to it.

        Raises PoolError when the experts there are not those that the row was made of.
        """
        if self.experts is None:
            return self.row
        for place in self.experts:
            if place not in loaded:
                loaded[place] = Expert.load(local_folder(place))
        pool = Pool(tuple(loaded[place] for place in self.experts))
        row = pool_row(self.row.name, self.row.label, pool, self.row.routing or Routing())
        if row.identity != self.row.identity:
            raise PoolError(
                f"{self.row.label}: the experts that this worker finds at {self.experts[0]} and "
                f"beside it are not those that the comparison was begun with."
            )
        return row

