"""Text that no UTF-8 can hold: half of a character."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from phatgoose.files.strict import half_character


@given(st.text())
def test_whole_characters_are_encoded(text):
    assert half_character(text) is None


def test_the_first_half_is_found():
    assert half_character(json.loads(r'"a\ud83d b\ude00"')) == "\ud83d"
    assert half_character(b"caf\xe9".decode(errors="surrogateescape")) == "\udce9"
