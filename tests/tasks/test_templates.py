"""Templates: which of a row's values stands in a rendered text."""

from __future__ import annotations

import pytest

from phatgoose.tasks.loading import longest_field


@pytest.mark.parametrize(
    ("values", "text", "wanted"),
    [
        ({"a": "long one", "b": "short"}, "short, then long one.", "long one"),
        ({"a": "changed by a filter", "b": "short"}, "CHANGED BY A FILTER short", "short"),
        ({"a": "twice", "b": "one"}, "twice, twice, one", "one"),
        (
            {"a": ["x", {"deep": " nested text\n"}], "b": 3},
            "in it nested text stands",
            "nested text",
        ),
        ({"a": "absent", "b": "", "c": None}, "nothing of it", None),
    ],
)
def test_the_longest_value_that_stands_in_a_text_once(values, text, wanted):
    found = longest_field(values, text)
    assert (None if found is None else text[slice(*found)]) == wanted
