"""An analysis's result and its JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from routing_samples import make_analysis


def test_the_json_holds_the_numbers_and_no_text_of_the_data(found, tmp_path):
    found.write_json(tmp_path / "analysis.json")
    content = (tmp_path / "analysis.json").read_text()
    data = json.loads(content)
    assert data["experts"] == ["e0", "e1", "e2", "e3"]
    assert len(data["divergences"]) == 3 * 2 * 2  # each router to each other one, on two datasets
    profile = found.routers["arrow"].distributions["first"]
    assert data["routers"]["arrow"]["datasets"]["first"]["weight"] == profile.whole().tolist()
    assert data["leave_one_out"][0]["expert"] == found.effects[0].expert
    assert "first 0 is" not in content
    assert "NaN" not in content


def test_made_up_analyses_have_all_the_numbers_too():
    analysis = make_analysis(8)
    assert analysis.correlation("phatgoose").n == 4
    assert json.dumps(analysis.to_dict(), allow_nan=False)
    assert replace(analysis, oracle={}).correlation("phatgoose") is None
