"""The time by which a request must be answered."""

from __future__ import annotations

import asyncio

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.protocol import Deadline


def test_what_is_left_runs_out_and_no_further():
    async def look():
        loop = asyncio.get_running_loop()
        soon = Deadline.after(60)
        return soon, soon.left, Deadline(60, loop.time() - 1).left

    soon, left, over = asyncio.run(look())
    assert soon.seconds == 60
    assert left == pytest.approx(60, abs=1)
    assert over == 0
