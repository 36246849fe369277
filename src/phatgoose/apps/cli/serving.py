"""The command of operators: serve."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ...config import ROUTING_SETTINGS, Routing, Serving
from ..console import say
from . import options

if TYPE_CHECKING:
    from ..server import ServedModel


def serve(
    *,
    model: Annotated[
        list[str],
        typer.Argument(
            help="Routed models' folders, pools (folder or hub:OWNER/NAME) or base "
            "models, each PLACE or NAME=PLACE; a pool's routing may follow as in "
            "arrow=experts?router=arrow&k=3."
        ),
    ],
    host: Annotated[str, "Address to listen at."] = "127.0.0.1",
    port: Annotated[int, "Port to listen at.", {"min": 1, "max": 65535}] = 8000,
    api_key: Annotated[
        list[str] | None,
        "Require this API key (repeatable). Other processes can see it here, so prefer "
        "PHATGOOSE_API_KEYS in the environment, with keys separated by commas.",
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        "Additional allowed Host header, such as a proxy's name (repeatable; '*': any). "
        "The loopback's names and --host are always allowed.",
    ] = None,
    upstream: Annotated[
        str | None,
        "Address of another engine that answers, vLLM or llama.cpp. This server chooses the pool's "
        "experts for each prompt and forwards it.",
    ] = None,
    upstream_key: Annotated[
        str | None,
        "With --upstream: the engine's key. Other processes can see it here, so prefer "
        "PHATGOOSE_UPSTREAM_KEY in the environment.",
    ] = None,
    opening: options.ModelOptions,
    routing: Routing,
    serving: Serving,
    given: frozenset[str],
) -> None:
    """Serve routed models over HTTP, by OpenAI's protocol, until SIGTERM or Ctrl-C."""
    from ..server import (
        API_KEYS,
        UPSTREAM_KEY,
        Upstream,
        check_address,
        create_app,
        keys_of,
        leave,
        run,
    )

    options.only_with("--upstream", upstream is not None, {"upstream_key": upstream_key})
    key = upstream_key or os.environ.get(UPSTREAM_KEY) or None
    engine = None if upstream is None else Upstream(upstream, key)
    models = _models(model, opening, routing if given & ROUTING_SETTINGS else None)
    keys = keys_of(os.environ.get(API_KEYS), api_key or ())
    names = ", ".join(each.name for each in models)
    hosts = (host, *(allow_host or ()))
    check_address(host, port)
    app = create_app(models, serving, keys, hosts, engine)
    say(f"serving {names} at http://{host}:{port}", err=True)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        say("no API key is set: anyone who can reach this address can use it", err=True)
    run(app, host, port, serving)
    leave()


def _models(
    places: list[str], opening: options.ModelOptions, routing: Routing | None
) -> list[ServedModel]:
    from ..server import served_models

    models = served_models(
        places,
        routing=routing,
        keep=tuple(opening.keep) if opening.keep else None,
        leave_out=tuple(opening.leave_out or ()),
        base=opening.base,
        dtype=opening.dtype,
        scores=str(opening.scores) if opening.scores else None,
    )
    for each in models:
        if each.routing is not None:
            options.warn_of_unused_k(each.routing)
    return models
