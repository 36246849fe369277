"""Composes a request's routing off the engine's thread, one at a time.

A request waits for its own routing, at most for its timeout, while others are served. The number of
routings being composed is bounded, for each client and for all together.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from starlette.concurrency import run_in_threadpool

from ..api_errors import ApiError, busy
from .loaded_models import LoadedModel, LoadedModels, ModelUse, RoutingOverride

__all__ = ["BackgroundComposer"]

FOR_EACH = 2  # routings composed at once for one client: as many as the page shows side by side


@dataclass
class PendingRouting:
    """A routing being composed, who asked for it first, and how many requests wait for it."""

    client: str
    requests: int = 0
    is_over: bool = False
    made: asyncio.Future[ModelUse] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class BackgroundComposer:
    """Composes routings of `models`, at most `most` at once."""

    def __init__(self, models: LoadedModels, most: int) -> None:
        self._models, self._most = models, most
        self._pending: dict[tuple[str, RoutingOverride], PendingRouting] = {}
        self._threads: set[threading.Thread] = set()

    async def acquire(
        self, loaded: LoadedModel, override: RoutingOverride, client: str, seconds: float
    ) -> ModelUse:
        """`loaded` with `override` applied, composed if it isn't cached: kept until its release.

        Raises PhatgooseError for an impossible override, ApiError when too much is asked for at
        once or it takes more than `seconds`.
        """
        look = partial(self._models.ready, loaded, override)
        ready = look() if override == RoutingOverride() else await run_in_threadpool(look)
        if ready is not None:
            return ready
        pending = self._begun(loaded, override, client)
        pending.requests += 1
        try:
            use = await asyncio.wait_for(asyncio.shield(pending.made), seconds)
            self._models.keep(use)
            return use
        except asyncio.TimeoutError:
            message = f"Composing the routing took longer than {seconds:g} seconds; it goes on."
            raise ApiError(504, message, code="timeout") from None
        finally:
            pending.requests -= 1
            self._let_go(pending)

    def stop(self, seconds: float) -> None:
        """Wait for what is being composed, `seconds` at most."""
        end = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _begun(self, loaded: LoadedModel, override: RoutingOverride, client: str) -> PendingRouting:
        key = (loaded.settings.name, override)
        if key in self._pending:
            return self._pending[key]
        own = sum(each.client == client for each in self._pending.values())
        if len(self._pending) >= self._most or own >= FOR_EACH:
            raise busy("Too many routings are being composed; try again in a while.", 5)
        pending = self._pending[key] = PendingRouting(client)
        loop = asyncio.get_running_loop()

        def work() -> None:
            found: ModelUse | Exception
            try:
                found = self._models.acquire(loaded, override)
            except Exception as error:
                found = error
            self._threads.discard(threading.current_thread())
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._end, key, found)

        thread = threading.Thread(target=work, name="phatgoose-composer", daemon=True)
        self._threads.add(thread)
        thread.start()
        return pending

    def _end(self, key: tuple[str, RoutingOverride], found: ModelUse | Exception) -> None:
        pending = self._pending.pop(key)
        if isinstance(found, Exception):
            pending.made.set_exception(found)
            pending.made.exception()  # marks it as seen, if nobody waits
        else:
            pending.made.set_result(found)
        self._let_go(pending)

    def _let_go(self, pending: PendingRouting) -> None:
        """Release the routing, which is kept for those who wait, once nobody does."""
        made = pending.made
        if made.done() and not pending.requests and not pending.is_over:
            pending.is_over = True
            if made.exception() is None:
                self._models.release(made.result())
