"""A comparison's numbers and its tables, from results written down by hand."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from made_comparison import EXPERTS, RIGHT, SETTINGS, SUITES, made_comparison
from phatgoose.evaluation.comparison.tables import ALL, Comparison, write_tables
from phatgoose.evaluation.intervals import Interval
from phatgoose.routing.routers.router import read_scores


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Four rows and two derived ones on two suites that share dataset b."""
    return made_comparison()


def score(row: str, task: str) -> float:
    """A row's score on a dataset, by hand; of BLEU half the 10 n-grams match, of either order."""
    marks = {**RIGHT, **EXPERTS}[row][task]
    bleu = [0.5] if task == "c" else []
    return float(np.mean([np.mean(marks), *bleu]))


def test_columns_are_the_suites_and_then_all_datasets_once(comparison):
    assert comparison.columns == {**SUITES, ALL: ("a", "b", "c")}
    assert list(comparison.columns) == ["one", "two", "all datasets"]
    single = replace(comparison, suites={"one": ("a", "b")})
    assert single.columns == {"one": ("a", "b")}


@pytest.mark.parametrize("row", list(RIGHT))
def test_a_mean_is_that_of_datasets_unweighted(comparison, row):
    for column, tasks in comparison.columns.items():
        mean = comparison.summaries[row][column].mean
        assert mean == pytest.approx(np.mean([score(row, task) for task in tasks]), abs=1e-12)


def test_differences_are_to_phatgoose_which_has_none(comparison):
    for column, own in comparison.summaries["phatgoose"].items():
        assert (own.difference, own.difference_interval) == (None, None)
        for row in ("base", "my|own", "oracle", "best-individual"):
            other = comparison.summaries[row][column]
            assert other.difference == other.mean - own.mean
            assert other.difference_interval.low <= other.difference
            assert other.difference <= other.difference_interval.high


def test_equal_rows_differ_by_nothing_in_any_resample(comparison):
    for column in comparison.columns:
        twin, own = (comparison.summaries[row][column] for row in ("twin", "phatgoose"))
        assert (twin.mean, twin.interval) == (own.mean, own.interval)
        assert (twin.difference, twin.difference_interval) == (0, Interval(0, 0))


def markdown_rows(line: str) -> list[str]:
    """The cells of a table's line; an escaped | is no border."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return [cell.replace("\0", "|").strip() for cell in line.replace(r"\|", "\0").split("|")[1:-1]]


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table in the text, as rows of cells, without the line below its header."""
    found = []
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            head, rule, *rows = block.splitlines()
            assert set(rule) == {"|", "-"}
            assert rule.count("|") == len(markdown_rows(head)) + 1
            found.append([markdown_rows(head), *map(markdown_rows, rows)])
    return found


def test_markdown_tables_have_a_cell_per_column_in_every_row(comparison):
    means, differences, datasets, _ = tables(comparison.to_markdown())
    assert means[0] == ["method", "one (2)", "two (2)", "all datasets (3)"]
    assert differences[0] == ["method", "one", "two", "all datasets"]
    assert datasets[0] == ["method", "a (n=4)", "b (n=6)", "c (n=2)"]
    for table in (means, differences, datasets):
        assert {len(row) for row in table} == {4}
    rows = ["Base model", "**PHATGOOSE**", "twin", "my|own", "Best Individual *", "Oracle *"]
    assert [row[0] for row in means[1:]] == rows
    assert [row[0] for row in differences[1:]] == [row for row in rows if "PHAT" not in row]
    assert [row[0] for row in datasets[1:]] == [*rows, "e0", "e1"]


def test_a_bar_in_any_name_is_escaped(comparison):
    suites = {"on|e": ("a", "b"), "two": ("b", "c")}
    text = replace(comparison, suites=suites).to_markdown()
    means, differences, *_ = tables(text)
    assert {len(row) for row in (*means, *differences)} == {4}
    assert r"| my\|own |" in text
    assert r"| on\|e (2) |" in text


def test_no_name_is_html_in_markdown(comparison):
    """A dataset has its file's name, and a base the one that experts give it."""
    odd = {**SETTINGS, "base": {"id": "<img src=x>"}}
    text = replace(comparison, suites={"<script>": ("a", "b")}, settings=odd).to_markdown()
    assert "<" not in text
    assert "Base &lt;img src=x&gt; in" in text


def test_markdown_gives_per_cent_and_points(comparison):
    means, differences, datasets, _ = tables(comparison.to_markdown())
    base, own = (comparison.summaries[row]["one"] for row in ("base", "phatgoose"))
    low, high = 100 * base.interval.low, 100 * base.interval.high
    assert means[1][1] == f"29.2 [{low:.0f}, {high:.0f}]"  # (1/4 + 2/6) / 2
    assert (base.mean, own.mean) == pytest.approx((7 / 24, 17 / 24))
    low, high = (100 * end for end in vars(base.difference_interval).values())
    assert differences[1][1] == f"-41.7 [{low:+.1f}, {high:+.1f}]"
    assert differences[2][1:] == ["+0.0 [+0.0, +0.0]"] * 3  # the twin
    assert datasets[1][1] == "25.0 [0, 100]"


def test_markdown_tells_notes_choices_and_what_the_star_means(comparison):
    lines = comparison.to_markdown().splitlines()
    assert "Note: Retrieval was left out." in lines
    assert "Best Individual: e1." in lines
    assert "Oracle: e1 for a, e0 for b, e1 for c." in lines
    assert sum("not zero-shot" in line for line in lines) == 1
    plain = replace(comparison, choices={}, experts={}, notes=())
    assert "zero-shot" not in plain.to_markdown()
    assert "Note" not in plain.to_markdown()
    assert not any(line.startswith("* ") for line in lines)  # that would be a list


def test_csv_has_a_line_for_every_row_and_dataset_of_every_suite(comparison):
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    everyone = {**comparison.results, **comparison.experts}
    wanted = [
        (row, suite, task) for row in everyone for suite, tasks in SUITES.items() for task in tasks
    ]
    assert [(row["method"], row["suite"], row["dataset"]) for row in rows] == wanted
    for row in rows:
        result = everyone[row["method"]][row["dataset"]]
        assert row["metric"] == result.metric
        assert float(row["score"]) == pytest.approx(result.score, abs=1e-6)
        assert (float(row["low"]), float(row["high"])) == (result.low, result.high)
        assert (int(row["n"]), int(row["ties"])) == (result.n, result.ties)
        assert float(row["seconds"]) == 1.5


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff20"])
def test_no_cell_of_the_csv_is_a_formula(comparison, first):
    name = f'{first}HYPERLINK("http://evil")'
    results = {row: {name: found["a"]} for row, found in comparison.results.items()}
    named = replace(comparison, suites={name: (name,)}, results=results, experts={})
    rows = list(csv.reader(io.StringIO(named.to_csv(), newline="")))[1:]
    assert {tuple(row[1:3]) for row in rows} == {(f"'{name}", f"'{name}")}


def test_json_holds_everything(comparison):
    content = json.loads(json.dumps(comparison.to_dict()))
    assert content["settings"] == SETTINGS
    assert content["notes"] == ["Retrieval was left out."]
    assert content["confidence"] == 0.95
    assert content["suites"] == {"one": ["a", "b"], "two": ["b", "c"]}
    assert content["choices"]["oracle"] == {"a": "e1", "b": "e0", "c": "e1"}
    assert list(content["rows"]) == list(comparison.results)
    row = content["rows"]["my|own"]
    assert row["label"] == "my|own"
    summary = comparison.summaries["my|own"]["two"]
    assert row["summary"]["two"] == {
        "mean": summary.mean,
        "interval": vars(summary.interval),
        "difference": summary.difference,
        "difference_interval": vars(summary.difference_interval),
    }
    cell = row["datasets"]["c"]
    assert cell["by_metric"] == pytest.approx({"rouge-l": 0.5, "bleu": 0.5})
    assert cell["score"] == comparison.results["my|own"]["c"].score == pytest.approx(0.5)
    assert {key: cell[key] for key in ("metric", "low", "high", "n", "ties", "seconds")} == {
        "metric": "ROUGE-L + BLEU",
        "low": 0.1,
        "high": 0.9,
        "n": 2,
        "ties": 0,
        "seconds": 1.5,
    }


def test_the_files_are_written_and_the_experts_scores_can_be_read_back(comparison, tmp_path):
    write_tables(comparison, tmp_path / "new")
    names = ["comparison.csv", "comparison.json", "comparison.md"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert (tmp_path / "new/comparison.md").read_text() == comparison.to_markdown()
    assert (tmp_path / "new/comparison.csv").read_text() == comparison.to_csv()
    assert json.loads((tmp_path / "new/comparison.json").read_text()) == comparison.to_dict()
    scores = read_scores(tmp_path / "new/comparison.json")
    assert scores.keys() == EXPERTS.keys()
    for expert, by_task in scores.items():
        assert by_task == pytest.approx({task: score(expert, task) for task in "abc"})
