"""The command of operators: serve."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from ...config import Recipe, Routing, Serving, settings_of
from .experts import BaseOption, DtypeOption
from .flags import with_settings
from .routed import KeepOption, LeaveOutOption, ScoresOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the operators' command to `app`."""
    app.command("serve", help="Serve routed models over HTTP, as OpenAI's interface does.")(serve)


@with_settings(Routing, Serving)
def serve(
    *,
    model: Annotated[
        list[str],
        typer.Argument(
            help="Routed models' folders, pools (folder, hub:OWNER/NAME or manifest) or base "
            "models, each PLACE or NAME=PLACE; a pool's routing may follow as in "
            "arrow=experts?router=arrow&k=3."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    api_key: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--api-key",
            help="Let in those who have this key only (repeatable). Other processes can see it "
            "here; PHATGOOSE_API_KEYS in the environment, keys separated by commas, hides it.",
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    recipe: Recipe,
    routing: Routing,
    serving: Serving,
    given: frozenset[str],
) -> None:
    """Serve models until SIGTERM or Ctrl-C."""
    from ..server import API_KEYS, create_app, keys_of, run, served_models

    chosen = given & {setting.name for setting in settings_of(Routing)}
    models = served_models(
        model,
        routing=routing if chosen else None,
        keep=tuple(keep) if keep else None,
        leave_out=tuple(leave_out or ()),
        base=base or recipe.base,
        dtype=dtype,
        scores=str(scores) if scores else None,
    )
    keys = (*(api_key or ()), *keys_of(os.environ.get(API_KEYS)))
    app = create_app(models, serving, keys)
    names = ", ".join(each.name for each in models)
    typer.echo(f"serving {names} at http://{host}:{port}", err=True)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        typer.echo("no API key is set: whoever reaches this address may use it", err=True)
    run(app, host, port, serving.shutdown_timeout)
