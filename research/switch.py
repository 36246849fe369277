"""The switch: what routers keep of their experts, causal and as a prefix LM (protocol-2.md).

    cd research && python switch.py decoders/rows.jsonl switch-2048-0 switch-1024-1

What a stage of `run.sh`, switch-STEPS-SEED, has written are runs switch-STEPS-MASK-SEED of FILE.
Shares are of the own experts' mean, over tasks and stages; intervals are 95 %, over tasks drawn
anew, the same ones under both masks and in every stage.
"""

from __future__ import annotations

import sys

import numpy as np
from kept import kept, read, scores, tell
from numpy.typing import NDArray

from phatgoose.evaluation.metrics import Estimate

MASKS = ("causal", "prefix")
ROUTERS = ("base", "phatgoose", "phatgoose?k=1", "discriminant")
Means = dict[str, NDArray[np.float64]]  # by label, of each task, over stages


def main(file: str, *stages: str) -> None:
    """Print shares under both masks, how far they lie apart, and what tells whether they count."""
    runs = {mask: [read(f"{file}#{run_of(stage, mask)}") for stage in stages] for mask in MASKS}
    every = [rows for of_mask in runs.values() for rows in of_mask]
    tasks = sorted(set.intersection(*(set(rows) for rows in every)))
    n = sum(rows[task]["n"] for rows in every for task in tasks)
    print(f"{len(tasks)} tasks: {', '.join(tasks)}; n = {n} under both masks")
    means: dict[str, Means] = {
        mask: {
            label: np.mean([scores(rows, tasks, label) for rows in of_mask], axis=0)
            for label in ("own", *ROUTERS)
        }
        for mask, of_mask in runs.items()
    }
    for mask, of_mask in means.items():
        print(f"{mask}: own experts {100 * of_mask['own'].mean():.1f}")
        for stage, rows in zip(stages, runs[mask], strict=True):
            own = scores(rows, tasks, "own").mean()
            each = (scores(rows, tasks, router).mean() / own for router in ROUTERS)
            shares = (f"{r} {100 * s:.0f} %" for r, s in zip(ROUTERS, each, strict=True))
            print(f"  {stage}: own {100 * own:.1f}, {', '.join(shares)}")
    print("| router | causal | prefix | difference |")
    print("|---|---|---|---|")
    for router in ROUTERS:
        shares = {mask: kept(of_mask[router], of_mask["own"]) for mask, of_mask in means.items()}
        cells = [tell(Estimate.of(*shares[mask]), " %") for mask in MASKS]
        more = (b - a for a, b in zip(shares["causal"], shares["prefix"], strict=True))
        print(f"| {router} | {' | '.join(cells)} | {tell(Estimate.of(*more), sign='+')} |")
    health = Estimate.of(*kept(means["prefix"]["own"], means["causal"]["own"]))
    print(f"own experts, prefix of causal: {tell(health, ' %')}")


def run_of(stage: str, mask: str) -> str:
    steps, _, seed = stage.rpartition("-")
    return f"{steps}-{mask}-{seed}"


if __name__ == "__main__":
    main(*sys.argv[1:])
