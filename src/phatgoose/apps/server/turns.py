"""Clients take turns: a queue that is fair to them, works done a few at a time, and deadlines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from .protocol import ApiError, busy

MOST_TURNS = 256  # that may wait whatever --max-queue says, a half of them one client's

Item = TypeVar("Item")
Result = TypeVar("Result")


class Deadline:
    """A request may take `seconds` from now on; made in the event loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = asyncio.get_running_loop().time() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - asyncio.get_running_loop().time())

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Raise ApiError for what takes longer."""
        try:
            async with asyncio.timeout(self.left):
                yield
        except TimeoutError:
            raise self.missed() from None

    def missed(self) -> ApiError:
        message = f"The answer took longer than {self.seconds:g} seconds."
        return ApiError(504, message, code="timeout")


class FairQueue(Generic[Item]):
    """Clients' items in their order; the next turn is the client's served longest ago."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Item]] = {}  # in the order of turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def heads(self) -> list[tuple[str, Item]]:
        """Each client with its first item, in the order of turns."""
        return [(client, line[0]) for client, line in self._lines.items()]

    def add(self, client: str, item: Item) -> None:
        self._lines.setdefault(client, []).append(item)

    def take(self, client: str) -> None:
        """Remove the first item of a client, who is the last from now on."""
        _, *rest = self._lines.pop(client)
        if rest:
            self._lines[client] = rest

    def remove(self, client: str, item: Item) -> None:
        """Remove an item, wherever it is, if it is there."""
        rest = [other for other in self._lines.get(client, ()) if other is not item]
        self._lines[client] = rest
        if not rest:
            del self._lines[client]

    def check_room(self, client: str, new: int, most: int) -> None:
        """Raise ApiError where `new` ones are more than may wait, of all or of one client."""
        mine = len(self._lines.get(client, ()))
        if len(self) + new > most or mine + new > (most + 1) // 2:
            message = f"{len(self)} answers are waiting already, {mine} of them yours"
            raise busy(f"{message}; {new} more are too many now.")


class Turns(FairQueue[asyncio.Future[None]]):
    """Up to `most` works at once; the client served longest ago is next.

    As many as `waiting` may wait, and always MOST_TURNS.
    """

    def __init__(self, most: int, waiting: int = 0) -> None:
        super().__init__()
        self.most = most
        self.free = most
        self.waiting = max(waiting, MOST_TURNS)

    async def wait(self, client: str, deadline: Deadline) -> None:
        """Wait for a turn, to be given back by `pass_on`; ApiError at the deadline, or at once."""
        if self.free:
            self.free -= 1
            return
        self.check_room(client, 1, self.waiting)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.add(client, place)
        try:
            async with deadline.kept():
                await place
        except BaseException:
            self.remove(client, place)
            if not place.cancelled():  # the turn came as this one gave up
                self.pass_on()
            raise

    def pass_on(self) -> None:
        while heads := self.heads():
            client, place = heads[0]
            self.take(client)
            if not place.done():  # or it was cancelled
                place.set_result(None)
                return
        self.free += 1

    async def run(self, client: str, deadline: Deadline, work: Callable[[float], Result]) -> Result:
        """What `work(seconds left)` returns, done in a thread; ApiError at the deadline.

        A thread can't be ended: past the deadline the work keeps its place until it returns.
        """
        await self.wait(client, deadline)
        seconds = deadline.left
        result = in_thread(lambda: work(seconds))
        result.add_done_callback(lambda _: self.pass_on())
        await asyncio.wait([result], timeout=seconds)
        if not result.done():
            raise deadline.missed()
        return result.result()  # which may raise a TimeoutError of the work's own


def in_thread(work: Callable[[], Result]) -> asyncio.Future[Result]:
    """What comes of `work` in a daemon thread. For the event loop's thread."""
    done = Future[Result]()
    done.set_running_or_notify_cancel()  # a thread can't be cancelled

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic in Rust is no Exception
            if not isinstance(error, Exception):
                error = RuntimeError(str(error))
            done.set_exception(error)

    try:
        # asyncio and anyio wait for their threads when the process ends, even for a stuck one.
        threading.Thread(target=run, name="phatgoose-work", daemon=True).start()
    except RuntimeError as error:  # no more can be started
        done.set_exception(error)
    result = asyncio.wrap_future(done)
    result.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # maybe unseen
    return result
