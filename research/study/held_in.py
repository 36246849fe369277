"""Do the study's experts help at all? Each on its own task, beside the base and the routed pool.

    python research/study/held_in.py SUITE OUT.jsonl LIMIT ROUTERS POOL…

A line for every task that has an expert: the base's score (`base`), its own expert's (`own`) and
those of the whole pool routed by each of ROUTERS (names or recipes, with commas between; none if
that is ""), with n and 95 % intervals, and the `gain` of own over base with its interval over
examples in pairs. Lines that are there, with all ROUTERS, are not computed again. At the end a
table is told, the means, and their differences with intervals over tasks drawn anew.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from phatgoose.apps.cli.options import read_recipe
from phatgoose.apps.server.settings import served_models
from phatgoose.config import Routing, from_mapping
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.intervals import Sample, SharedMeans, interval_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.open_model import loaded_base
from phatgoose.routing.routers.registry import split_routers
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources


def main(suite_at: str, out: str, limit: str, routers: str, *pools: str) -> None:
    """Score every task of the suite that an expert was trained on."""
    pool, path = Pool.open(pools), Path(out)
    base = loaded_base(pool)
    entries = [entry for entry in open_suite(suite_at).entries if entry.name in pool.names]
    named = split_routers([routers])
    wanted = {"base", "own", *named}
    finished = {task for task, record in read(path).items() if wanted <= record.keys()}
    for entry in tqdm([entry for entry in entries if entry.name not in finished], unit="task"):
        task = entry.read(Sources(None, None))
        record: dict[str, object] = {"task": task.name}
        rows = {"base": None, "own": Routing(router=f"single:expert={task.name}")}
        rows |= {name: routing_of(name) for name in named}
        samples = {}
        for label, routing in rows.items():
            model = base.model if routing is None else compose(pool, base, routing=routing)
            (score,) = evaluate(model, task, limit=int(limit), tokenizer=base.tokenizer).scores
            if routing is not None:
                detach(model)
            record |= {"metric": score.metric, "n": score.n}
            samples[label] = score.sample
            record[label] = [round(x, 4) for x in (score.score, score.low, score.high)]
        record["gain"] = gain(samples["own"], samples["base"])
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    tell([record for record in read(path).values() if wanted <= record.keys()])


def read(path: Path) -> dict[str, dict[str, list[float]]]:
    """The last record of each task in the file at `path`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record["task"]: record for record in map(json.loads, lines)}


def routing_of(router: str) -> Routing:
    """A router by its name, with its usual settings or others, or by the [routing] of a recipe."""
    if router.endswith(".toml"):
        return from_mapping(Routing, read_recipe(router).tables["routing"], router)
    (served,) = served_models([f"pool=pool?router={router.replace('?', '&')}"])
    assert served.routing is not None  # the query names one
    return served.routing


def gain(own: Sample, base: Sample) -> list[float]:
    """How much higher `own` scores, and the interval over the same examples drawn anew."""
    more, within = SharedMeans.of({"own": [own], "base": [base]}).gain("own", "base")
    return [round(x, 4) for x in (more, within.low, within.high)]


def tell(records: list[dict[str, list[float]]]) -> None:
    """Print a table of all tasks, means over them in per cent, and their differences in pairs."""
    common = set.intersection(*(set(record) for record in records))
    labels = [label for label in records[0] if label in common - {"task", "metric", "n", "gain"}]
    print("| task | metric | " + " | ".join(labels) + " | gain |")
    print("|---|---|" + "---|" * (len(labels) + 1))
    for record in records:
        cells = [f"{100 * record[label][0]:.0f}" for label in labels]
        more, low, high = (100 * x for x in record["gain"])
        cells.append(f"{more:+.0f} [{low:+.0f}, {high:+.0f}]" + ("" if low > 0 else " (not clear)"))
        print(f"| {record['task']} | {record['metric']} | " + " | ".join(cells) + " |")
    scores = {label: 100 * np.array([r[label][0] for r in records]) for label in labels}
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
