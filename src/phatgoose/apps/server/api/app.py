"""The FastAPI application and its routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.responses import Response

from .... import __version__
from ....config import Serving
from ..engine.loaded_models import load_models
from ..guards.access_control import AccessControl
from ..guards.request_guard import RequestGuard
from ..metrics import CONTENT_TYPE_LATEST, MetricsMiddleware
from ..settings import ServedModel
from .openapi import body_of, install_errors, responses_of, streamed
from .page import HEADERS, PAGE
from .request_schema import ChatRequest, CompletionRequest
from .response_schema import ChatReply, CompletionReply, Health, ModelCard, ModelList
from .service import Service

__all__ = ["create_app"]


def create_app(
    models: Sequence[ServedModel],
    serving: Serving | None = None,
    api_keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> FastAPI:
    """The application that serves `models`. They are opened now; the engine runs while it does.

    Without `api_keys` everybody may use it who asks for one of `hosts` or a loopback name of this
    machine (`AccessControl`). Raises what opening a model does.
    """
    limits = serving or Serving()
    service = Service(load_models(models), limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title="phatgoose",
        version=__version__,
        description="Routed models under OpenAI's protocol; see docs/serving.md.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(_open_routes(service))
    scheme = HTTPBearer(auto_error=False, description="An API key of this server.")
    keyed = [Depends(scheme)] if api_keys else []  # for the schema; RequestGuard checks keys
    refused = (401, 403) if api_keys else (403,)
    app.include_router(_guarded_routes(service, *refused), dependencies=keyed)
    access = AccessControl(hosts, api_keys)
    app.add_middleware(
        RequestGuard, access=access, most=limits.max_body, seconds=limits.read_timeout
    )
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(MetricsMiddleware, metrics=service.metrics, paths=paths)
    install_errors(app)
    return app


def _open_routes(service: Service) -> APIRouter:
    """Routes without a key: the page and the health check, which say nothing of the models."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, summary="A page to try the models on")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers=HEADERS)

    @router.get(
        "/healthz",
        summary="Does the server work?",
        response_model=Health,
        responses=responses_of(503, model=Health),
    )
    async def health() -> JSONResponse:
        health = service.health()
        return JSONResponse(health.model_dump(), 200 if health.status == "ok" else 503)

    return router


def _guarded_routes(service: Service, *guarded: int) -> APIRouter:
    """Routes that need an API key, if there are any; `guarded` are the guards' statuses."""
    router = APIRouter()
    refused = responses_of(*guarded)

    @router.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={**refused, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/v1/models", summary="What is served", responses=refused)
    async def models() -> ModelList:
        return ModelList(data=service.cards())

    @router.get(
        "/v1/models/{name:path}", summary="One model", responses=responses_of(404, *guarded)
    )
    async def model(name: str) -> ModelCard:
        return service.card(service.find(name))

    answered = streamed(400, 404, 408, 413, 415, 429, 500, 504, *guarded)

    @router.post(
        "/v1/completions",
        summary="Continue a text",
        response_model=CompletionReply,
        responses=answered,
        openapi_extra=body_of(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await service.answer(CompletionRequest, request)

    @router.post(
        "/v1/chat/completions",
        summary="Answer in a conversation",
        response_model=ChatReply,
        responses=answered,
        openapi_extra=body_of(ChatRequest),
    )
    async def chat(request: Request) -> Response:
        return await service.answer(ChatRequest, request)

    return router
