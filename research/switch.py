"""The switch: what routers keep of their experts, causal and as a prefix LM (protocol-2.md).

    cd research && python switch.py decoders/rows.jsonl#switch-512 0

The rows of runs switch-512-MASK-SEED, MASK causal or prefix, are what `study/held_in.py` writes.
Shares are of the own experts' mean, over tasks and seeds; intervals are 95 %, over tasks drawn
anew, the same ones under both masks.
"""

from __future__ import annotations

import sys

import numpy as np
from kept import kept, read, scores, tell
from numpy.typing import NDArray

from phatgoose.evaluation.metrics import Estimate

MASKS = ("causal", "prefix")
ROUTERS = ("base", "phatgoose", "phatgoose?k=1", "discriminant")
Means = dict[str, NDArray[np.float64]]  # by label, of each task, over seeds


def main(place: str, *seeds: str) -> None:
    """Print shares under both masks, how far they lie apart, and what tells whether they count."""
    runs = {(mask, seed): read(f"{place}-{mask}-{seed}") for mask in MASKS for seed in seeds}
    tasks = sorted(set.intersection(*(set(rows) for rows in runs.values())))
    n = sum(rows[task]["n"] for rows in runs.values() for task in tasks)
    print(f"{len(tasks)} tasks: {', '.join(tasks)}; n = {n} under both masks")
    means: dict[str, Means] = {
        mask: {
            label: np.mean([scores(runs[mask, seed], tasks, label) for seed in seeds], axis=0)
            for label in ("own", *ROUTERS)
        }
        for mask in MASKS
    }
    for mask, of_mask in means.items():
        print(f"{mask}: own experts {100 * of_mask['own'].mean():.1f}")
        for seed in seeds if len(seeds) > 1 else ():
            own = scores(runs[mask, seed], tasks, "own").mean()
            each = (scores(runs[mask, seed], tasks, router).mean() / own for router in ROUTERS)
            shares = (f"{r} {100 * s:.0f} %" for r, s in zip(ROUTERS, each, strict=True))
            print(f"  seed {seed}: own {100 * own:.1f}, {', '.join(shares)}")
    print("| router | causal | prefix | difference |")
    print("|---|---|---|---|")
    for router in ROUTERS:
        shares = {mask: kept(of_mask[router], of_mask["own"]) for mask, of_mask in means.items()}
        cells = [tell(Estimate.of(*shares[mask]), " %") for mask in MASKS]
        more = (b - a for a, b in zip(shares["causal"], shares["prefix"], strict=True))
        print(f"| {router} | {' | '.join(cells)} | {tell(Estimate.of(*more), sign='+')} |")
    health = Estimate.of(*kept(means["prefix"]["own"], means["causal"]["own"]))
    print(f"own experts, prefix of causal: {tell(health, ' %')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
