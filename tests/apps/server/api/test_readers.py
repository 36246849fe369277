"""Readers: a few threads at once, clients in turns, and nobody waits beyond the deadline."""

from __future__ import annotations

import asyncio
import threading

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.protocol import ApiError, Deadline
from phatgoose.apps.server.service import Readers


def test_clients_take_turns():
    """Of a client that asks four times and one that asks once later, the second isn't last."""
    served, go_on = [], threading.Event()

    async def ask_all():
        readers, deadline = Readers(1), Deadline.after(60)

        def work(name):
            return lambda _: go_on.wait(30) and served.append(name)

        names = ["greedy 1", "greedy 2", "greedy 3", "greedy 4", "polite"]
        works = [readers.run(name.split()[0], deadline, work(name)) for name in names]
        tasks = [asyncio.ensure_future(each) for each in works]
        await asyncio.sleep(0.05)
        assert (readers.waiting, len(readers.running())) == (4, 1)
        go_on.set()
        await asyncio.gather(*tasks)
        assert (readers.waiting, readers.running()) == (0, [])

    asyncio.run(ask_all())
    assert served.index("polite") <= 2
    assert sorted(served) == ["greedy 1", "greedy 2", "greedy 3", "greedy 4", "polite"]


def test_work_that_outlives_its_request_keeps_its_place_and_no_other():
    go_on = threading.Event()

    async def ask():
        readers = Readers(1)
        for number in range(3):  # the first is stuck; the others wait for its place in vain
            with pytest.raises(ApiError) as late:
                await readers.run("a", Deadline.after(0.05), lambda _: go_on.wait(30))
            assert late.value.status_code == 504, number
        assert (readers.waiting, len(readers.running())) == (0, 1)
        go_on.set()
        assert await readers.run("a", Deadline.after(30), lambda left: 0 < left <= 30)
        assert readers.running() == []

    asyncio.run(ask())


def test_what_work_raises_arrives_and_the_next_is_done():
    class Panic(BaseException):
        """As errors of compiled Rust are."""

    async def ask():
        readers = Readers(1)
        for kind, wanted in ((ValueError, ValueError), (Panic, RuntimeError)):

            def work(_, kind=kind):
                raise kind("no")

            with pytest.raises(wanted, match="no"):
                await readers.run("a", Deadline.after(30), work)
        assert await readers.run("a", Deadline.after(30), lambda _: 5) == 5

    asyncio.run(ask())


def test_a_stuck_thread_does_not_keep_the_loop_from_ending():
    go_on = threading.Event()

    async def give_up():
        readers = Readers(1)
        asked = asyncio.ensure_future(
            readers.run("a", Deadline.after(60), lambda _: go_on.wait(60))
        )
        await asyncio.sleep(0.05)
        asked.cancel()

    asyncio.run(asyncio.wait_for(give_up(), 30))
    stuck = [each for each in threading.enumerate() if each.name == "phatgoose-work"]
    assert stuck
    assert all(each.daemon for each in stuck)
    go_on.set()
