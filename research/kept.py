"""What each router keeps of what experts know, on one base beside another: table and figure.

    cd research && python kept.py ../docs/figures/kept.png \
        SmolLM2-135M=decoders/rows.jsonl#held_in Gemma-3-270M=decoders/rows.jsonl#gemma-held-in \
        Qwen2.5-Coder-0.5B=decoders/rows.jsonl#qwen-held_in

NAME=FILE is what `study/held_in.py` writes, NAME=FILE#RUN the rows of a run in decoders/rows.jsonl.
Routers and settings that all bases have and the package has: some left it.
Printed are, for every base, each router's mean, its share of the own experts' mean and its points
above PHATGOOSE, over the tasks that all bases have, with 95 % intervals over tasks drawn anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from phatgoose.errors import ConfigError
from phatgoose.evaluation.compare import BASE, label_of
from phatgoose.evaluation.metrics import Estimate
from phatgoose.routing.routers.registry import OURS
from phatgoose.routing.routers.router import canonical

COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73"), ("o", "s", "^")
OTHERS = ("run", "task", "metric", "n", "gain", "own")
Rows = dict[str, dict[str, Any]]  # by task


def is_ours(router: str) -> bool:
    """Whether the package has `router` with these settings, without other packages' routers."""
    try:
        return canonical(router).partition(":")[0] in OURS
    except ConfigError:
        return False


def main(out: str, *named: str) -> None:
    """Print the table and draw the figure."""
    bases = {name: read(place) for name, place in (each.split("=", 1) for each in named)}
    tasks = sorted(set.intersection(*(set(rows) for rows in bases.values())))
    routers = [each for each in next(iter(bases.values()))[tasks[0]] if each not in OTHERS]
    routers = [each for each in routers if all(each in rows[tasks[0]] for rows in bases.values())]
    routers = [each for each in routers if each == BASE or is_ours(each)]
    first = next(iter(bases.values()))
    routers.sort(key=lambda router: scores(first, tasks, router).mean())
    print(f"{len(tasks)} tasks: {', '.join(tasks)}")
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(routers)), layout="constrained")
    panel = figure.subplots()
    for place, (base, rows) in enumerate(bases.items()):
        n = sum(rows[task]["n"] for task in tasks)
        own = scores(rows, tasks, "own")
        print(f"\n{base}, n = {n}: own experts {100 * own.mean():.1f}")
        for row, router in enumerate(routers):
            share = Estimate.of(*kept(scores(rows, tasks, router), own))
            more = above(scores(rows, tasks, router), scores(rows, tasks, "phatgoose"))
            mean = 100 * scores(rows, tasks, router).mean()
            print(f"| {router} | {mean:.1f} | {tell(share, ' %')} | {more} |")
            height = row + 0.2 * ((len(bases) - 1) / 2 - place)
            panel.plot(
                [share.low, share.high], [height, height], color=COLOURS[place], linewidth=1.5
            )
            label = f"{base} (n = {n})" if row == 0 else None
            style = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": "none"}
            panel.plot(share.value, height, label=label, **style)
    panel.axvline(100, color="#555555", linewidth=0.8, linestyle="--")
    panel.set_yticks(range(len(routers)), [label_of(router) for router in routers])
    panel.set_xlabel("share of what each task's own expert scores, in per cent")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(out, dpi=150)


def read(place: str) -> Rows:
    """The rows of FILE, or of one run of it, by task."""
    path, _, run = place.partition("#")
    rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return {row["task"]: row for row in rows if row.get("run", "") == run}


def scores(rows: Rows, tasks: list[str], router: str) -> NDArray[np.float64]:
    """A router's score on each task, 0 to 1."""
    return np.array([rows[task][router][0] for task in tasks])


def drawn(count: int) -> NDArray[np.int64]:
    """10,000 draws of so many tasks."""
    return np.random.default_rng(0).integers(count, size=(10_000, count))


def kept(
    values: NDArray[np.float64], own: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """The share of `own` in per cent, and that of each draw of tasks."""
    picks = drawn(len(values))
    shares = 100 * values[picks].mean(axis=1) / own[picks].mean(axis=1)
    return 100 * float(values.mean() / own.mean()), shares


def tell(share: Estimate, unit: str = "", sign: str = "") -> str:
    return f"{share.value:{sign}.0f}{unit} [{share.low:.0f}, {share.high:.0f}]"


def above(values: NDArray[np.float64], others: NDArray[np.float64]) -> str:
    """The difference in points, with its interval."""
    points = 100 * (values - others)
    more = Estimate.of(points.mean(), points[drawn(len(values))].mean(axis=1))
    return f"{more.value:+.1f} [{more.low:.1f}, {more.high:.1f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
