"""The demo with several seeds, each in a folder of its own, and one page of their tables.

    python benchmarks/demo_seeds.py --out runs/demo-seeds --seeds 0,1,2,3,4

Seeds, experts and scores that the folder has already are kept: run it again to continue. The page
is `tables.md` in that folder, written after every seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from phatgoose.apps.demo import SKILLS, run_demo
from phatgoose.evaluation.results import markdown_table
from phatgoose.evaluation.rows import BASE, label_of


def main() -> None:
    """Run every seed, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--all-methods", action="store_true")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for seed in seeds:
        folder, begun, worked = given.out / str(seed), time.monotonic(), time.process_time()
        run_demo(given.base, folder, seed=seed, all_methods=given.all_methods)
        took = {
            "wall_s": time.monotonic() - begun,
            "processor_s": time.process_time() - worked,
        }
        with (folder / "took.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(took) + "\n")
        done = [each for each in seeds if (given.out / str(each) / "gains.json").is_file()]
        (given.out / "tables.md").write_text(page(given.out, done), encoding="utf-8")


def page(out: Path, seeds: list[int]) -> str:
    """What the seeds have in common, then a table for each, in Markdown."""
    found = {seed: _gains(out / str(seed)) for seed in seeds}
    parts = [_summary(found)]
    parts += [f"### Seed {seed}\n\n{_table(out / str(seed))}" for seed in seeds]
    return "\n\n".join(parts) + "\n"


def _gains(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gains.json").read_text(encoding="utf-8"))


def _summary(found: dict[int, dict[str, Any]]) -> str:
    """Tables with a row a seed: each expert's lift, the router's gains, and its written answers."""
    router = label_of(next(iter(found.values()))["router"])
    over = [BASE, *SKILLS]
    lifts = [
        [str(seed), *(f"{each['lifts'][name]:+.0f}" for name in SKILLS)]
        for seed, each in found.items()
    ]
    gains = []
    for seed, each in found.items():
        by_name = {gain["over"]: gain for gain in each["gains"]}
        gains.append([str(seed), *(_points(by_name[name]) for name in over)])
    tasks = [task.replace("_", " ") for task in SKILLS.values()]
    written = []
    for seed, each in found.items():
        scores = [each["written"][task] for task in SKILLS.values()]
        mean = f"{sum(scores) / len(scores):.1f}"
        written.append([str(seed), *(f"{score:.0f}" for score in scores), mean])
    return "\n".join(
        [
            "Points of each expert above the base on the unseen task of its skill:\n",
            *markdown_table(["seed", *SKILLS], lifts),
            f"\nPoints of {router}'s mean above the others', with 95 % intervals in pairs:\n",
            *markdown_table(["seed", *over], gains),
            f"\n{router} without choices to rank, answering in writing as `serve` does, per cent "
            "exact:\n",
            *markdown_table(["seed", *tasks, "mean"], written),
        ]
    )


def _table(folder: Path) -> str:
    """The demo's table of one seed."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    tasks = list(SKILLS.values())
    rows = {name: _scores(row) for name, row in found["rows"].items()}
    models = {BASE: rows.pop(BASE), **found["experts"], **rows}
    lines = []
    for name, scores in models.items():
        star = " *" if name in found["choices"] else ""
        mean = sum(scores[task] for task in tasks) / len(tasks)
        cells = [f"{100 * scores[task]:.0f}" for task in tasks]
        lines.append([label_of(name) + star, *cells, f"{100 * mean:.1f}"])
    return "\n".join(
        markdown_table(["", *(task.replace("_", " ") for task in tasks), "mean"], lines)
    )


def _scores(row: dict[str, Any]) -> dict[str, float]:
    return {task: result["score"] for task, result in row["datasets"].items()}


def _points(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]["low"], gain["interval"]["high"]
    return f"{gain['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()
