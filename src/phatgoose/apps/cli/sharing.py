"""Commands of sharing: import, push, pull, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...config import Formatting, Routing, settings_of
from ...errors import ConfigError, ExpertError, RoutingError
from ...experts import kinds
from ...files import require_free
from ..console import say
from . import options

if TYPE_CHECKING:
    from ...experts.expert import Expert
    from ...experts.importing import Imports
    from ...routing.export import Export, Texts


def import_command(
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
    by_path: Annotated[
        bool, "Record the base by its path, if it has no Hub id; only this machine finds it."
    ] = False,
    name: options.ExpertName = None,
    allow_loss: Annotated[
        float | None,
        "Approximate adapters of other types (LoHa, LoKr, …) by a LoRA that may lose this "
        "share of each update, such as 0.01.",
    ] = None,
    fingerprint: Annotated[
        bool | None,
        typer.Option(
            "--fingerprint/--no-fingerprint",
            help="Record the fingerprint of the base's weights, and load them if needed; "
            "default: only if they are on this machine.",
        ),
    ] = None,
) -> None:
    """Make experts, without gates yet, of LoRAs, DoRAs, (IA)³ or bottleneck adapters.

    Of several, those that can't be routed are listed with the reason, and the exit code is 1; the
    others are imported.
    """
    how: dict[str, Any] = {"base": base, "base_id": base_id, "by_path": by_path}
    how |= {"allow_loss": allow_loss, "fingerprint": fingerprint}
    imports = _imports(source, out, name, how)
    for expert in imports.experts:
        say(f"{_imported(expert)} -> {expert.directory}")
    for each, why in imports.refused.items():
        say(f"refused: {why if each in why else f'{each}: {why}'}", err=True)
    if imports.experts:
        say(_next_steps(imports.experts, out))
    if imports.refused:
        raise typer.Exit(1)


def _imports(source: list[str], out: Path, name: str | None, how: dict[str, Any]) -> Imports:
    """What comes of the adapters, or folders of adapters; one alone is an error if refused."""
    from ...experts import importing

    inside = [(each, importing.adapters_in(Path(each))) for each in source]
    if len(inside) == 1 and inside[0][1] in ([], [Path(source[0])]):
        require_free(out, ExpertError, options.ANOTHER_OUT)
        return importing.Imports((importing.import_adapter(source[0], out, name=name, **how),), {})
    if name is not None:
        raise ConfigError("--name is for one adapter; several are named after their folders.")
    every = [place for each, found in inside for place in list(map(str, found)) or [each]]
    return importing.import_adapters(every, out, **how)


def _next_steps(made: Sequence[Expert], out: Path) -> str:
    unmarked = next((e.info.base.id for e in made if not e.info.base.fingerprint), None)
    told = (
        ""
        if unmarked is None
        else (
            f"no fingerprint: the weights of {unmarked} are not here; --fingerprint fetches them\n"
        )
    )
    if all(expert.lora for expert in made):
        return f"{told}next: 'phatgoose serve {out}', or 'phatgoose stats EXPERT --task ITS-DATA'"
    return f"{told}next: 'phatgoose gate EXPERT --task ITS-DATA --out …'"


def _imported(expert: Expert) -> str:
    text = f"{expert.name}: {len(expert.modules)} sites, {kinds()[expert.kind].label}"
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

    pushed = publish(expert, reference, private=private, message=message)
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
        int | None, "Cut an adapter to this rank, by SVD; default: all of it.", {"min": 1}
    ] = None,
    prompt: Annotated[
        list[str] | None,
        "Fix the mixture that the router chooses for this text (repeatable: their mean).",
    ] = None,
    task: Annotated[
        str | None, "Fix the mean of the mixtures for the inputs of a file or hub:DATASET."
    ] = None,
    limit: Annotated[
        int | None, "Maximum inputs of --task, drawn by --seed; default: 100.", {"min": 1}
    ] = None,
    seed: Annotated[int | None, "Seed of the draw; default: 0."] = None,
    engine: Annotated[
        str | None,
        "Write a folder that starts this engine with all experts of a pool, and the gateway that "
        "chooses among them: vllm or llama.cpp.",
    ] = None,
    template: options.TemplateOptions,
    opening: options.ModelOptions,
    routing: Routing,
    formatting: Formatting,
    given: frozenset[str],
) -> None:
    """Write a model with constant routing as a PEFT adapter or a plain model.

    Any program that reads these can use it (docs/export.md). Routers merged, single and
    best-individual are constant; for others, --prompt or --task fixes a mixture. With --engine it
    hands a whole pool over to an engine instead: docs/engines.md.
    """
    require_free(out, RoutingError, options.ANOTHER_OUT)
    if engine is not None:
        others: dict[str, Any] = {"merged": merged, "rank": rank, "prompt": prompt, "task": task}
        others |= {"limit": limit, "scores": opening.scores, **dict.fromkeys(given, True)}
        _hand_over(model, engine, out, opening, others)
        return
    if prompt and task:
        raise ConfigError(
            "A mixture is fixed for prompts or for a task: give one of --prompt and --task."
        )
    options.only_with("--task", task is not None, {"limit": limit, "seed": seed, **vars(template)})
    form = dict.fromkeys(given & {setting.name for setting in settings_of(Formatting)}, True)
    options.only_with("--prompt or --task", bool(prompt or task), form)
    texts = _texts(prompt, task, limit or 100, seed or 0, template, formatting)
    from ...routing.export import export as run

    # With a kernel named, every expert's factors stay.
    opened = opening.open(model, replace(routing, kernel="concat"), given).model
    result = run(opened, out, texts=texts, merged=merged, rank=rank)
    for line in _told(result):
        say(line)


def _hand_over(
    model: str, engine: str, out: Path, opening: options.ModelOptions, others: Mapping[str, object]
) -> None:
    """Write a folder that starts `engine`; ConfigError for any of the `others`, by name."""
    if odd := [options.flag_of(name) for name, value in others.items() if value]:
        raise ConfigError(f"--engine hands over experts as they are; leave out {odd[0]}.")
    from ...experts.pool import Pool
    from ...routing.compose import require_pool
    from ..deploy import deploy

    require_pool(model)
    pool = Pool.open(model).select(opening.keep, opening.leave_out)
    done = deploy(pool, engine, out, opening.base)
    say(f"{len(done.experts)} experts of rank {done.rank} or less for {engine} -> {out}")
    if done.note:
        say(f"note: {done.note}")


def _texts(
    prompt: list[str] | None,
    task: str | None,
    limit: int,
    seed: int,
    template: options.TemplateOptions,
    formatting: Formatting,
) -> Texts | None:
    from ...routing.export import Texts, prompt_texts
    from ..generation import check_text

    for each in prompt or ():
        check_text(each, "The prompt")  # `prompt_texts` refuses an empty one
    if prompt:
        return prompt_texts(prompt, formatting)
    if task is None:
        return None
    loaded = template.load(task)
    return Texts(loaded.name, loaded.evaluation_examples(limit, seed), formatting)


def _told(result: Export) -> list[str]:
    from ...routing.export import EXPORT_INFO

    shares = sorted(result.shares.whole().items(), key=lambda pair: -pair[1])
    mixture = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares if share)
    sites = len(result.losses) or len(result.shares.by_site)
    form = "merged model" if result.merged else f"PEFT LoRA of rank {result.rank}"
    lines = [f"{form}, {sites} sites: {mixture} -> {result.folder}"]
    worst = max(result.losses.items(), key=lambda pair: pair[1].lost, default=None)
    if worst is not None and worst[1].lost:
        site, loss = worst
        lines.append(
            f"lost by the cut (Frobenius norm): {result.lost:.2%} of all updates; most at {site}, "
            f"{loss.lost:.4g} of {loss.norm:.4g}; every site in {EXPORT_INFO}"
        )
    near = result.fidelity
    if near is not None:
        lines.append(
            f"beside the routed model, {near.tokens} tokens of {near.texts}: logits differ by "
            f"{near.difference:.3g} in the mean, the greedy token is the same after "
            f"{near.agreement:.1%}"
        )
    return lines
