"""research/study/report.py: what of a comparison may be committed, and its tables."""

from __future__ import annotations

import json
import runpy

import pytest

from paths import ROOT
from phatgoose.evaluation.comparison.result_store import ResultStore

PROGRAM = ROOT / "research" / "study" / "report.py"


@pytest.fixture
def report():
    return runpy.run_path(str(PROGRAM))


def add(store: ResultStore, method: dict, task: str, right: list[int]) -> None:
    key = {"base": "b", "dtype": "d", "method": method, "task": task, "examples": "e", "code": "c"}
    score = sum(right) / len(right)
    store.add(
        key,
        {
            "metric": "rank classification accuracy",
            "metrics": ["accuracy"],
            "score": score,
            "n": len(right),
            "low": max(0.0, score - 0.1),
            "high": min(1.0, score + 0.1),
            "seconds": 1.0,
            "answers": ["a text that is not ours"] * len(right),
            "marks": [[[float(r)]] for r in right],
        },
    )


@pytest.fixture
def results(tmp_path):
    """Two datasets, PHATGOOSE plain and centred, base, in a pool of two."""
    store = ResultStore(tmp_path / "results.jsonl")
    pool = ["aaaaaaaa", "bbbbbbbb"]
    plain = {"router": "phatgoose", "k": 2, "affinity": "standardised", "pool": pool}
    for task, base, first, second in (
        ("t1", [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]),
        ("t2", [1, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]),
    ):
        add(store, {"model": "base"}, task, base)
        add(store, plain, task, first)
        add(store, {**plain, "affinity": "centred"}, task, second)
        add(store, {**plain, "pool": pool[:1]}, task, first)
        add(store, {**plain, "pool": pool[1:]}, task, second)
        add(store, {**plain, "pool": ["cccccccc", "dddddddd"]}, task, second)
    return tmp_path / "results.jsonl"


def test_cells_hold_no_answers_but_whatever_tables_need(report, results, tmp_path, capsys):
    report["main"](["cells", str(tmp_path / "cells.jsonl"), str(results)])
    written = (tmp_path / "cells.jsonl").read_text()
    assert "not ours" not in written
    assert len(written.splitlines()) == 12
    for source in (results, tmp_path / "cells.jsonl"):
        report["main"](["variants", str(source), str(tmp_path / f"{source.stem}.md")])
    table = (tmp_path / "cells.md").read_text()
    assert table == (tmp_path / "results.md").read_text()
    rows = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert "| 50 | 50 |" in rows["| PHATGOOSE"]
    assert "+37.5 [" in rows["| PHATGOOSE, affinity = centred"]
    assert "-12.5 [" in rows["| Base model"]
    assert "| PHATGOOSE, 1 experts (draw 1)" in rows
    assert "| PHATGOOSE, 1 experts (draw 2)" in rows
    assert "+37.5 [" in rows["| PHATGOOSE, another pool"]  # of a reference model


def test_cells_of_small_pools_are_left_out_where_asked(report, results, tmp_path, capsys):
    add(ResultStore(results), {"router": "arrow", "k": 2, "pool": ["a" * 8, "b" * 8]}, "t1", [1])
    report["main"](["whole", str(tmp_path / "few.jsonl"), str(results)])
    sizes = [
        len(json.loads(line)["key"]["method"].get("pool", ()))
        for line in (tmp_path / "few.jsonl").read_text().splitlines()
    ]
    assert sorted(sizes) == [0, 0, 2, 2, 2, 2, 2, 2]


def test_models_that_were_scored_on_all_datasets_stand_together(report, results, tmp_path, capsys):
    add(ResultStore(results), {"model": "base"}, "t3", [1, 1, 1, 1])
    plain = {"router": "phatgoose", "k": 2, "affinity": "standardised", "pool": ["a" * 8, "b" * 8]}
    add(ResultStore(results), plain, "t3", [1, 1, 0, 0])
    report["main"](["together", str(results), str(tmp_path / "t.md")])
    head, _, *rows = (tmp_path / "t.md").read_text().splitlines()
    assert "mean of 3" in head
    assert [row.split(" | ")[0] for row in rows] == ["| Base model", "| PHATGOOSE"]
    assert "+8.3 [" in rows[0]  # two thirds less seven twelfths
    report["main"](["together", str(results), str(tmp_path / "t.md"), "t3", "t2"])
    head, _, *rows = (tmp_path / "t.md").read_text().splitlines()
    assert "mean of 1" in head
    assert "-25.0 [" in rows[0]
    report["main"](["datasets", str(results), str(tmp_path / "d.md")])
    assert (tmp_path / "d.md").read_text().splitlines() == [
        "| dataset | n | Base model | PHATGOOSE |",
        "|---|---|---|---|",
        "| t1 | 4 | 25 | 50 |",
        "| t2 | 4 | 50 | 50 |",
        "| t3 | 4 | 100 | 50 |",
    ]


def test_only_datasets_above_chance_count_there(report, results, tmp_path, capsys):
    tasks = [{"name": "t1", "chance_accuracy": 0.5}, {"name": "t2", "chance_accuracy": None}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    report["main"](["above-chance", str(results), str(tmp_path / "tasks.json")])
    told = capsys.readouterr().out
    assert "above chance: 1 of 2: t2" in told
    assert "PHATGOOSE: all 50.0, above chance 50.0" in told


def test_cells_of_several_files_are_told_apart_by_their_labels(report, results, tmp_path, capsys):
    other = ResultStore(tmp_path / "other" / "results.jsonl")
    method = {"router": "phatgoose", "k": 2, "affinity": "standardised", "pool": ["c", "d"]}
    for task in ("t1", "t2"):
        add(other, method, task, [1, 1, 1, 1])
    cells = tmp_path / "cells.jsonl"
    report["main"](["cells", str(cells), str(results), f"400 gate steps={other.path}"])
    report["main"](["variants", str(cells), str(tmp_path / "cells.md")])
    told = (tmp_path / "cells.md").read_text()
    row = next(r for r in told.splitlines() if r.startswith("| PHATGOOSE, 400 gate steps | 100.0"))
    assert "+50.0 [" in row


def test_figures_are_drawn_and_unknown_commands_are_refused(report, results, tmp_path, capsys):
    assert report["main"](["nothing", "a", "b"]) == 2
    for command in ("figure", "sizes"):
        assert report["main"]([command, str(results), str(tmp_path / f"{command}.png")]) == 0
        assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    report["main"].__globals__["pool_size_figure"] = drawn.append
    report["main"].__globals__["write_png"] = lambda *_: None
    report["main"](["sizes", str(results), "-", "1"])
    report["main"](["sizes", str(results), "-"])
    assert drawn[0] == []
    assert [sorted(curve.scores) for curve in drawn[1]] == [[1, 2]]


def test_of_an_analysis_the_numbers_of_whole_models_are_kept(report, tmp_path):
    found = {name: {} for name in ("settings", "oracle", "divergences", "correlations")}
    found |= {"agreements": [{"first": 0.5}], "routers": {"phatgoose": {"datasets": "long"}}}
    (tmp_path / "analysis.json").write_text(json.dumps(found))
    report["main"](["analysis", str(tmp_path / "analysis.json"), str(tmp_path / "kept.json")])
    del found["routers"]
    assert json.loads((tmp_path / "kept.json").read_text()) == found


def test_oracle_is_chosen_on_other_examples_than_it_is_scored_on(report, tmp_path, capsys):
    store = ResultStore(tmp_path / "results.jsonl")
    add(store, {"model": "base"}, "t", [1, 0, 0, 0])
    for expert, right in (("a", [1, 0, 1, 0]), ("b", [0, 1, 0, 0])):
        add(store, {"router": "single", "pool": [expert * 8]}, "t", right)
    report["main"](["variants", str(store.path), str(tmp_path / "t.md"), "Oracle *"])
    rows = {line.split(" | ")[0]: line for line in (tmp_path / "t.md").read_text().splitlines()}
    assert "| Oracle * | 50.0 [" in rows["| Oracle *"]
    assert "| -50.0 [" in rows["| Oracle, chosen on the other half *"]
    assert "| -25.0 [" in rows["| Base model"]
    assert len(rows) == 5


def test_a_habit_is_worth_chance_where_every_place_counts_alike(report, tmp_path, capsys):
    folder = tmp_path / "suite"
    folder.mkdir()
    rows = [
        {"input": f"{i}?", "target": "no" if i else "yes", "choices": ["yes", "no"]}
        for i in range(4)
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = ResultStore(tmp_path / "results.jsonl")
    drawn = report["open_suite"](folder).load(report["Sources"](None, None))[0]
    targets = [example.target for example in drawn.evaluation_examples(4, 0)]
    add(store, {"model": "base"}, "t", [int(target == "no") for target in targets])
    report["main"](["variants", str(store.path), str(tmp_path / "plain.md")])
    report["main"](["balanced", str(store.path), str(tmp_path / "b.md"), f"{folder}=4"])
    assert "| Base model | 75.0 [" in (tmp_path / "plain.md").read_text()
    assert "| Base model | 50.0 [" in (tmp_path / "b.md").read_text()
