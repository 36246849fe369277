"""What router discriminant keeps of twelve experts' scores when a reader chooses, by the marks.

    python research/kept_by_reader.py DATA [--reader e5] [--prompts 3,20,200] [--rows 0]

DATA is what `render_tasks.py` writes. Statistics are of training prompts; who answers is chosen for
the held-out prompts in new wordings, plain and in people's manners (the wrappers of hand 2 in
benchmarks/people). Its score is what the chosen expert, or the base, has for that prompt in
`marks/`, so under a manner the choice is of that manner and the answer of the plain prompt. No base
and no expert is loaded. Kept is the share of what each prompt's own expert scores, the mean of the
tasks' shares weighted alike, with 95 % intervals over tasks and prompts drawn anew.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from argparse import RawTextHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from people_cases import Draw, in_the_middle, load_hand, misspelt, pasted, polite
from phatgoose.base.identity import BaseReference
from phatgoose.experts.expert import Expert, ExpertInfo
from phatgoose.experts.pool import Pool
from phatgoose.reader import open_reader
from phatgoose.routing.opening import open_chooser
from phatgoose.tasks.loading import load_task

MARKS = Path(__file__).parent / "marks"
MANNERS: Mapping[str, Callable[[Draw], str]] = {
    "plain": lambda draw: draw.prompt,
    "light": lambda draw: polite(draw, "light"),
    "medium": lambda draw: polite(draw, "medium"),
    "heavy": lambda draw: polite(draw, "heavy"),
    "typos 7 %": lambda draw: misspelt(draw.prompt, 0.07, draw.rng),
    "before 50 words": lambda draw: pasted(draw, "short", True, True) or draw.prompt,
    "after 50 words": lambda draw: pasted(draw, "short", False, True) or draw.prompt,
    "middle of 50 words": lambda draw: in_the_middle(draw, "short"),
}


class HeldOut(NamedTuple):
    """A prompt of a task, and the name of its row among the marks."""

    task: str
    prompt: str
    mark: str


Marks = Mapping[str, Mapping[str, Mapping[str, Any]]]


def marks() -> dict[str, dict[str, dict[str, Any]]]:
    """By base and prompt's hash: its task, and the score of the base and each expert."""
    bases = {}
    for path in sorted(MARKS.glob("*.parquet")):
        table = pq.read_table(path)
        names = [n for n in table.column_names if n.startswith(("score/expert/", "score/base"))]
        rows = table.select(["prompt", "task", "wording", *names]).to_pylist()
        bases[path.stem] = {row["prompt"]: row for row in rows if row["wording"] == "new"}
    return bases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reader", default="e5")
    parser.add_argument("--prompts", default="3,20,200")
    parser.add_argument("--manners", default=",".join(MANNERS))
    parser.add_argument("--rows", type=int, default=0, help="prompts a task, 0 for all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bases = marks()
    tasks = sorted({row["task"] for row in next(iter(bases.values())).values()})
    hand = load_hand(2)
    reader = open_reader(given.reader)
    heldout = list[HeldOut]()
    for task in tasks:
        file = given.data / "own-new" / f"{task}.jsonl"
        prompts = [row.input for row in load_task(file).evaluation_examples()]
        rows = [(prompt, hashlib.sha256(prompt.encode()).hexdigest()[:16]) for prompt in prompts]
        marked = [row for row in rows if any(row[1] in base for base in bases.values())]
        heldout += [HeldOut(task, *row) for row in marked[: given.rows or None]]
    print(f"{len(tasks)} tasks, n = {len(heldout)}, reader {given.reader}", flush=True)
    print("| prompts | manner | right | base answers | " + " | ".join(bases) + " |")
    print("|---" * (4 + len(bases)) + "|")
    for count in map(int, given.prompts.split(",")):
        experts = []
        for task in tasks:
            info = ExpertInfo(task, BaseReference("any"), "")
            expert = Expert(info, Path(), {}, {}, {})
            sample = training_prompts(given.data, task, count)
            experts.append(expert.with_prompts_read(reader, sample))
        chooser = open_chooser(Pool(tuple(experts)), router="discriminant", reader=given.reader)
        for manner in given.manners.split(","):
            texts = []
            for row in heldout:
                draw = Draw(hand, row.task, row.prompt, random.Random(f"{manner}/{row.mark}"))
                texts.append(MANNERS[manner](draw))
            choices = chooser.choose(texts).named(chooser.experts)
            names = [next(iter(choice), None) for choice in choices]
            print(
                f"| {count} | {manner} | {' | '.join(cells(names, heldout, bases))} |", flush=True
            )


def training_prompts(data: Path, task: str, count: int) -> list[str]:
    """`count` of the prompts that the expert was trained on."""
    texts = [row.input for row in load_task(data / "train" / f"{task}.jsonl").train]
    return random.Random(f"kept/{task}").sample(texts, min(count, len(texts)))


def cells(names: Sequence[str | None], heldout: Sequence[HeldOut], bases: Marks) -> list[str]:
    """Shares right and to the base, and what is kept on each base."""
    right = [name == row.task for name, row in zip(names, heldout, strict=True)]
    left = [name is None for name in names]
    shares = [f"{100 * np.mean(right):.0f}", f"{100 * np.mean(left):.0f}"]
    for rows in bases.values():
        got = []
        own = []
        owners = []
        for name, row in zip(names, heldout, strict=True):
            if row.mark not in rows:
                continue
            scores = rows[row.mark]
            owners.append(row.task)
            got.append(scores["score/base" if name is None else f"score/expert/{name}"])
            own.append(scores[f"score/expert/{row.task}"])
        low, middle, high = kept(np.array(got), np.array(own), np.array(owners))
        shares.append(f"{middle:.1f} [{low:.1f}, {high:.1f}] (n {len(own)})")
    return shares


def kept(got: np.ndarray, own: np.ndarray, owners: np.ndarray) -> tuple[float, float, float]:
    """The share of the own experts' mean over tasks, in per cent, with its interval."""
    rng = np.random.default_rng(0)
    names = np.unique(owners)
    places = [np.flatnonzero(owners == name) for name in names]

    def share(picked: list[np.ndarray]) -> float:
        of_own = np.mean([own[rows].mean() for rows in picked])
        if of_own == 0:  # a resample that says nothing
            return np.nan
        return float(100 * np.mean([got[rows].mean() for rows in picked]) / of_own)

    drawn = []
    for _ in range(1000):
        tasks = rng.integers(len(names), size=len(names))
        drawn.append(share([rng.choice(places[task], len(places[task])) for task in tasks]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return low, share(places), high


if __name__ == "__main__":
    main()
