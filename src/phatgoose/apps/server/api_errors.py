"""Errors in the form that OpenAI's clients know."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from ...files.strict import one_line

MOST_SHOWN = 500  # characters of an error

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
PART = r"[^/\\'\":;,]*[^/\\'\":;,\s]"  # of a path; names may have spaces
PATH = re.compile(rf"(?<![\w.:/-])(?:~|[A-Za-z]:)?(?:[/\\]{PART})+")  # an absolute one
CLIENT_GONE = 499  # nginx's status of a request whose client has disconnected
INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(HTTPException):
    """Why a request is not answered; `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return error_body(self.status_code, self.detail, self.code, self.param)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of an invalid request."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
    """The error of a request that may be repeated after some `seconds`."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(seconds)})


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's JSON body of an error."""
    kind = KINDS.get(status, SERVER if status >= 500 else INVALID)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def for_clients(error: object) -> str:
    """An error of the library as clients see it: one line, shortened, without absolute paths."""
    return without_paths(one_line(error, MOST_SHOWN))


def without_paths(message: str) -> str:
    """`message` with each absolute path cut to its last part."""
    return PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], message)


# -------------------------------------------------------------------------------------------------
# The time by which a request must be answered.
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadline:
    """A request may take `seconds`, until the event loop's clock shows `end`."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline `seconds` from now. Must be called in the event loop's thread."""
        return cls(seconds, asyncio.get_running_loop().time() + seconds)

    @property
    def left(self) -> float:
        """Seconds until then, 0 once it is over."""
        return max(0.0, self.end - asyncio.get_running_loop().time())

    def missed(self) -> ApiError:
        """The error of a request that wasn't answered by then."""
        message = f"The answer took longer than {self.seconds:g} seconds."
        return ApiError(504, message, code="timeout")
