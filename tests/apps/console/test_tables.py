"""The tables that commands print."""

import io

from rich.console import Console

from phatgoose.apps.tables import (
    pool_table,
    scores_table,
)
from phatgoose.evaluation.evaluate import Evaluation, TaskScore
from phatgoose.evaluation.metrics import Sample
from routed_models import with_embeddings


def printed(table, width: int = 200) -> list[list[str]]:
    """The cells of a table's lines, as a terminal of so many columns shows them."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith(("│", "┃"))]
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines
    ]


def test_a_pool_fits_a_narrow_terminal_with_whole_headers(llama_mixed):
    pool = with_embeddings(llama_mixed)
    head, *rows = printed(pool_table(pool), width=80)
    assert head == ["expert", "kind", "sites", "sizes", "shares", "folder"]
    for expert in pool.experts:
        assert expert.name in [row[0] for row in rows]
    words = " ".join(row[4] for row in rows)
    assert words.count("gates") == len(pool)
    assert "1 embeddings" in words


def test_nothing_of_a_long_task_is_lost_in_a_narrow_terminal():
    long = "_".join(f"part{number}" for number in range(12))
    sample = Sample.of(["accuracy"], [[[float(i % 2)]] for i in range(12000)])
    score = TaskScore(long, "rank classification accuracy", 0.25, 0.75, sample)
    head, *rows = printed(scores_table(Evaluation((score,)), "a model"), width=80)
    assert head == ["task", "metric", "score", "95 % interval", "n", "ties"]
    assert "".join(row[0] for row in rows) == f"{long}mean"
    assert rows[0][2:] == ["0.500", "0.250 to 0.750", "12000", "0"]
