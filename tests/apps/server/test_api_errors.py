"""Errors as clients see them."""

from __future__ import annotations

import pytest

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.protocol import without_paths


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/home/me/experts/e0 has no gates.", "e0 has no gates."),
        ("'/home/me/my experts/e0': broken.", "'e0': broken."),
        ("experts/e0 has no gates, nor /a/b and /c/d.", "experts/e0 has no gates, nor b and d."),
        (r"C:\Users\me\e0: broken, ~/x/y too", "e0: broken, y too"),
        ("hub:me/x@v1 or https://a.example/x, 1/2 or m/s", None),
        ("use /v1", "use v1"),
    ],
)
def test_paths_in_messages_are_cut(message, told):
    assert without_paths(message) == (message if told is None else told)
