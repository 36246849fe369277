"""Error handlers, and an OpenAPI schema that describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from ..api_errors import ApiError, error_body
from .request_schema import ChatRequest, CompletionRequest
from .response_schema import ErrorReply

__all__ = ["body_of", "install_errors", "responses_of", "streamed"]

DESCRIPTIONS = {
    400: "The request is invalid, or the model can't answer it.",
    401: "There is no valid API key.",
    403: "The host name is unknown, or the request comes from another server's page.",
    404: "There is no such model.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    415: "The content type is not JSON.",
    429: "Too many requests are waiting.",
    500: "The answer could not be computed.",
    503: "The server does not work.",
    504: "The answer took too long.",
}
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
CHALLENGE = {
    "WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}
}
HEADERS: dict[int, dict[str, Any]] = {429: RETRY, 401: CHALLENGE}
PLACE = "#/components/schemas/{model}"
EVENTS = {
    "schema": {"description": "Server-sent events, each with a chunk; the last is [DONE]."},
    "example": 'data: {"id": …}\n\ndata: [DONE]\n\n',
}


def responses_of(
    *statuses: int, model: type[BaseModel] = ErrorReply
) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route."""
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "model": model,
            **({"headers": HEADERS[status]} if status in HEADERS else {}),
        }
        for status in statuses
    }


def streamed(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that answers whole or as a stream."""
    description = "The answer, or with stream a chunk in each event."
    streams = {"description": description, "content": {"text/event-stream": EVENTS}}
    return {**responses_of(*statuses), 200: streams}


def body_of(wanted: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that its route reads by itself."""
    form = {"schema": {"$ref": PLACE.format(model=wanted.__name__)}}
    return {"requestBody": {"required": True, "content": {"application/json": form}}}


def install_errors(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's form, and describe that in its schema."""
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    app.openapi = _schema_of(app)  # type: ignore[method-assign]


def _refused(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        return _failed(_, error)
    plain = error_body(error.status_code, str(error.detail))
    body = error.body if isinstance(error, ApiError) else plain
    return JSONResponse(body, error.status_code, error.headers)


def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "The server failed; its log says more."), 500)


def _schema_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's schema with our request bodies and without its own validation errors."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        found = FastAPI.openapi(app)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        models = found["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            models.pop(name, None)
        _, bodies = models_json_schema(
            [(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=PLACE
        )
        models.update(bodies["$defs"])
        return found

    return schema
