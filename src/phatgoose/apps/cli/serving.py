"""The command of operators: serve."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from ...config import Routing, Serving, settings_of
from ..console.printing import say
from .engines import AddressOption, CpusOption, EngineOption, GpusOption, refuse_without_ray
from .experts import BaseOption, DtypeOption
from .flags import with_settings
from .recipe import Recipe
from .routed import KeepOption, LeaveOutOption, ScoresOption

__all__ = ["register"]

ReplicasOption = Annotated[
    Optional[int],  # noqa: UP045  typer reads annotations at run time, on Python 3.10 too
    typer.Option(
        "--replicas", min=1, help="With --engine ray: so many copies of the server (default: 1)."
    ),
]


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
    allow_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--allow-host",
            help="Another name that the server is asked for by, such as a proxy's (repeatable; "
            "'*': any). Without it those of this machine's loopback and --host.",
        ),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    keep: KeepOption = None,
    leave_out: LeaveOutOption = None,
    scores: ScoresOption = None,
    engine: EngineOption = "local",
    replicas: ReplicasOption = None,
    address: AddressOption = None,
    gpus_per_worker: GpusOption = None,
    cpus_per_worker: CpusOption = None,
    recipe: Recipe,
    routing: Routing,
    serving: Serving,
    given: frozenset[str],
) -> None:
    """Serve models until SIGTERM or Ctrl-C."""
    refuse_without_ray(
        engine,
        {
            "replicas": replicas,
            "address": address,
            "gpus-per-worker": gpus_per_worker,
            "cpus-per-worker": cpus_per_worker,
        },
    )
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
    names = ", ".join(each.name for each in models)
    hosts = (host, *(allow_host or ()))
    app = create_app(models, serving, keys, hosts) if engine == "local" else None
    say(f"serving {names} at http://{host}:{port}", err=True)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        say("no API key is set: whoever reaches this address may use it", err=True)
    if app is not None:
        run(app, host, port, serving)
        return
    from ..ray import connected
    from ..ray.replicas import run_replicas

    with connected(address):
        run_replicas(
            models,
            serving,
            keys,
            hosts,
            replicas=replicas or 1,
            host=host,
            port=port,
            gpus_per_replica=gpus_per_worker or 0.0,
            cpus_per_replica=1.0 if cpus_per_worker is None else cpus_per_worker,
        )
