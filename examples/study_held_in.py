"""Do the study's experts help at all? Each on its own task, beside the base and the routed pool.

    python examples/study_held_in.py POOL SUITE OUT.jsonl LIMIT

A line for every task: its score alone (`base`), with its own expert (`own`) and routed over the
whole pool (`phatgoose`), with n and 95 % intervals. Lines that are there are not computed again.
At the end the means are told, and their differences with intervals over tasks drawn anew.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from phatgoose.base.loading import load_base
from phatgoose.config import Formatting
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.intervals import interval_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.tasks.suites.entries import Sources
from phatgoose.tasks.suites.registry import open_suite

CUT = Formatting(truncation="right")  # as when docs/study.md was made


def main(pool_at: str, suite_at: str, out: str, limit: str) -> None:
    """Score every task of the suite three ways."""
    pool, base = Pool.open(pool_at), load_base("smollm2")
    tasks = [entry.read(Sources(None, None)) for entry in open_suite(suite_at).entries]
    path = Path(out)
    done = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    finished = {json.loads(line)["task"] for line in done}
    for task in tqdm([task for task in tasks if task.name not in finished], unit="task"):
        record: dict[str, object] = {"task": task.name}
        for label, router, expert in (
            ("base", None, None),
            ("own", "single", task.name),
            ("phatgoose", "phatgoose", None),
        ):
            if router is None:
                (score,) = evaluate(base, task, limit=int(limit), formatting=CUT).scores
            else:
                model = compose(pool, base, router=router, expert=expert)
                (score,) = evaluate(model, task, limit=int(limit), formatting=CUT).scores
                detach(model)
            record |= {"metric": score.metric, "n": score.n}
            record[label] = [round(x, 4) for x in (score.score, score.low, score.high)]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    tell([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def tell(records: list[dict[str, list[float]]]) -> None:
    """Print means over tasks in per cent and their differences in pairs."""
    scores = {
        label: 100 * np.array([r[label][0] for r in records])
        for label in ("base", "own", "phatgoose")
    }
    drawn = np.random.default_rng(0).integers(len(records), size=(10_000, len(records)))
    for label, row in scores.items():
        print(f"{label}: {row.mean():.1f} over {len(row)} tasks")
    for first, second in combinations(scores, 2):
        less = scores[second] - scores[first]
        interval = interval_of(less[drawn].mean(axis=1))
        told = f"{less.mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
        print(f"{second} - {first}: {told}, higher on {sum(less > 0)}, lower on {sum(less < 0)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
