"""What teaching did for e5: right answers by seed, step, number of skills and manners.

    python research/taught.py FOLDER OUT [--hand 2]

FOLDER has the runs of `teach_reader.py e5 FOLDER/RUN`, each with its checkpoints. All of them, and
e5 as published as step 0, answer the people's pool: 24 experts of three prompts, two draws, one
case of a manner and skill, as `benchmarks/people.py --skills 24 --prompts 3 --most 1 --draws 2`
does it.

OUT.json keeps right answers and cases of each reader, manner and owner: run the command again to go
on. The table is printed, the figure is OUT.png. Intervals of 95 % are over skills, and over texts
where no skill is asked for; differences are in pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import RawTextHelpFormatter
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from people import Measure
from people_cases import Case, cases, load_hand
from people_readers import Reader
from people_rules import Rule

Array = NDArray[np.float64]
Counts = Mapping[str, Mapping[str, Sequence[int]]]  # right and all, by manner and owner
RESAMPLES = 1000
ALL = "all manners"
SHOWN = ("plain", "heavy", "typos 7 %", "de", "middle of 400 words", "helper -> base", ALL)
UNTAUGHT = "e5"
MIDDLE = 90  # the step at which runs with less to learn end
COLOURS_AND_MARKS = {
    "seed0": ("#0072B2", "o"),
    "seed1": ("#D55E00", "o"),
    "plain": ("#009E73", "^"),
    "skills24": ("#CC79A7", "s"),
    "skills60": ("#666666", "D"),
}


def main() -> None:
    given = _options()
    torch.set_num_threads(1)
    kept = given.out.with_suffix(".json")
    counts = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    every = cases(load_hand(given.hand), 1)
    folders = given.folder.glob("*/[0-9]*")
    readers = {UNTAUGHT: "e5"} | {
        "/".join(folder.parts[-2:]): f"e5:4-11+{folder}" for folder in folders
    }
    for name in sorted(readers, key=run_and_step):
        if name not in counts:
            counts[name] = counts_of(Reader.of(readers[name]), every)
            kept.write_text(json.dumps(counts), encoding="utf-8")
            print(name, file=sys.stderr, flush=True)
    drawn = {name: shares_of(counts[name]) for name in sorted(counts, key=run_and_step)}
    print(table(drawn))
    draw(drawn).savefig(given.out.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hand", type=int, default=2, choices=(2, 3))
    return parser.parse_args()


def run_and_step(name: str) -> tuple[str, int]:
    run, _, step = name.partition("/")
    return run, int(step or 0)


def counts_of(reader: Reader, every: Sequence[Case]) -> Counts:
    """Right answers and cases, by manner and owner."""
    rule = Rule()
    counts = defaultdict[str, dict[str, list[int]]](dict)
    for answer in Measure(reader, every, [rule]).in_pools(rule, 24, 3, 2):
        count = counts[answer.manner].setdefault(answer.owner, [0, 0])
        count[0] += answer.is_right
        count[1] += 1
    return counts


def shares_of(of_manners: Counts) -> dict[str, Array]:
    """Each manner's share of right answers in per cent: the first is it, then resamples."""
    skills = {owner for owners in of_manners.values() for owner in owners if "/" not in owner}
    shares = dict[str, Array]()
    for manner, by_owner in of_manners.items():
        owners = sorted(skills if skills & set(by_owner) else by_owner)
        # Of the same owners every manner and reader has the same resamples.
        even = np.full(len(owners), 1 / len(owners))
        picks = np.random.default_rng(0).multinomial(len(owners), even, size=RESAMPLES)
        weights = np.vstack([np.ones(len(owners)), picks])
        counts = np.array([by_owner.get(owner, (0, 0)) for owner in owners], float)
        right, cases_of = (weights @ counts).T
        shares[manner] = 100 * right / cases_of
    shares[ALL] = np.mean(list(shares.values()), axis=0)
    return shares


def interval(shares: Array) -> str:
    low, high = np.quantile(shares[1:], [0.025, 0.975])
    return f"{shares[0]:.1f} [{low:.1f}, {high:.1f}]"


def table(drawn: Mapping[str, Mapping[str, Array]]) -> str:
    """A row for each reader, then differences, in pairs.

    They are from e5 as published, from seed 0 at the same step, and from the run's own middle.
    """
    lines = [f"| reader | {' | '.join(SHOWN)} |", "|---" * (1 + len(SHOWN)) + "|"]
    for name, shares in drawn.items():
        lines.append(f"| {name} | {' | '.join(interval(shares[manner]) for manner in SHOWN)} |")
    for name, shares in drawn.items():
        run, step = run_and_step(name)
        for other in (UNTAUGHT, f"seed0/{step}", f"{run}/{MIDDLE}"):
            if other in drawn and name not in (other, UNTAUGHT):
                differences = [interval(shares[manner] - drawn[other][manner]) for manner in SHOWN]
                lines.append(f"| {name} - {other} | {' | '.join(differences)} |")
    return "\n".join(lines)


def draw(drawn: Mapping[str, Mapping[str, Array]]) -> Figure:
    """Plain prompts and all manners by steps: lines are seeds, marks runs with less to learn."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    runs = defaultdict[str, list[int]](list)
    for name in drawn:
        if name != UNTAUGHT:
            run, step = run_and_step(name)
            runs[run].append(step)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, manner in zip(panels, ("plain", ALL), strict=True):
        for run, steps in runs.items():
            points = [drawn[UNTAUGHT][manner]] if run.startswith("seed") else []
            points += [drawn[f"{run}/{step}"][manner] for step in steps]
            at = [0, *steps][-len(points) :]
            values = [point[0] for point in points]
            colour, mark = COLOURS_AND_MARKS.get(run, (None, "s"))
            look = {"color": colour, "marker": mark, "label": run}
            if not run.startswith("seed"):
                panel.plot(at, values, ls="none", ms=6, mfc="none", **look)
                continue
            panel.plot(at, values, ms=4, **look)
            ends = np.array([np.quantile(point[1:], [0.025, 0.975]) for point in points])
            panel.fill_between(at, ends[:, 0], ends[:, 1], color=colour, alpha=0.12, lw=0)
        panel.set(title=manner, xlabel="steps")
        panel.grid(lw=0.4)
    panels[0].set_ylabel("right expert, or the base (%)")
    panels[1].legend(frameon=False, fontsize="small", loc="lower right")
    return figure


if __name__ == "__main__":
    main()
