"""Where an answer ends: the texts that its request wants it to stop before."""

from __future__ import annotations

from phatgoose.apps.server.sequences import earliest, held_back


def test_where_a_stop_begins_and_what_may_be_one():
    assert earliest("abcabc", ["c", "bc"], 0) == 1
    assert earliest("abcabc", ["bc"], 2) == 4
    assert earliest("abc", [], 0) is None
    assert held_back("abcde", ["deal", "x"]) == 2
    assert held_back("abcd", ["deal", "dx"]) == 1
    assert held_back("abc", ["deal"]) == 0
    assert held_back("deal", ["deal"]) == 0  # whole: found by `earliest`
