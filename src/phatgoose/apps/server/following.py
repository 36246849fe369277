"""A server that follows its pools: what has changed on the disk is opened beside what is served.

The new one takes the old one's place when it is complete. Requests that run finish on the old one,
and a pool that can't be opened leaves it where it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import Counter

from ...errors import PhatgooseError
from ...files.strict import one_line
from .guards import Metrics
from .service import in_thread
from .settings import ServedModel

LOOKING = 1.0  # seconds between two looks at whether it was asked to, or something changed
DEPTH = 2  # folders below a pool's that are looked at: the experts
MOST_FILES = 100_000  # that are looked at
REOPENED, KEPT = "reopened", "kept"

log = logging.getLogger(__name__)

Seen = tuple[tuple[str, int, int], ...]  # files, their sizes and times


class Followed(Protocol):
    """A service whose models can be opened again."""

    @property
    def metrics(self) -> Metrics: ...

    def served(self) -> list[ServedModel]: ...

    def reopened(self, name: str) -> Any: ...  # in a thread

    def swap(self, name: str, opened: Any) -> None: ...  # in the event loop


class Follower:
    """Opens the models of `service` again when it is asked to (`ask`), or `watches` their places.

    A place that changes is opened once it has stopped to: two looks see the same.
    """

    def __init__(self, service: Followed, *, watches: bool) -> None:
        self._service, self._watches, self._asked = service, watches, False
        self._opened = {each.name: seen_at(each.place) for each in service.served()}
        self._last = dict(self._opened)
        self._task: asyncio.Task[None] | None = None
        self._count = Counter(
            "phatgoose_reopened",
            "Changed pools: reopened, or kept as they were because the new one can't be served.",
            ["outcome"],
            registry=service.metrics.registry,
        )

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run(self._look))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def ask(self) -> None:
        """Open everything again, soon; may be called by a handler of signals."""
        self._asked = True

    async def _run(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(LOOKING)
            try:
                await look()
            except Exception:
                log.exception("The pools could not be looked at.")

    async def _look(self) -> None:
        asked, self._asked = self._asked, False
        if not (asked or self._watches):
            return
        for model in self._service.served():
            _, future = in_thread(lambda place=model.place: seen_at(place))  # type: ignore[misc]
            seen, before = await future, self._last[model.name]
            self._last[model.name] = seen
            if asked or (seen == before and seen != self._opened[model.name]):
                self._opened[model.name] = seen  # also where it fails: another change is awaited
                await self._reopen(model.name)

    async def _reopen(self, name: str) -> None:
        _, future = in_thread(lambda: self._service.reopened(name))
        try:
            self._service.swap(name, await future)
        except (PhatgooseError, OSError) as error:
            self._count.labels(KEPT).inc()
            log.warning("%s has changed, and is served as it was: %s", name, one_line(error))
            return
        self._count.labels(REOPENED).inc()
        log.warning("%s has changed, and is served as it is now", name)


def seen_at(place: str) -> Seen:
    """The files of a pool or a model, by which a change is noticed; nothing for one on the Hub."""
    path = Path(place)
    if path.is_file():
        return (_seen(path),)
    found: list[tuple[str, int, int]] = []
    if not path.is_dir():
        return ()
    for folder, folders, files in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and depth + 1 < DEPTH)
        found += [_seen(Path(folder) / name) for name in sorted(files)]
        if len(found) > MOST_FILES:
            break
    return tuple(found)


def _seen(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:  # it went away since it was listed
        return str(path), -1, -1
    return str(path), stat.st_size, stat.st_mtime_ns
