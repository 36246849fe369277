"""Commands that change a routed model's folder: add, remove, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console.printing import say
from .options import PoolArgument, StoredOption, open_pool

if TYPE_CHECKING:
    from ...routing.saved.tensors import SavedModel

__all__ = ["add", "compact", "remove"]

FolderArgument = Annotated[Path, typer.Argument(help="A routed model's folder.")]


def add(model: FolderArgument, places: PoolArgument) -> None:
    """Add experts to a routed model's folder."""
    from ...routing.saved.segments import add_to_saved

    _tell(add_to_saved(model, open_pool(places)), model)


def remove(
    model: FolderArgument, names: Annotated[list[str], typer.Argument(help="The experts' names.")]
) -> None:
    """Remove experts from a routed model's folder.

    They stay in its files until it is compacted.
    """
    from ...routing.saved.segments import remove_from_saved

    _tell(remove_from_saved(model, names), model)


def compact(model: FolderArgument, stored: StoredOption = None) -> None:
    """Write a routed model's folder anew, without what was removed."""
    from ...routing.saved.segments import compact as rewrite

    _tell(rewrite(model, stored=stored), model)


def _tell(packed: SavedModel, model: Path) -> None:
    files = len(packed.segments)
    say(
        f"{len(packed.names)} experts at {len(packed.sites)} sites in {files} "
        f"{'file' if files == 1 else 'files'} -> {model}"
    )
