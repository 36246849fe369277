"""A server that follows its pools: what has changed on the disk is opened beside what is served.

The new one takes the old one's place when it is complete. Requests that run finish on the old one,
and a pool that can't be opened leaves it where it is.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
from contextlib import suppress
from typing import Any

from ...errors import PhatgooseError
from ...files.strict import one_line
from .gateway import Gateway
from .service import Service, in_thread

LOOKING = 1.0  # seconds between two looks at whether something changed

log = logging.getLogger(__name__)

Seen = tuple[tuple[str, int, int], ...]  # files, their sizes and times


async def follow(service: Service | Gateway) -> None:
    """Open each model again when the files at its place have changed, and have stopped to."""
    places = {name: model.settings.place for name, model in service.models.items()}
    opened = {name: seen_at(place) for name, place in places.items()}
    last = dict(opened)
    while True:
        await asyncio.sleep(LOOKING)
        for name, place in places.items():
            try:
                before, last[name] = last[name], await asyncio.to_thread(seen_at, place)
                if before == last[name] != opened[name]:
                    opened[name] = before  # also where it fails: another change is awaited
                    await _reopen(service, name)
            except Exception as error:  # such as too many threads: it is looked at again
                log.warning("%s can't be watched now: %s", name, one_line(error))


async def _reopen(service: Service | Gateway, name: str) -> None:
    try:
        _, opening = in_thread(lambda: service.reopened(name))
        opened: Any = await opening
        service.swap(name, opened)
    except Exception as error:
        known = isinstance(error, (PhatgooseError, OSError))
        words = "%s has changed, and is served as it was: %s"
        log.warning(words, name, one_line(error), exc_info=not known)
        service.metrics.reopened.labels("kept").inc()
    else:
        log.warning("%s has changed, and is served as it is now", name)
        service.metrics.reopened.labels("reopened").inc()


def seen_at(place: str) -> Seen:
    """The files of a pool or a model, by which a change is noticed; nothing for one on the Hub."""
    inside, found = glob.escape(place), []
    for path in sorted([place, *glob.glob(f"{inside}/*"), *glob.glob(f"{inside}/*/*")]):
        with suppress(OSError):  # it went away since it was listed
            if os.path.isfile(path):
                stat = os.stat(path)
                found.append((path, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
