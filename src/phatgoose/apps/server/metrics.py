"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Collection

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api_errors import CLIENT_GONE

UNROUTED = "other"  # the path under which requests to unknown paths are counted

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "phatgoose_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "phatgoose_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self._prompt = Counter(
            "phatgoose_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
        )
        self._generated = Counter(
            "phatgoose_generated_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self._waiting = Gauge("phatgoose_waiting", "Answers in the queue.", registry=registry)
        self._running = Gauge("phatgoose_running", "Answers being computed.", registry=registry)
        self._batch = Histogram(
            "phatgoose_batch_rows",
            "Answers in a batch when it read prompts or made a step.",
            buckets=SIZES,
            registry=registry,
        )

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_tokens(self, model: str, prompt: int, generated: int) -> None:
        """Count the tokens of an answer."""
        self._prompt.labels(model).inc(prompt)
        self._generated.labels(model).inc(generated)

    def set_load(self, waiting: int, running: int) -> None:
        """Set how many answers wait and are computed now."""
        self._waiting.set(waiting)
        self._running.set(running)

    def count_batch(self, size: int) -> None:
        """Count a step of a batch of that size."""
        self._batch.observe(size)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class MetricsMiddleware:
    """Counts and times every request by its route, or by its path if that is one of `paths`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count it when its answer is complete."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            known = scope["path"] if scope["path"] in self._paths else UNROUTED
            path = str(getattr(scope.get("route"), "path", known))
            self._metrics.count_request(path, status, time.perf_counter() - begun)
