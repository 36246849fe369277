"""The share of an expert's own prompts that a router for whole inputs gives to that expert.

    python research/study/own_choices.py SUITE LIMIT ROUTERS POOL…

Of each task of the suite that an expert was trained on, the share of LIMIT evaluation prompts whose
first expert is the task's own; ROUTERS as for study_held_in.py. A table and means are told.
"""

from __future__ import annotations

import sys

from held_in import routing_of

from phatgoose.base import load_base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.registry import split_routers
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources


def main(suite: str, limit: str, routers: str, *pools: str) -> None:
    """Tell the shares of every task and their mean."""
    pool, base, named = Pool.open(pools), load_base("smollm2"), split_routers([routers])
    entries = [entry for entry in open_suite(suite).entries if entry.name in pool.names]
    prompts, encoder = dict[str, list[list[int]]](), Encoder.of(base)
    for entry in entries:
        drawn = entry.read(Sources(None, None)).evaluation_examples(int(limit), 0)
        prompts[entry.name] = [pair.prompt for pair in encoder.pairs(drawn)]
    shares: dict[str, dict[str, float]] = {}
    for router in named:
        model = compose(pool, base, routing=routing_of(router))
        chooser = composition_of(model).prompt_router
        if chooser is None or not chooser.chooses:
            raise SystemExit(f"Router {router} doesn't choose for whole inputs.")
        chosen = {
            task: chooser.choose(asked, model).experts[:, 0] for task, asked in prompts.items()
        }
        shares[router] = {
            task: (experts == pool.names.index(task)).float().mean().item()
            for task, experts in chosen.items()
        }
        detach(model)
    print("| task | " + " | ".join(named) + " |\n|---|" + "---|" * len(named))
    for task in prompts:
        cells = (f"{100 * shares[router][task]:.0f}" for router in named)
        print(f"| {task} | " + " | ".join(cells) + " |")
    for router, found in shares.items():
        print(f"{router}: {100 * sum(found.values()) / len(found):.1f} over {len(found)} tasks")


if __name__ == "__main__":
    main(*sys.argv[1:])
