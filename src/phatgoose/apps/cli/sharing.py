"""Commands of sharing: import, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...config import KIND_NAMES
from ..console.printing import say
from .options import BaseOption, ExpertName, ExpertOut

if TYPE_CHECKING:
    from ...experts.expert import Expert

__all__ = ["import_command", "pull", "push"]


def import_command(
    source: Annotated[
        str, typer.Argument(help="Folder of the adapter, or its Hub id (OWNER/NAME@REVISION).")
    ],
    out: ExpertOut,
    base: BaseOption = None,
    name: ExpertName = None,
    allow_loss: Annotated[
        float | None,
        "Approximate adapters that are no LoRA (LoHa, LoKr, …) by one that may lose this "
        "share of each update, such as 0.01.",
    ] = None,
    fingerprint: Annotated[
        bool,
        "Load the base's weights and record their fingerprint: you vouch that the adapter "
        "was trained on them.",
    ] = False,
) -> None:
    """Make an expert, without gates yet, of a LoRA, (IA)³ or bottleneck adapter."""
    from ...experts.importing.adapter import import_adapter

    expert = import_adapter(
        source, out, base=base, name=name, allow_loss=allow_loss, fingerprint=fingerprint
    )
    say(f"{_imported(expert)} -> {out}")
    without = ", or --router arrow without" if expert.lora else ""
    say(f"gates: 'phatgoose gate {out} --task ITS-DATA --out …'{without}")


def _imported(expert: Expert) -> str:
    """The result of an import, on one line."""
    text = f"{expert.name}: {len(expert.modules)} sites, {KIND_NAMES[expert.kind]}"
    sizes = sorted({module.size for module in expert.modules.values() if module.size is not None})
    if sizes:
        text += f" of rank {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
    record = expert.info.hyperparameters
    if "converted_from" not in record:
        return text
    return (
        f"{text}; approximates {record['converted_from']}, keeping {record['kept_of_update']:.4%} "
        f"of its update, {record['kept_at_worst_site']:.4%} at the worst site"
    )


def push(
    expert: Annotated[Path, typer.Argument(help="The expert directory.")],
    reference: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; /FOLDER inside it and @BRANCH if wanted.")
    ],
    private: Annotated[bool, "Make the repository private if it is new."] = False,
    message: Annotated[str | None, "The commit's message."] = None,
) -> None:
    """Publish an expert on the Hub, as one commit.

    The token is huggingface_hub's (HF_TOKEN or 'hf auth login').
    """
    from ...experts.hub import push as publish

    say(f"{expert} -> {publish(expert, reference, private=private, message=message)}")


def pull(
    reference: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub, with /FOLDER and @REVISION if wanted.")
    ],
    out: ExpertOut,
) -> None:
    """Fetch an expert from the Hub."""
    from ...experts.hub import pull as fetch

    expert = fetch(reference, out)
    say(f"{expert.name}: {len(expert.modules)} sites -> {out}")
