"""What the demo says of a comparison: gains with their intervals, and lifts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from made_comparison import made_comparison
from phatgoose.apps.demo.demo import gains_of, lifts_of, write_gains


def test_gains_are_over_the_base_and_each_single_expert_the_smallest_first():
    comparison = made_comparison()
    gains = gains_of(comparison, "phatgoose")
    assert {gain.over for gain in gains} == {"base", "e0", "e1"}
    assert [gain.difference for gain in gains] == sorted(gain.difference for gain in gains)
    mean = {name: sum(r.score for r in rows.values()) for name, rows in comparison.results.items()}
    for gain in gains:
        rows = comparison.experts.get(gain.over)
        other = mean["base"] if rows is None else sum(row.score for row in rows.values())
        assert gain.difference == pytest.approx(100 * (mean["phatgoose"] - other) / 3)
        assert gain.interval.low <= gain.difference <= gain.interval.high


def test_a_row_has_no_gain_over_its_equal():
    comparison = made_comparison()
    same = replace(comparison, experts={"twin": comparison.results["twin"]})
    (twin,) = (gain for gain in gains_of(same, "phatgoose") if gain.over == "twin")
    assert (twin.difference, twin.interval.low, twin.interval.high) == (0, 0, 0)
    assert twin.in_words == "+0.0 [+0.0, +0.0] over twin"


def test_lifts_are_points_above_the_base_on_the_unseen_task_of_each_skill():
    lifts = lifts_of(made_comparison(), {"e1": "a", "e0": "b"})
    assert lifts == {"e1": pytest.approx(50), "e0": pytest.approx(50)}


def test_what_is_written_is_what_was_found(tmp_path):
    comparison = made_comparison()
    gains, lifts = gains_of(comparison, "phatgoose"), lifts_of(comparison, {"e1": "a"})
    write_gains(tmp_path / "gains.json", "phatgoose", gains, lifts, {"a": 12.5})
    found = json.loads((tmp_path / "gains.json").read_text(encoding="utf-8"))
    assert (found["router"], found["lifts"]) == ("phatgoose", lifts)
    assert found["written"] == {"a": 12.5}
    assert [each["over"] for each in found["gains"]] == [gain.over for gain in gains]
    assert found["gains"][0]["interval"]["low"] == gains[0].interval.low
