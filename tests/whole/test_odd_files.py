"""Files of strangers that are valid and yet odd: each is one line, never a traceback."""

from __future__ import annotations

import json

import pytest

from odd_files import nested, one_line_of, rewrite
from phatgoose.errors import ExpertError, TaskError
from phatgoose.evaluation.comparison.result_store import ResultStore
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.files.strict import MOST_NESTED
from phatgoose.tasks.loading import load_task

DEPTHS = [MOST_NESTED + 1, 500, 900, 100_000]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("key", ["task", "hyperparameters", "metrics"])
def test_deep_records_are_refused_when_read_and_not_when_saved(golden_copy, depth, key):
    text = (golden_copy / LAYOUT.info).read_text()
    record = json.dumps({key: {"deep": "@"}})[1:-1].replace('"@"', nested(depth - 2))
    content = {k: v for k, v in json.loads(text).items() if k != key}
    (golden_copy / LAYOUT.info).write_text(json.dumps(content)[:-1] + ", " + record + "}")
    assert "nested too deeply" in one_line_of(lambda: Expert.load(golden_copy), ExpertError)


def test_records_as_deep_as_may_be_are_saved_and_read_again(golden_copy, tmp_path):
    inner: object = 1
    for _ in range(MOST_NESTED - 2):
        inner = [inner]
    rewrite(golden_copy / LAYOUT.info, metrics={"deep": inner})
    again = Expert.load(golden_copy).save(tmp_path / "again")
    assert again.info.metrics == {"deep": inner}


@pytest.mark.parametrize("line", [nested(100_000), "9" * 5000, '{"input": ' + "9" * 5000 + "}"])
def test_odd_lines_of_tasks_and_results_are_one_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    one_line_of(lambda: load_task(tmp_path / "a.jsonl"), TaskError)
    one_line_of(lambda: ResultStore(tmp_path / "a.jsonl"))
