"""Controls: whether a pool answers better because of what its experts know.

    python research/study/controls.py SUITE OUT.jsonl LIMIT ROUTERS POOL…

A line for every task of the suite, with its metric and the scores of each example, by

    base                  the base alone
    base, told            the same, with a sentence before each prompt that says what form answers
                          have: the choices if all examples have the same, else how many words
    ROUTER                the pool, by each of ROUTERS (names, with commas between)
    ROUTER, shuffled      the same with each expert's gates given to the next one
    ROUTER, random        the same with random LoRAs for the experts' own, which change the mean
                          activations as much (marks.py); gates and statistics stay

Shuffled gates are left out for routers that read none. Lines that are there, with all rows, are not
computed again. At the end the means are printed, and each row's points above the base and above
its random LoRAs, with 95 % intervals over tasks drawn again.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from held_in import read, routing_of
from tqdm.auto import tqdm

from phatgoose.config import Routing
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.open_model import loaded_base
from phatgoose.routing.routers.registry import split_routers
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources, Task

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import above
from marks import random_twin

Row = tuple[str, Pool | None, Routing | None]
READS_GATES = ("phatgoose", "discriminant-phatgoose")


def main(suite_at: str, out: str, limit: str, routers: str, *pools: str) -> None:
    """Score every task of the suite by every row."""
    pool, path = Pool.open(pools), Path(out)
    base = loaded_base(pool)
    rows = list(rows_of(pool, split_routers([routers])))
    wanted = {"base, told", *(label for label, _, _ in rows)}
    finished = {task for task, record in read(path).items() if wanted <= record.keys()}
    entries = [each for each in open_suite(suite_at).entries if each.name not in finished]
    for entry in tqdm(entries, unit="task"):
        task = entry.read(Sources(None, None))
        record: dict[str, object] = {"task": task.name}
        for label, experts, routing in rows:
            model = base.model if experts is None else compose(experts, base, routing=routing)
            try:
                asked = (
                    {label: task}
                    if experts
                    else {label: task, "base, told": told(task, int(limit))}
                )
                for name, each in asked.items():
                    settings = {"limit": int(limit), "tokenizer": base.tokenizer}
                    (score,) = evaluate(model, each, **settings).scores
                    record |= {"metric": score.metric, "n": score.n, name: round(score.score, 4)}
            finally:
                if experts is not None:
                    detach(model)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    tell([record for record in read(path).values() if wanted <= record.keys()])


def rows_of(pool: Pool, routers: list[str]) -> Iterator[Row]:
    """Each row's label, experts and routing."""
    yield "base", None, None
    shuffled = Pool(
        tuple(
            replace(expert, gates=other.gates)
            for expert, other in zip(
                pool.experts, (*pool.experts[1:], pool.experts[0]), strict=True
            )
        )
    )
    twins = Pool(tuple(random_twin(expert, 0, by_output=True) for expert in pool.experts))
    for router in routers:
        routing = routing_of(router)
        yield router, pool, routing
        if router.partition(":")[0] in READS_GATES:
            yield f"{router}, shuffled", shuffled, routing
        yield f"{router}, random", twins, routing


def told(task: Task, limit: int) -> Task:
    """`task` with the form of its answers said before each prompt."""
    rows = task.evaluation_examples(limit)
    choices = {row.choices for row in rows}
    if len(choices) == 1 and (only := choices.pop()):
        form = f"Answer with one of these: {', '.join(only)}."
    else:
        words = round(statistics.median(len(row.target.split()) for row in rows))
        form = f"Answer with {'one word' if words <= 1 else f'about {words} words'} only."
    inputs = [f"{form}\n{row.input}" for row in rows]
    both = zip(rows, inputs, strict=True)
    return replace(task, test=tuple(replace(row, input=i, passage=None) for row, i in both))


def tell(records: list[dict[str, float]]) -> None:
    """Print each row's mean over tasks, and how far it is above the base and its random LoRAs."""
    labels = [label for label in records[0] if label not in ("task", "metric", "n")]
    scores = {label: np.array([record[label] for record in records]) for label in labels}
    print(f"{len(records)} tasks, n = {sum(record['n'] for record in records)}")
    print("| row | mean | above the base | above its random LoRAs |\n|---|---|---|---|")
    for label, row in scores.items():
        random = scores.get(f"{label}, random")
        less = "" if random is None else above(row, random)
        print(f"| {label} | {100 * row.mean():.1f} | {above(row, scores['base'])} | {less} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
