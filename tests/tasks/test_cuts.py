"""What is kept of inputs that are too long, and what is told of it."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phatgoose.tasks.encoding import CUTS, Cut, Cuts, cut_tokens, recorded_share

TRUNCATIONS = ("middle", "left", "right")


@settings(max_examples=100)
@given(st.integers(0, 40), st.integers(0, 50), st.sampled_from(TRUNCATIONS))
def test_as_much_is_kept_as_there_is_room_in_order(count, room, truncation):
    left = cut_tokens(range(count), room, truncation)
    assert len(left) == min(count, room)
    assert left == sorted(set(left))
    if truncation != "right" and left:
        assert left[-1] == count - 1
    if truncation == "right" and left:
        assert left[0] == 0


def test_a_middle_cut_keeps_a_quarter_before_it_and_three_quarters_behind():
    assert cut_tokens(range(100), 8, "middle") == [0, 1, *range(94, 100)]


def some(cut: int, inputs: int) -> Cuts:
    return Cuts.of([Cut(512, 80 + i) for i in range(cut)] + [None] * (inputs - cut))


def test_what_was_cut_is_told_in_one_line(caplog):
    with caplog.at_level(logging.INFO, "phatgoose"):
        some(12, 400).report("reviews")
    line = "reviews: 12 of 400 inputs (3 %) cut to 512 tokens, by 86 in the median"
    assert caplog.messages == [line]


def test_from_a_tenth_on_it_is_a_warning():
    told = r"reviews: 40 of 400 inputs \(10 %\) cut to 512 tokens, by 100 in the median\."
    with pytest.warns(UserWarning, match=told):
        some(40, 400).report("reviews")
    with pytest.warns(UserWarning, match=r"it: 1 of 1 input \(100 %\)"):
        some(1, 1).report("it")


def test_nothing_is_told_when_nothing_was_cut(caplog):
    with caplog.at_level(logging.INFO):
        some(0, 400).report("reviews")
        Cuts().report("reviews")
    assert not caplog.messages


def test_less_than_half_a_per_cent_is_not_called_none():
    assert "1 of 400 inputs (under 1 %)" in some(1, 400).text()


def test_cut_targets_are_told_however_few_they_are():
    targets = [Cut(8, 3), Cut(8, 5), *[None] * 98]
    cuts = Cuts.of([None] * 100, targets=targets)
    with pytest.warns(
        UserWarning, match=r"it: 2 of 100 targets \(2 %\) cut to 8 tokens, by 4 in the median\."
    ) as told:
        cuts.report("it")
    assert len(told) == 1
    Cuts.of([None] * 100, targets=[None] * 100).report("it")


def test_inputs_beyond_what_the_base_was_made_for_are_told():
    cuts = Cuts.of([None] * 3, [2048, 2049, 5000], 2048)
    with pytest.warns(
        UserWarning, match="it: 2 of 3 inputs and their answers are longer than the 2048"
    ):
        cuts.report("it")


def test_an_expert_s_metrics_tell_the_share_again():
    assert some(12, 400).record() == dict(zip(CUTS, (400, 12, 512, 86), strict=True))
    assert some(0, 4).record() == {"inputs": 4, "inputs_cut": 0}
    assert recorded_share(some(12, 400).record()) == "3 %"
    assert recorded_share(some(0, 4).record()) == "0 %"


@pytest.mark.parametrize(
    ("inputs", "cut"), [(None, None), ("4", 1), (4, 5), (4, -1), (0, 0), (True, 0)]
)
def test_metrics_that_say_no_share_say_none(inputs, cut):
    assert recorded_share({"inputs": inputs, "inputs_cut": cut}) is None
    assert recorded_share({}) is None
