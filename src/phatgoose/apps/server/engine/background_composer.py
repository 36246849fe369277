"""Routings that requests ask for, made ready off the engine's thread, one at a time.

A request waits for its own routing and for no longer than it may take; others are served meanwhile,
and so many may be on their way at once, for all clients and for each.
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

FOR_EACH = 2  # routings of one client on their way: as many as the page shows side by side


@dataclass
class PendingRouting:
    """A routing on its way, who began it, and how many requests wait for it."""

    client: str
    requests: int = 0
    is_over: bool = False
    made: asyncio.Future[ModelUse] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class BackgroundComposer:
    """Makes the routings of `models` ready, at most so many on their way at once."""

    def __init__(self, models: LoadedModels, most: int) -> None:
        self._models, self._most = models, most
        self._pending: dict[tuple[str, RoutingOverride], PendingRouting] = {}
        self._threads: set[threading.Thread] = set()

    async def acquire(
        self, served: LoadedModel, wish: RoutingOverride, client: str, seconds: float
    ) -> ModelUse:
        """The model as `wish` has it, composed if need be, kept at least until its release.

        Raises PhatgooseError for what can't be had, ApiError when too much is asked for at once or
        it takes more than `seconds`.
        """
        look = partial(self._models.ready, served, wish)
        ready = look() if wish == RoutingOverride() else await run_in_threadpool(look)
        if ready is not None:
            return ready
        pending = self._begun(served, wish, client)
        pending.requests += 1
        try:
            use = await asyncio.wait_for(asyncio.shield(pending.made), seconds)
            self._models.keep(use)
            return use
        except asyncio.TimeoutError:
            message = f"To compose the routing took longer than {seconds:g} seconds; it goes on."
            raise ApiError(504, message, code="timeout") from None
        finally:
            pending.requests -= 1
            self._let_go(pending)

    def stop(self, seconds: float) -> None:
        """Wait so long, altogether, for what is being composed."""
        end = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))

    def _begun(self, served: LoadedModel, wish: RoutingOverride, client: str) -> PendingRouting:
        key = (served.settings.name, wish)
        if key in self._pending:
            return self._pending[key]
        own = sum(each.client == client for each in self._pending.values())
        if len(self._pending) >= self._most or own >= FOR_EACH:
            raise busy("Too many routings are to be composed; try again in a while.", 5)
        pending = self._pending[key] = PendingRouting(client)
        loop = asyncio.get_running_loop()

        def work() -> None:
            found: ModelUse | Exception
            try:
                found = self._models.acquire(served, wish)
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
            pending.made.exception()  # looked at, if nobody waits
        else:
            pending.made.set_result(found)
        self._let_go(pending)

    def _let_go(self, pending: PendingRouting) -> None:
        """Free the routing of what kept it for those who waited, once nobody does."""
        made = pending.made
        if made.done() and not pending.requests and not pending.is_over:
            pending.is_over = True
            if made.exception() is None:
                self._models.release(made.result())
