"""The form of training's inputs, recorded and held against an evaluation's."""

from __future__ import annotations

import warnings

import pytest

from phatgoose.config import Formatting
from phatgoose.errors import ConfigError
from phatgoose.experts.expert import format_record, recorded_formatting, warn_of_other_formatting

OLD = {"max_input_tokens": 112, "max_target_tokens": 512, "chat": False}  # before truncation
NEW = {**OLD, "truncation": "middle"}


def told(records, given=Formatting()) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_formatting(records, given)
    return [str(warning.message) for warning in caught]


def record_of(name: str, hyperparameters, metrics=None) -> dict[str, object]:
    return {"name": name, "formatting": format_record(hyperparameters, metrics or {})}


def test_an_expert_that_names_no_truncation_was_cut_on_the_right():
    assert recorded_formatting(OLD, "here") == Formatting(max_input_tokens=112, truncation="right")
    assert recorded_formatting(NEW, "here") == Formatting(max_input_tokens=112)
    assert recorded_formatting({"rank": 4}, "here") is None


def test_what_no_formatting_can_be_is_refused_with_its_place():
    with pytest.raises(ConfigError, match="here: truncation is 'top', but must be one of middle"):
        recorded_formatting({"truncation": "top"}, "here")
    assert format_record({"truncation": "top"}, {}) is None


def test_inputs_of_another_form_are_told_with_both_forms():
    records = [record_of(name, OLD) for name in ("a", "b")] + [record_of("c", {"rank": 4})]
    assert told(records) == [
        "Inputs are read with max_input_tokens 512, truncation middle, but a, b were trained with "
        "max_input_tokens 112, truncation right."
    ]
    assert told(records, Formatting(max_input_tokens=112, truncation="right")) == []


def test_many_experts_are_counted():
    (line,) = told([record_of(f"e{z}", OLD) for z in range(9)])
    assert "e0, e1, e2 and 6 more were trained with" in line


def test_how_inputs_are_cut_says_nothing_of_an_expert_whose_own_were_whole():
    whole = record_of("a", OLD, {"inputs": 9, "inputs_cut": 0})
    assert told([whole]) == []
    (line,) = told([whole], Formatting(chat=True))
    assert "in the chat template, but a was trained with max_input_tokens 112" in line
    assert len(told([record_of("a", OLD, {"inputs": 9, "inputs_cut": 1})])) == 1


@pytest.mark.parametrize("found", ["right", 5, [], {"truncation": 3}, {"chat": "no"}, {"odd": 1}])
def test_a_stranger_s_record_is_passed_over(found):
    assert told([{"name": "a", "formatting": found}]) == []
