"""Errors in OpenAI's form, and an OpenAPI schema that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .refusals import Refusal, error_body
from .replies import ErrorReply

__all__ = ["install_errors", "responses_of", "streamed"]

WRONG = {
    400: "The request can't be answered as it is.",
    401: "There is no valid API key.",
    404: "There is no such model.",
    413: "The request is too large.",
    429: "Too much is waiting.",
    500: "The answer could not be computed.",
    503: "The server is not well.",
    504: "The answer took too long.",
}
RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
CHALLENGE = {"WWW-Authenticate": {"description": "What is wanted.", "schema": {"type": "string"}}}
HEADERS: dict[int, dict[str, Any]] = {429: RETRY, 401: CHALLENGE}
EVENTS = {"schema": {"type": "string"}, "example": 'data: {"id": …}\n\ndata: [DONE]\n\n'}


def responses_of(
    *statuses: int, model: type[BaseModel] = ErrorReply
) -> dict[int | str, dict[str, Any]]:
    """What a route says of its errors."""
    return {
        status: {
            "description": WRONG[status],
            "model": model,
            **({"headers": HEADERS[status]} if status in HEADERS else {}),
        }
        for status in statuses
    }


def streamed(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route that answers whole or as a stream."""
    whole = {"description": "The answer, or with stream a chunk in each event."}
    return {
        **responses_of(*statuses),
        200: {**whole, "content": {"text/event-stream": EVENTS}},
    }


def install_errors(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's form and describe them so."""
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    app.openapi = _schema_of(app)  # type: ignore[method-assign]


def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Refusal):
        return JSONResponse(error.body, error.status_code, error.headers)
    if isinstance(error, HTTPException):
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)
    return _failed(_, error)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong with a request."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "path", "query")]
    field = place[0] if place and first.get("type") != "json_invalid" else None
    message = f"{'.'.join(place)}: {first.get('msg')}" if field else str(first.get("msg"))
    return JSONResponse(error_body(400, message, "invalid_request", field), 400)


def _failed(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "The server failed; its log says more."), 500)


def _schema_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's own schema without the errors that it would answer itself."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
            app.openapi_schema = found
        return app.openapi_schema

    return schema
