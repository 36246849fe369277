"""A comparison's numbers and tables, from results written by hand; the store of finished runs."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from made_comparison import EXPERTS, RIGHT, SETTINGS, made_comparison
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.metrics import Estimate
from phatgoose.evaluation.results import Comparison, ResultStore, write_tables
from phatgoose.routing.routers.fixed import read_scores


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison()


def score(row: str, task: str) -> float:
    """A row's score on a dataset, by hand; of BLEU half the 10 n-grams match, of either order."""
    mean = float(np.mean({**RIGHT, **EXPERTS}[row][task]))
    return (mean + 0.5) / 2 if task == "c" else mean


def test_means_are_of_datasets_unweighted_and_differences_to_phatgoose(comparison):
    own = comparison.summaries["phatgoose"]
    for row in RIGHT:
        for column, tasks in comparison.columns.items():
            summary = comparison.summaries[row][column]
            mean = np.mean([score(row, task) for task in tasks])
            assert summary.mean.value == pytest.approx(mean, abs=1e-12)
            if row == "phatgoose":
                assert summary.difference is None
                continue
            between = summary.difference
            assert between.value == summary.mean.value - own[column].mean.value
            assert between.low <= between.value <= between.high
            if row == "twin":  # equal in every resample
                assert (summary.mean, between) == (own[column].mean, Estimate(0, 0, 0))


def test_tables_have_a_cell_per_column_in_every_row(comparison):
    rows = ["Base model", "PHATGOOSE", "twin", "my|own", "Best Individual *", "Oracle *"]
    means, differences, scores = comparison.means(), comparison.differences(), comparison.scores()
    for table, head, named in (
        (means, ["one (2)", "two (2)", "all datasets (3)"], rows),
        (differences, ["one", "two", "all datasets"], [rows[0], *rows[2:]]),
        (scores, ["a (n=4)", "b (n=6)", "c (n=2)", "mean"], [rows[0], "e0", "e1", *rows[1:]]),
    ):
        assert table.head == ["method", *head]
        assert [row[0] for row in table.rows] == named
        assert {len(row) for row in table.rows} == {len(table.head)}
        assert table.markdown() in comparison.to_markdown()
    base = comparison.summaries["base"]["one"]
    low, high = 100 * base.mean.low, 100 * base.mean.high
    assert means.rows[0][1] == f"29.2 [{low:.0f}, {high:.0f}]"  # (1/4 + 2/6) / 2
    assert differences.rows[0][1].startswith("-41.7 [")
    assert scores.rows[0][1] == "25.0 ±50"
    lines = comparison.to_markdown().splitlines()
    assert {"Note: Retrieval was left out.", "Best Individual: e1."} < set(lines)
    assert "Oracle: e1 for a, e0 for b, e1 for c." in lines
    assert sum("not zero-shot" in line for line in lines) == 2


def test_no_name_is_html_or_a_border_in_markdown(comparison):
    """A dataset has its file's name, and a base the one that experts give it."""
    odd = {**SETTINGS, "base": {"id": "<img src=x>"}}
    text = replace(comparison, suites={"<scr|pt>": ("a", "b")}, settings=odd).to_markdown()
    assert "<" not in text
    assert "Base &lt;img src=x&gt; in" in text
    assert r"| &lt;scr\|pt&gt; (2) |" in text
    assert r"| my\|own |" in text


def test_the_files_hold_everything_and_the_experts_scores_can_be_read_back(comparison, tmp_path):
    write_tables(comparison, tmp_path / "new")
    assert (tmp_path / "new/comparison.md").read_text() == comparison.to_markdown()
    content = json.loads((tmp_path / "new/comparison.json").read_text())
    assert content["settings"] == SETTINGS
    assert content["suites"] == {"one": ["a", "b"], "two": ["b", "c"]}
    assert content["choices"]["oracle"] == {"a": "e1", "b": "e0", "c": "e1"}
    row = content["rows"]["my|own"]
    assert row["summary"]["two"] == asdict(comparison.summaries["my|own"]["two"])
    cell = row["datasets"]["c"]
    assert cell["by_metric"] == pytest.approx({"rouge-l": 0.5, "bleu": 0.5})
    assert {"metric": "ROUGE-L + BLEU", "low": 0.1, "high": 0.9, "n": 2}.items() <= cell.items()
    scores = read_scores(tmp_path / "new/comparison.json")
    assert scores.keys() == EXPERTS.keys()
    for expert, by_task in scores.items():
        assert by_task == pytest.approx({task: score(expert, task) for task in "abc"})


# The store

KEY = {"task": "a", "method": {"k": 2, "pool": ["x", "y"]}}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.fixture
def filled(path) -> Path:
    store = ResultStore(path)
    for number in range(3):
        store.add({"n": number}, {"score": number / 7})
    return path


def test_what_was_added_is_there_now_and_later(path):
    marks = "ü \n \u2028 \x85 \x1e \r \x0b"  # some of these end a line for str.splitlines
    store = ResultStore(path)
    assert not path.exists()
    store.add(KEY, {"score": 0.1, "answers": [marks]})
    for each in (store, ResultStore(path)):
        assert each.get(KEY) == {"score": 0.1, "answers": [marks]}
    turned = {"method": {"pool": ("x", "y"), "k": 2}, "task": "a"}
    assert ResultStore(path).get(turned) is not None
    for other in ({**KEY, "task": "b"}, {**KEY, "method": {"k": 1, "pool": ["x", "y"]}}, {}):
        assert ResultStore(path).get(other) is None


@pytest.mark.parametrize("cut", [1, 30])
def test_a_last_line_that_was_cut_off_goes_with_a_warning_once_something_is_added(filled, cut):
    whole = filled.read_bytes()
    filled.write_bytes(whole[:-cut])  # it may be another process that is writing it now
    with pytest.warns(UserWarning, match=r"results\.jsonl: the last result was cut off; dropped"):
        store = ResultStore(filled)
    assert [store.get({"n": n}) is None for n in range(3)] == [False, False, True]
    assert filled.read_bytes() == whole[:-cut]
    store.add({"n": 2}, {"score": 2 / 7})
    assert filled.read_bytes() == whole


def test_of_two_who_want_to_add_results_the_second_is_told(path):
    another = pytest.raises(EvaluationError, match="Another process is adding results to")
    with ResultStore.alone(path) as first:
        first.add({"n": 0}, {})
        with another, ResultStore.alone(path):
            pass
        assert ResultStore(path).get({"n": 0}) == {}  # reading is for everyone
    with ResultStore.alone(path):
        pass


@pytest.mark.parametrize("line", [b"{not json", b"", b'{"key": {}}', b"\xff\xfe"])
def test_a_broken_line_among_others_names_the_file(filled, line):
    filled.write_bytes(content := line + b"\n" + filled.read_bytes())
    with pytest.raises(EvaluationError, match=rf"{re.escape(str(filled))} is not valid"):
        ResultStore(filled)
    assert filled.read_bytes() == content  # left as it was


def test_a_place_that_cannot_be_written_is_told_and_no_link_is_followed(path, tmp_path):
    (tmp_path / "file").write_text("")
    path.symlink_to(tmp_path / "file")
    store = ResultStore(path)
    with pytest.raises(EvaluationError, match=r"results\.jsonl can't be written"):
        store.add(KEY, {})
    assert store.get(KEY) is None
    assert (tmp_path / "file").read_text() == ""
