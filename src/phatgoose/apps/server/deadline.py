"""The time by which a request must be answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from .api_errors import ApiError

__all__ = ["Deadline"]


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
