"""The tables that commands print."""

import io
import re

from rich.console import Console

from phatgoose.apps.tables import scores_table
from phatgoose.evaluation.evaluate import Evaluation, TaskScore
from phatgoose.evaluation.metrics import Sample


def test_nothing_of_a_long_task_is_lost_in_a_narrow_terminal():
    long = "_".join(f"part{number}" for number in range(12))
    sample = Sample.of(["accuracy"], [[[float(i % 2)]] for i in range(12000)])
    score = TaskScore(long, "rank classification accuracy", 0.25, 0.75, sample)
    console = Console(file=io.StringIO(), width=80)
    console.print(scores_table(Evaluation((score,)), "a model"))
    lines = [line for line in console.file.getvalue().splitlines() if line[0] in "│┃"]
    head, *rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    assert head == ["task", "metric", "score", "95 % interval", "n", "ties"]
    assert "".join(row[0] for row in rows) == f"{long}mean"
    assert rows[0][2:] == ["0.500", "0.250 to 0.750", "12000", "0"]
