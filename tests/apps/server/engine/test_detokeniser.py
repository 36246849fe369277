"""Text from tokens that come one at a time, and stop texts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batched import TOKENIZER
from phatgoose.apps.server.engine.detokeniser import Detokeniser, earliest, held_back


@given(st.text(max_size=30), st.text(max_size=10))
@settings(max_examples=25)
def test_pieces_make_the_text_that_all_tokens_make(text, before):
    tokenizer = TOKENIZER
    given_before = tokenizer(before)["input_ids"]
    detokeniser = Detokeniser(tokenizer, given_before)
    pieces = [detokeniser.add(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) + detokeniser.rest() == text


def test_bytes_that_are_no_text_are_given_up():
    detokeniser = Detokeniser(TOKENIZER)
    (lead,) = TOKENIZER("é")["input_ids"][:1]
    pieces = [detokeniser.add(lead) for _ in range(40)]
    assert "\ufffd" in "".join(pieces)
    assert detokeniser.rest().strip("\ufffd") == ""


def test_where_a_stop_begins_and_what_may_be_one():
    assert earliest("abcabc", ["c", "bc"], 0) == 1
    assert earliest("abcabc", ["bc"], 2) == 4
    assert earliest("abc", [], 0) is None
    assert held_back("abcde", ["deal", "x"]) == 2
    assert held_back("abcd", ["deal", "dx"]) == 1
    assert held_back("abc", ["deal"]) == 0
    assert held_back("deal", ["deal"]) == 0  # whole: found by `earliest`
