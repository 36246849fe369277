"""What is loaded in this process, by name and place, so that another one can load the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .bases import SMOLLM2, Base, BaseReference, load_base
from .errors import WrongBaseError
from .hub import HubReference

__all__ = ["BasePlace", "absolute"]


def absolute(place: str | Path) -> str:
    """`place` as it is found from any working directory: ids and references stay as they are."""
    is_name = HubReference.is_one(place) or str(place) == SMOLLM2
    return str(place) if is_name or not Path(place).exists() else str(Path(place).resolve())


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
