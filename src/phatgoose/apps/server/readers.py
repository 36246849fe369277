"""Threads that turn requests into tokens: clients take turns, and none keeps the process going."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from .api_errors import Deadline

Found = TypeVar("Found")


class Readers:
    """Up to `most` threads. The next turn is that of the client served longest ago.

    All methods are for the event loop's thread. The threads are daemons of their own: those of
    asyncio and anyio are waited for when the process ends, even one that is stuck.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._works: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of turns
        self._begun: dict[object, float] = {}

    @property
    def waiting(self) -> int:
        """How many works wait for a thread."""
        return sum(not place.done() for line in self._waiting.values() for place in line)

    def running(self) -> list[float]:
        """For how many seconds each running work has run."""
        now = asyncio.get_running_loop().time()
        return [now - begun for begun in self._begun.values()]

    def stop(self) -> None:
        """Let the threads end with what they are at; later works start others."""
        for _ in range(self._threads):
            self._works.put(None)
        self._threads = 0

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Found]) -> Found:
        """What `work` returns; it is told how many seconds are left, and runs in a thread.

        Raises what it does, and ApiError at the deadline: the work then goes on, in its place,
        until it returns.
        """
        try:
            await self._turn(client, deadline)
        except asyncio.TimeoutError:
            raise deadline.missed() from None
        if not deadline.left:
            self._pass_on()
            raise deadline.missed()
        result = self._start(work, deadline)
        await asyncio.wait([result], timeout=deadline.left)
        if not result.done():
            raise deadline.missed()
        return result.result()  # which may raise a TimeoutError of the work's own

    async def _turn(self, client: str, deadline: Deadline) -> None:
        if self._free:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(place)
        try:
            await asyncio.wait_for(asyncio.shield(place), deadline.left)
        except BaseException:
            if place.done():  # the turn came as this one gave up
                self._pass_on()
            place.cancel()
            raise

    def _start(self, work: Callable[[float], Found], deadline: Deadline) -> asyncio.Future[Found]:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        seconds = deadline.left
        self._begun[result] = loop.time()

        def finished(found: Any, error: BaseException | None) -> None:
            del self._begun[result]
            self._pass_on()
            if not result.done():
                result.set_result(found) if error is None else result.set_exception(error)

        def run() -> None:
            found, error = None, None
            try:
                found = work(seconds)
            except BaseException as problem:
                error = problem if isinstance(problem, Exception) else RuntimeError(str(problem))
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finished, found, error)

        if self._threads < self._most:
            try:
                threading.Thread(target=self._serve, name="phatgoose-reader", daemon=True).start()
            except RuntimeError:  # no more threads can be started: the place goes to the next
                del self._begun[result]
                self._pass_on()
                raise
            self._threads += 1
        self._works.put(run)
        return result

    def _serve(self) -> None:
        while (work := self._works.get()) is not None:
            work()

    def _pass_on(self) -> None:
        """Give a thread's place to the next in turn."""
        while self._waiting:
            client = next(iter(self._waiting))
            line = self._waiting.pop(client)
            place = line.popleft()
            if line:
                self._waiting[client] = line  # behind the others
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
