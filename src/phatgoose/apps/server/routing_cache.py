"""The routings that requests ask for, composed off the engine's thread and cached.

A request waits for its own routing, at most until its deadline, while others are served. The least
recently used routing that no request needs makes room for a new one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from ...config import Routing
from ...experts.pool import Pool
from ...tasks.embeddings import without_downloads
from .api_errors import ApiError, Deadline, busy
from .models import LoadedModel, ModelRunner, RoutingOverride, share_factors

FOR_EACH = 2  # routings composed at once for one client: as many as the page shows side by side

Key = tuple[str, Routing, tuple[str, ...]]  # model, routing, experts


class Acquired(NamedTuple):
    """A model for one request, which calls `release` when it is done."""

    runner: ModelRunner
    release: Callable[[], None] = lambda: None


@dataclass(eq=False)
class CachedRouting:
    """A routing, composed or being composed for `client`, and how many requests need it."""

    client: str
    runner: asyncio.Future[ModelRunner]
    requests: int = 0

    @property
    def is_ready(self) -> bool:
        """True once it is composed; False also if that failed."""
        return self.runner.done() and self.runner.exception() is None

    def release(self) -> None:
        """Count one request less."""
        self.requests -= 1


class RoutingCache:
    """At most `most` routings of `models`, the least recently used first.

    All methods run in the event loop's thread, but for `_compose`.
    """

    def __init__(self, models: Mapping[str, LoadedModel], most: int) -> None:
        self._models, self._most = models, most
        self._cached: dict[Key, CachedRouting] = {}
        self._composing = threading.Lock()  # one at a time: it takes all cores anyway
        self._threads: set[threading.Thread] = set()

    @property
    def composed(self) -> list[ModelRunner]:
        """The models that are ready."""
        return [each.runner.result() for each in list(self._cached.values()) if each.is_ready]

    @property
    def unfinished(self) -> int:
        """How many are being composed."""
        return len(self._cached) - len(self.composed)

    @property
    def requests(self) -> int:
        """How many requests need one or wait for one."""
        return sum(each.requests for each in self._cached.values())

    async def acquire(
        self, loaded: LoadedModel, override: RoutingOverride, client: str, deadline: Deadline
    ) -> Acquired:
        """`loaded` with `override` applied, composed if it isn't cached.

        Raises PhatgooseError for an impossible override, ApiError when too much is asked for at
        once or it isn't there by the `deadline`.
        """
        if override == RoutingOverride():
            return Acquired(loaded.runner)
        routing, pool = await run_in_threadpool(loaded.overridden, override)
        if loaded.parts and (routing, pool.names) == (loaded.routing, loaded.parts.experts):
            return Acquired(loaded.runner)
        key = (loaded.settings.name, routing, pool.names)
        if key not in self._cached:
            self._begin(key, loaded, pool, client)
        cached = self._cached[key] = self._cached.pop(key)  # now the last
        cached.requests += 1
        try:
            runner = await asyncio.wait_for(asyncio.shield(cached.runner), deadline.left)
        except BaseException as error:
            cached.release()
            if isinstance(error, asyncio.TimeoutError):
                message = (
                    f"The routing wasn't composed in {deadline.seconds:g} seconds; it goes on."
                )
                raise ApiError(504, message, code="timeout") from None
            raise
        return Acquired(runner, cached.release)

    def stop(self, seconds: float) -> None:
        """Wait for what is being composed, `seconds` at most."""
        end = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _begin(self, key: Key, loaded: LoadedModel, pool: Pool, client: str) -> None:
        """Start to compose a routing. Raises ApiError when there is no room for it."""
        clients = [each.client for each in self._cached.values() if not each.is_ready]
        if len(clients) >= self._most or clients.count(client) >= FOR_EACH:
            raise busy("Too many routings are being composed; try again in a while.", 5)
        self._make_room()
        loop = asyncio.get_running_loop()
        self._cached[key] = CachedRouting(client, loop.create_future())

        def work() -> None:
            found: ModelRunner | Exception
            try:
                found = self._compose(loaded, pool, key[1])
            except Exception as error:
                found = error
            self._threads.discard(threading.current_thread())
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._end, key, found)

        thread = threading.Thread(target=work, name="phatgoose-composer", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _make_room(self) -> None:
        if len(self._cached) < self._most:
            return
        for key, each in self._cached.items():
            if each.is_ready and not each.requests:
                del self._cached[key]
                return
        raise busy("Too many different routings are in use; try again in a while.", 5)

    def _compose(self, loaded: LoadedModel, pool: Pool, routing: Routing) -> ModelRunner:
        with self._composing, without_downloads():  # a client must not start downloads
            model = loaded.compose(pool, routing)
            runners = [*(each.runner for each in self._models.values()), *self.composed]
            share_factors(model, [runner.model for runner in runners])
            return ModelRunner(model, loaded.base.tokenizer)

    def _end(self, key: Key, found: ModelRunner | Exception) -> None:
        if isinstance(found, Exception):
            failed = self._cached.pop(key).runner
            failed.set_exception(found)
            failed.exception()  # marks it as seen, if nobody waits
        else:
            self._cached[key].runner.set_result(found)
