"""Commands that change a routed model's folder: add, remove, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..console.printing import say

if TYPE_CHECKING:
    from ...routing.saved.tensors import SavedModel

__all__ = ["StoredOption", "register"]

StoredOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--stored",
        help="Type of the experts' factors in the file: float32, bfloat16, float16 or int8; "
        "default: the type that they are computed in.",
    ),
]
ModelArgument = Annotated[Path, typer.Argument(help="A routed model's folder.")]


def register(app: typer.Typer) -> None:
    """Add the commands that change a routed model's folder to `app`."""
    app.command("add", help="Add experts to a routed model's folder.")(add)
    app.command("remove", help="Remove experts from a routed model's folder.")(remove)
    app.command("compact", help="Write a routed model's folder anew, without what was removed.")(
        compact
    )


def add(
    model: ModelArgument,
    places: Annotated[
        list[Path], typer.Argument(help="Folders of experts, hub:OWNER/NAME, or a manifest.")
    ],
) -> None:
    """Add experts: one more file, of these experts only."""
    from ...experts.pool import Pool
    from ...routing.saved.segments import add_to_saved

    pool = Pool.open(places[0] if len(places) == 1 else places)
    _tell(add_to_saved(model, pool), model)


def remove(
    model: ModelArgument,
    names: Annotated[list[str], typer.Argument(help="The experts' names.")],
) -> None:
    """Remove experts: from the description; compact takes them out of the files."""
    from ...routing.saved.segments import remove_from_saved

    _tell(remove_from_saved(model, names), model)


def compact(model: ModelArgument, stored: StoredOption = None) -> None:
    """Write the experts that are left into one file, in another type if told."""
    from ...routing.saved.segments import compact as rewrite

    _tell(rewrite(model, stored=stored), model)


def _tell(packed: SavedModel, model: Path) -> None:
    files = len(packed.segments)
    say(
        f"{len(packed.names)} experts at {len(packed.sites)} sites in {files} "
        f"{'file' if files == 1 else 'files'} -> {model}"
    )
