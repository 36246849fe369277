"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .settings import AT_LEAST_1, Settings

__all__ = ["Serving"]


@dataclass(frozen=True)
class Serving(Settings):
    """The limits of `phatgoose serve` (docs/serving.md)."""

    max_tokens: Annotated[int, "Maximum tokens to generate for one answer.", AT_LEAST_1] = 1024
    max_choices: Annotated[
        int, "Maximum answers to one request (its prompts times its n).", AT_LEAST_1
    ] = 64
    max_queue: Annotated[
        int, "Maximum answers that wait; further requests are refused.", AT_LEAST_1
    ] = 256
    max_client_queue: Annotated[int, "Maximum answers of one client that wait.", AT_LEAST_1] = 128
    max_batch_tokens: Annotated[
        int,
        "Maximum tokens to compute together, prompts, answers and padding included.",
        AT_LEAST_1,
    ] = 16384
    max_routings: Annotated[
        int, "Requested routings to keep in memory, beside the served models.", AT_LEAST_1
    ] = 8
    max_body: Annotated[int, "Maximum bytes of a request.", AT_LEAST_1] = 1 << 20
    max_connections: Annotated[int, "Maximum open connections.", AT_LEAST_1] = 1000
    read_timeout: Annotated[
        int, "Seconds for a request's headers, and again for its body, to arrive.", AT_LEAST_1
    ] = 20
    timeout: Annotated[int, "Maximum seconds per request, waiting included.", AT_LEAST_1] = 300
    shutdown_timeout: Annotated[
        int, "Seconds for running requests to finish after a signal to stop.", AT_LEAST_1
    ] = 30
