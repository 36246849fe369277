"""Commands of sharing: import, push, pull, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config import READER, Settings
from ...errors import ExpertError, RoutingError
from ...experts import kinds
from ...files import require_free
from ..console import say
from . import options

if TYPE_CHECKING:
    from ...experts.expert import Expert


BaseId = Annotated[str | None, "The base's Hub id, if its folder's path doesn't contain it."]


@dataclass(frozen=True)
class NamedBase(Settings):
    base: options.BaseOption = None
    base_id: BaseId = None


def import_(
    *,
    source: Annotated[
        list[str],
        typer.Argument(
            help="Folders of adapters, a folder that holds some, or Hub ids (OWNER/NAME@REVISION)."
        ),
    ],
    out: Annotated[
        Path, "The expert directory to write; of several adapters, the folder that receives them."
    ],
    named: NamedBase,
    allow_loss: Annotated[
        float | None,
        "Approximate adapters of other types (LoHa, LoKr, …) by a LoRA that may lose this "
        "share of each update, such as 0.01.",
    ] = None,
    reader: Annotated[str, "Who reads the prompts that adapters bring (see train)."] = READER,
    fingerprint: Annotated[
        bool,
        "Record the fingerprint of the base's weights, and load them if needed; default: only if "
        "they are on this machine.",
    ] = False,
) -> int:
    """Make experts, without gates yet, of LoRAs, DoRAs or (IA)³ adapters of PEFT.

    Of several, those that can't be routed are listed with the reason, and the exit code is 1; the
    others are imported.
    """
    from ...experts import importing
    from ...experts.expert import FEW

    how: dict[str, Any] = {**vars(named), "allow_loss": allow_loss, "reader": reader}
    how["fingerprint"] = fingerprint or None
    places = list[str]()
    for place in source:
        inside = importing.adapters_in(Path(place))
        places += list(map(str, inside)) or [place]
    if len(source) == len(places) == 1 and Path(places[0]) == Path(source[0]):
        require_free(out, ExpertError, options.ANOTHER_OUT)
        imports = importing.Imports((importing.import_adapter(source[0], out, **how),), {})
    else:
        imports = importing.import_adapters(places, out, **how)
    for expert in imports.experts:
        say(f"{_imported(expert)} -> {expert.directory}")
    for place, why in imports.refused.items():
        say(f"refused: {why}" if place in why else f"refused: {place}: {why}", err=True)
    unmarked = [e.info.base.id for e in imports.experts if not e.info.base.fingerprint]
    if unmarked:
        say(f"no fingerprint: {unmarked[0]} is not here; --fingerprint fetches it")
    prompts = [max(e.info.prompts_read or 0, len(e.prompts)) for e in imports.experts]
    if min(prompts, default=0) >= FEW:
        say(f"next: 'phatgoose serve {out}'")
    else:
        more = "'phatgoose stats EXPERT --prompts …' (three at least)"
        say(f"next: {more}, or 'phatgoose serve {out}'")
    return int(bool(imports.refused))


def _imported(expert: Expert) -> str:
    text = f"{expert.name}: {len(expert.modules)} sites, {kinds()[expert.kind].label}"
    sizes = sorted({module.size for module in expert.modules.values() if module.size is not None})
    if sizes:
        text += f" of rank {sizes[0]}"
    if len(sizes) > 1:
        text += f" to {sizes[-1]}"
    record = expert.info.hyperparameters
    if "converted_from" in record:
        text += f"; keeps {record['kept_of_update']:.4%} of its {record['converted_from']} update"
    if expert.info.prompts_read:
        text += f"; statistics of {expert.info.prompts_read} prompts"
    return text


def push(
    expert: Annotated[Path, typer.Argument(help="The expert directory.")],
    reference: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub; /FOLDER inside it and @BRANCH if wanted.")
    ],
    private: Annotated[bool, "Make the repository private if it is new."] = False,
) -> None:
    """Publish an expert on the Hub, as one commit.

    The token is huggingface_hub's (HF_TOKEN or 'hf auth login').
    """
    from ...experts.hub import push as publish

    pushed = publish(expert, reference, private=private)
    say(f"{expert} -> {pushed}")


def pull(
    reference: Annotated[
        str, typer.Argument(help="OWNER/NAME on the Hub, with /FOLDER and @REVISION if wanted.")
    ],
    out: options.ExpertOut,
) -> None:
    """Fetch an expert from the Hub."""
    from ...experts.hub import pull as fetch

    expert = fetch(reference, out)
    say(f"{expert.name}: {len(expert.modules)} sites -> {out}")


def export(
    *,
    model: options.ModelArgument,
    out: Annotated[Path, "Folder of the adapter or the model."],
    merged: Annotated[
        bool, "Write the whole model with the updates in its weights, not an adapter."
    ] = False,
    rank: Annotated[
        int | None, typer.Option(help="Cut an adapter to this rank, by SVD; default: none.", min=1)
    ] = None,
    engine: Annotated[
        str | None,
        "Write a folder that starts this engine with all experts of a pool, and the gateway that "
        "chooses among them: vllm or llama.cpp.",
    ] = None,
    opening: options.ModelOptions,
) -> None:
    """Write a model with constant routing as a PEFT adapter or a plain model.

    Any program that reads these can use it (docs/export.md). Routers merged, single,
    weights and best-individual are constant. With --engine it hands a whole pool over to an engine
    instead: docs/engines.md.
    """
    require_free(out, RoutingError, options.ANOTHER_OUT)
    for_one: dict[str, object] = {"merged": merged or None, "rank": rank}
    for_one |= options.changed(opening, "scores", "dtype")
    for_one |= options.changed(opening.routing, *vars(opening.routing))
    options.only_with("without --engine", engine is None, for_one)
    if engine is not None:
        from ...routing.opening import require_pool
        from ..deploy import deploy

        require_pool(model)
        written = deploy(opening.open_pool([Path(model)]), engine, out, opening.base)
        say(f"{len(written.experts)} experts of rank {written.rank} or less for {engine} -> {out}")
        return
    from ...routing.export import EXPORT_INFO
    from ...routing.export import export as run

    opened = opening.open(model, keeps_factors=True).model
    result = run(opened, out, merged=merged, rank=rank)
    shares = sorted(result.mixture.items(), key=lambda pair: -pair[1])
    mixture = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares if share)
    form = "merged model" if result.merged else f"PEFT LoRA of rank {result.rank}"
    say(f"{form}, {len(result.shares)} sites: {mixture} -> {result.folder}")
    if result.lost:
        say(
            f"lost by the cut (Frobenius norm): {result.lost:.2%} of all updates; every site in "
            f"{EXPORT_INFO}"
        )
