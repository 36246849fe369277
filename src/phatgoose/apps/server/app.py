"""The server's application: its routes, errors, OpenAPI schema and page, and its way to run."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from ... import __version__
from ...analysis.page import EXPLORER_CSS, EXPLORER_JS, asset, render
from ...config import Serving
from ...errors import PhatgooseError
from .guards import OPEN, PATIENCE, AccessControl, Metrics, RequestGuard
from .protocol import REQUESTABLE_ROUTERS, ApiError, Fields, for_clients
from .requests import invalid
from .service import Service
from .settings import ServedModel, Upstream
from .upstream import ChooserBesideEngine, EngineBackend, Links

if TYPE_CHECKING:
    from .local.runner import ModelRunner

FOLDER = Path(__file__).parent
AnyService: TypeAlias = "Service[ModelRunner] | Service[ChooserBesideEngine]"

# The page at / is one self-contained file that asks the API for everything it shows of the models.
CSS = asset("report.css") + asset(EXPLORER_CSS) + asset("page.css", FOLDER)
ROUTERS = f"const ROUTERS = {json.dumps(['', *REQUESTABLE_ROUTERS])};\n"
SCRIPT = asset(EXPLORER_JS) + ROUTERS + asset("page.js", FOLDER)
PAGE = render("page.html.jinja", FOLDER, css=CSS, script=SCRIPT)
# The browser is let run only these scripts and styles, and reach only this server.
SCRIPT_HASH, CSS_HASH = (
    b64encode(sha256(text.encode()).digest()).decode() for text in (SCRIPT, CSS)
)
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{SCRIPT_HASH}'; style-src 'sha256-{CSS_HASH}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

EVENTS = {"schema": {"description": "Server-sent events in OpenAI's form; the last is [DONE]."}}
ANSWERED = {
    "description": "The answer in OpenAI's form, or with stream a chunk in each event.",
    "content": {"text/event-stream": EVENTS},
}


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Every error as the protocol has it."""
    if isinstance(error, ApiError):
        return error.reply
    if isinstance(error, RequestValidationError):
        return invalid(error).reply
    if not isinstance(error, HTTPException):
        message = "The server failed; its log says more."
        if isinstance(error, PhatgooseError):
            message = for_clients(error)
        return ApiError(500, message).reply
    message = str(error.detail)
    if error.status_code == 404:  # of a path
        paths = [route.path for route in request.app.routes if "/v1" in route.path]
        message = f"{message}: there are {', '.join(paths)}; answers aren't kept."
    return ApiError(error.status_code, message, error.headers).reply


async def page() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=HEADERS)


def routes_of(service: AnyService) -> list[tuple[str, Callable[..., object], str, Fields]]:
    """(path, endpoint, summary, options) of each route."""
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    posted = {"methods": ["POST"]}
    answering = {**posted, "responses": {200: ANSWERED}}
    return [
        ("/", page, "A page to try the models on", {"response_class": HTMLResponse}),
        ("/healthz", service.health, "Does the server work?", {}),
        ("/health", service.health, "The same", {"include_in_schema": False}),
        ("/metrics", service.numbers, "Numbers for Prometheus", {"responses": text}),
        ("/v1/models", service.cards, "What is served", {}),
        ("/v1/models/{name:path}", service.card, "One model", {}),
        ("/v1/completions", service.completions, "Continue a text", answering),
        ("/v1/chat/completions", service.chats, "Answer in a conversation", answering),
        ("/v1/route", service.route, "Choose experts for either, and don't answer", posted),
        ("/v1/route/check", service.check, "Check a pool's example prompts", {}),
        ("/v1/route/corrections", service.correct, "Say which expert should have", posted),
        ("/v1/responses", service.responses, "The same in the form of responses", answering),
    ]


def create_app(
    models: Sequence[ServedModel],
    serving: Serving | None = None,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    upstreams: Sequence[Upstream] = (),
) -> FastAPI:
    """The application that serves `models`. They are opened now; the engine runs while it does.

    With `upstreams` it chooses experts for prompts, and the engines there answer.
    Without `api_keys` every client may use it that asks for one of `hosts` or a loopback name
    (`AccessControl`, also for keys that may use some experts only). Raises what opening a model
    does, and ConfigError for a key of experts that no model has.
    """
    limits = serving or Serving()
    metrics = Metrics()
    service: AnyService
    if upstreams:
        links = Links(upstreams, metrics, are_shared=len(api_keys) > 1)
        service = Service(EngineBackend(models, links, limits), metrics)
    else:
        from .local import LocalBackend  # loads transformers
        from .local.runner import load_models

        service = Service(LocalBackend(load_models(models), limits, metrics), metrics)
    access = AccessControl(hosts, api_keys)
    service.check_allowed(access.experts.values())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        tasks = [asyncio.ensure_future(service.check_new())]
        if limits.watch or limits.learn:
            tasks.append(asyncio.ensure_future(service.follow()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await service.close()

    app = FastAPI(
        title="phatgoose",
        version=__version__,
        description="Routed models under OpenAI's protocol; see docs/serving.md.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        # Of others FastAPI would say that they are its own 422.
        responses={"default": {"description": "An error in OpenAI's form."}},
    )
    app.state.service = service
    scheme = HTTPBearer(auto_error=False, description="An API key of this server.")
    for path, endpoint, summary, options in routes_of(service):
        has_key = bool(api_keys) and path not in OPEN
        keyed = [Depends(scheme)] if has_key else []  # for the schema; RequestGuard checks keys
        app.add_api_route(path, endpoint, summary=summary, dependencies=keyed, **options)
    app.add_middleware(RequestGuard, access=access, metrics=metrics)
    for kind in (HTTPException, RequestValidationError, PhatgooseError, Exception):
        app.add_exception_handler(kind, refused)
    return app


# The application under uvicorn, which limits how many connections there are, and how long one may
# idle between two requests. Connections whose clients are late are cut off here.


def run(app: FastAPI, host: str, port: int, limits: Serving) -> None:
    """Serve `app` until SIGTERM or SIGINT, then give running requests some time to finish.

    Must be called in the main thread. Raises EngineError where texts can't be read,
    ConfigError where no engine has an expert's base.
    """
    service = app.state.service
    for process in service.text_processes:  # now, since uvicorn would show a traceback
        process.start()
    if service.backend.upstream:
        asyncio.run(service.backend.links.require_bases())
    # uvicorn raises the signal that ended it again, which would end the process too.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = server_of(app, host, port, limits)
    server.run()
    if not server.started:  # which older uvicorns don't tell by the status
        sys.exit(3)


def leave() -> NoReturn:
    """End the process at once, with 0, after what it has registered for its end.

    Python's own end takes seconds on a busy machine, and one in which a thread still composes a
    changed pool is aborted by C++.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def server_of(
    app: FastAPI, host: str, port: int, limits: Serving, patience: float = PATIENCE
) -> uvicorn.Server:
    """The uvicorn server of `app`, with limits on connections, headers and time.

    It closes connections whose client hasn't sent a request, or read on, for `patience` seconds;
    RequestGuard gives bodies their time.
    """
    looks = dict[Any, tuple[object, float]]()  # what each connection is at, and since when

    async def look() -> None:
        now = time.monotonic()
        before = {**looks}
        looks.clear()
        for connection in list[Any](server.server_state.connections):
            cycle = connection.cycle  # of uvicorn: one request and its answer
            is_idle = cycle is None or cycle.response_complete
            waits = is_idle or connection.flow.write_paused
            state = cycle, waits, connection.transport.get_write_buffer_size()
            last, since = before.get(connection, (None, now))
            if state != last:
                since = now
            looks[connection] = state, since
            if waits and now - since > patience:
                connection.transport.abort()

    config = uvicorn.Config(
        app,
        host,
        port,
        http="h11",  # whatever else is installed: it bounds the headers
        ws="none",
        limit_concurrency=limits.max_connections + 1,  # the one that asks counts too
        timeout_graceful_shutdown=limits.shutdown_timeout,
        callback_notify=look,
        timeout_notify=0,  # every second
        # Only proxies that the operator names may say what a client's address is.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        # What clients send would fill the disk.
        log_level="error",
        server_header=False,
    )
    server = uvicorn.Server(config)
    return server
