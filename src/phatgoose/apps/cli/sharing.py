"""Commands of sharing: import, push, pull, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config import Routing
from ...errors import ExpertError, RoutingError
from ...experts import kinds
from ...files import require_free
from ..console import say
from . import options

if TYPE_CHECKING:
    from ...experts.expert import Expert
    from ...routing.export import Export


def import_(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Folders of adapters, a folder that holds some, or Hub ids (OWNER/NAME@REVISION)."
        ),
    ],
    out: Annotated[
        Path, "The expert directory to write; of several adapters, the folder that receives them."
    ],
    base: options.BaseOption = None,
    base_id: Annotated[
        str | None, "The base's Hub id, if its folder's path doesn't contain it."
    ] = None,
    allow_loss: Annotated[
        float | None,
        "Approximate adapters of other types (LoHa, LoKr, …) by a LoRA that may lose this "
        "share of each update, such as 0.01.",
    ] = None,
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

    how: dict[str, Any] = {"base": base, "base_id": base_id}
    how |= {"allow_loss": allow_loss, "fingerprint": fingerprint or None}
    inside = [(each, importing.adapters_in(Path(each))) for each in source]
    if len(inside) == 1 and inside[0][1] in ([], [Path(source[0])]):
        require_free(out, ExpertError, options.ANOTHER_OUT)
        imports = importing.Imports((importing.import_adapter(source[0], out, **how),), {})
    else:
        places = [place for each, some in inside for place in list(map(str, some)) or [each]]
        imports = importing.import_adapters(places, out, **how)
    for expert in imports.experts:
        say(f"{_imported(expert)} -> {expert.directory}")
    for each, why in imports.refused.items():
        say(f"refused: {why if each in why else f'{each}: {why}'}", err=True)
    bases = [expert.info.base for expert in imports.experts]
    if unmarked := next((base.id for base in bases if not base.fingerprint), None):
        say(f"no fingerprint: {unmarked} is not here; --fingerprint fetches it")
    prompts = [max(each.info.prompts_read or 0, len(each.prompts)) for each in imports.experts]
    is_enough = min(prompts, default=0) >= FEW
    more = "" if is_enough else "'phatgoose stats EXPERT --prompts …' (three at least), or "
    say(f"next: {more}'phatgoose serve {out}'")
    return int(bool(imports.refused))


def _imported(expert: Expert) -> str:
    text = f"{expert.name}: {len(expert.modules)} sites, {kinds()[expert.kind].label}"
    sizes = sorted({module.size for module in expert.modules.values() if module.size is not None})
    if sizes:
        text += f" of rank {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
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
    routing = dict(vars(opening.routing).items() - vars(Routing()).items())
    dtype = None if opening.dtype == options.BaseOptions.dtype else opening.dtype
    for_one = {"merged": merged or None, "rank": rank, "scores": opening.scores, "dtype": dtype}
    options.only_with("without --engine", engine is None, {**for_one, **routing})
    if engine is not None:
        from ...routing.opening import require_pool
        from ..deploy import deploy

        require_pool(model)
        done = deploy(opening.open_pool([Path(model)]), engine, out, opening.base)
        say(f"{len(done.experts)} experts of rank {done.rank} or less for {engine} -> {out}")
        return
    from ...routing.export import export as run

    opened = opening.open(model, keeps_factors=True).model
    for line in _told(run(opened, out, merged=merged, rank=rank)):
        say(line)


def _told(result: Export) -> list[str]:
    from ...routing.export import EXPORT_INFO

    shares = sorted(result.mixture.items(), key=lambda pair: -pair[1])
    mixture = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares if share)
    form = "merged model" if result.merged else f"PEFT LoRA of rank {result.rank}"
    lines = [f"{form}, {len(result.shares)} sites: {mixture} -> {result.folder}"]
    if result.lost:
        lines.append(
            f"lost by the cut (Frobenius norm): {result.lost:.2%} of all updates; every site in "
            f"{EXPORT_INFO}"
        )
    return lines
