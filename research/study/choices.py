"""What each part of router discriminant brings, of one expert an input.

    python research/study/choices.py POOL SUITE LIMIT RESULTS.jsonl OUT.md

RESULTS is that of a comparison of the same pool, suite and limit in which every single expert was
scored. The base reads each prompt once; every setting below then chooses an expert for it, whose
answer is there. Mean scores over datasets in per cent, with 95 % intervals, and the difference to
the first setting in pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from phatgoose.base import Base, load_base
from phatgoose.evaluation.compare import run_of
from phatgoose.evaluation.evaluate import EvaluationSet, ScoringSettings
from phatgoose.evaluation.intervals import Sample, SharedMeans
from phatgoose.evaluation.results import ResultStore
from phatgoose.evaluation.rows import single_rows
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PromptStates
from phatgoose.routing.open_model import open_prompt_router
from phatgoose.routing.routers.configs import Discriminant
from phatgoose.routing.routers.discriminant import PromptDiscriminant
from phatgoose.routing.routers.registry import ROUTERS, RouterChoice
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.prompt_passes import read_prompts
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources

THIRDS = {"first third": (0.0, 0.34), "second third": (0.34, 0.67), "last third": (0.67, 1.0)}
SETTINGS = {
    f"{place}, {where}, shrinkage {shrinkage:g}, task variance {variance:g}": Discriminant(
        place=place,
        first=first,
        last=last,
        shrinkage=shrinkage,
        task_variance=variance,
    )
    for place in ("both", "whole", "end")
    for where, (first, last) in {"all blocks": (0.0, 1.0), **THIRDS}.items()
    for shrinkage in (0.1, 0.3, 0.9, 1.0)
    for variance in (0.0, 0.1, 1.0)
}


def main(pool_at: str, suite_at: str, limit: str, results: str, out: str) -> None:
    """Write the table."""
    base, pool = load_base("smollm2"), Pool.open(pool_at)
    settings = ScoringSettings(limit=int(limit))
    tasks = open_suite(suite_at).load(Sources(None, None))
    datasets = [EvaluationSet.of(task, settings) for task in tasks]
    samples: dict[str, list[Sample]] = {name: [] for name in (*SETTINGS, "Oracle")}
    states = [states_of(base, dataset) for dataset in datasets]
    chosen = choices(pool, torch.cat(states))
    first = 0
    with ResultStore.alone(Path(results)) as store:
        for dataset, seen in zip(datasets, states, strict=True):
            marks = answers(store, pool, base, dataset)
            for name, experts in chosen.items():
                own = experts[first : first + len(seen)]
                rows = [marks[z][i] for i, z in enumerate(own)]
                samples[name].append(Sample.of(dataset.metrics, rows))
            first += len(seen)
            alone = [Sample.of(dataset.metrics, each) for each in marks]
            samples["Oracle"].append(max(alone, key=lambda sample: sample.score))
    Path(out).write_text(table(samples), encoding="utf-8")


def answers(store: ResultStore, pool: Pool, base: Base, dataset: EvaluationSet) -> list[list]:
    """The marks of each expert's answers. Ends when an expert hasn't answered."""
    found = []
    for row in single_rows(pool):
        stored = store.get(run_of(row, dataset, base).key)
        if stored is None:
            sys.exit(f"{row.name} has not answered {dataset.name} in this comparison.")
        found.append(stored["marks"])
    return found


def states_of(base: Base, dataset: EvaluationSet) -> torch.Tensor:
    """What the base makes of the prompts, [prompts, places, blocks, d]."""
    encoder = Encoder.of(base, dataset.settings.formatting)
    prompts = [encoder.fitted(each.input, each.passage).tokens for each in dataset.examples]
    return read_prompts(base.model.eval(), prompts, PromptStates(base.model))


def choices(pool: Pool, states: torch.Tensor) -> dict[str, list[int]]:
    """The expert of each prompt, by setting."""
    found = {}
    for name, config in SETTINGS.items():
        router = RouterChoice(ROUTERS["discriminant"], config).text
        reader = open_prompt_router(pool, router=router)
        assert isinstance(reader, PromptDiscriminant)
        found[name] = reader.scores(states[:, :, reader.blocks]).argmax(dim=1).tolist()
    return found


def table(samples: dict[str, list[Sample]]) -> str:
    """Means and differences, highest first, as Markdown."""
    means, first = SharedMeans.of(samples), next(iter(samples))
    lines = [f"| setting | mean | difference to {first} |", "|---|---|---|"]
    for name, mean in sorted(means.value.items(), key=lambda item: -item[1]):
        own, (more, less) = means.interval(name), means.gain(name, first)
        lines.append(
            f"| {name} | {100 * mean:.1f} [{100 * own.low:.0f}, {100 * own.high:.0f}] | "
            f"{100 * more:+.1f} [{100 * less.low:+.1f}, {100 * less.high:+.1f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
