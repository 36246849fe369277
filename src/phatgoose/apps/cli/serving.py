"""The command of operators: serve."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, field
from typing import Annotated

import typer

from ...config import Serving
from ...errors import ConfigError
from ...routing.routers.registry import check_known
from ..console import say
from . import options

REMEDIES = {
    errno.EADDRINUSE: "end the program that listens there, or give another --port",
    errno.EACCES: "give a --port from 1024 on",
}


@dataclass(frozen=True)
class ServedOptions(options.ModelOptions):
    serving: Serving = field(default_factory=Serving)


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
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    allow_host: Annotated[
        list[str] | None,
        "Additional allowed Host header, such as a proxy's name (repeatable; '*': any). "
        "The loopback's names and --host are always allowed.",
    ] = None,
    upstream: Annotated[
        list[str] | None,
        "Address of another engine that answers, vLLM or llama.cpp (repeatable), or any with "
        "--model-name. This server chooses the pool's experts for each prompt and forwards it. "
        "BASE=ADDRESS says which of several bases it has, if it doesn't itself. The engines' key: "
        "PHATGOOSE_UPSTREAM_KEY in the environment.",
    ] = None,
    model_name: Annotated[
        str | None,
        "What another engine with OpenAI's protocol calls an expert, such as '{base}:{expert}' or "
        "'{expert}'; {base} is the expert's base as the engine names it.",
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The engine's model that is asked for what fits no expert; default: the first "
            "engine's base.",
        ),
    ] = None,
    only_better: Annotated[
        bool,
        "Leave to the base the prompts of experts that record no sure gain over it (phatgoose "
        "stats); by name they still answer.",
    ] = False,
    opening: ServedOptions,
) -> None:
    """Serve routed models over HTTP, by OpenAI's protocol, until SIGTERM or Ctrl-C.

    API keys are in PHATGOOSE_API_KEYS in the environment, separated by commas; KEY=EXPERT+EXPERT
    may use these experts only.
    """
    from ..server import API_KEYS, UPSTREAM_KEY, Upstream, keys_of, served_models

    models = served_models(
        model,
        routing=opening.routing,
        keep=tuple(opening.keep) if opening.keep else None,
        leave_out=tuple(opening.leave_out or ()),
        base=opening.base,
        dtype=opening.dtype,
        scores=str(opening.scores) if opening.scores else None,
        only_better=only_better,
    )
    keys = keys_of(os.environ.get(API_KEYS))
    key = os.environ.get(UPSTREAM_KEY) or None
    if (model_name or default) and not upstream:
        raise ConfigError("--model-name and --default are for an engine: give its --upstream too.")
    if upstream:  # whose engines have the base
        options.only_with("without --upstream", False, options.changed(opening, "base", "dtype"))
    engines = [Upstream.of(written, key, model_name, default) for written in upstream or ()]
    _require_free_port(host, port)
    for served in models:
        check_known(served.routing.router)
        options.warn_of_unused_k(served.routing)
        options.require_there(served.place, served.base)
    from ..server import create_app, leave, run

    app = create_app(models, opening.serving, keys, (host, *(allow_host or ())), engines)
    names = ", ".join(served.name for served in models)
    address = f"[{host}]" if ":" in host else host
    say(f"serving {names} at http://{address}:{port}", err=True)
    if not keys and host not in ("127.0.0.1", "::1", "localhost"):
        say("no API key is set: anyone who can reach this address can use it", err=True)
    run(app, host, port, opening.serving)
    leave()


def _require_free_port(host: str, port: int) -> None:
    """Raise ConfigError where nothing can listen at `host` and `port`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        ways = REMEDIES.get(error.errno or 0, "give another --host")
        raise ConfigError(f"Port {port} of {host} can't be used: {why}; {ways}.") from error
