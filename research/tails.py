"""How good are experts that act from a prompt's end on? The demo's skills, ordinary and with tails.

    OMP_NUM_THREADS=1 python research/tails.py FOLDER [SEED ...]

Each of the demo's experts is trained by the demo's recipe (the same steps) with every setting of
acts_on, and scored alone on the unseen task of its skill, the choices ranked. FOLDER keeps experts
and scores, so an interrupted run continues where it stopped. The table has, for each setting, the
mean over the tasks in per cent, of the seeds that are finished.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from phatgoose.apps.demo import EVALUATED, LORA, SKILLS, TRAINING, trained_task, unseen_tasks
from phatgoose.base import Base, load_base
from phatgoose.config import GateTraining
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.training.train_expert import train_expert

SETTINGS = ("all", "1", "4", "12", "32")
GATES = GateTraining(gate_steps=1, means=False, readings=False)  # not looked at here
Scores = dict[str, float]  # by "SEED/SETTING/SKILL", from 0 to 1


def main(folder: Path, seeds: list[int]) -> None:
    """Train and score what is missing, then print the table."""
    torch.set_num_threads(1)
    path = folder / "scores.json"
    scores: Scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    base = load_base("smollm2")
    unseen = dict(zip(SKILLS, unseen_tasks(EVALUATED), strict=True))
    for seed in seeds:
        for setting in SETTINGS:
            for skill in SKILLS:
                key = f"{seed}/{setting}/{skill}"
                if key not in scores:
                    scores[key] = score_of(base, folder / key, skill, setting, seed, unseen[skill])
                    path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
            print(row(scores, [seed], setting), f"(seed {seed})", flush=True)
    print(f"\n{header()}", *(row(scores, seeds, setting) for setting in SETTINGS), sep="\n")


def score_of(base: Base, out: Path, skill: str, setting: str, seed: int, unseen: object) -> float:
    """The score of an expert alone, trained at `out` unless it is there."""
    training = replace(TRAINING, seed=seed, acts_on=setting)
    expert = train_expert(
        base,
        trained_task(skill),
        out=out,
        peft=LORA,
        training=training,
        gate_training=GATES,
        resume=True,
    )
    model = compose(Pool((expert,)), base, router="single")
    try:
        return evaluate(model, [unseen], tokenizer=base.tokenizer).mean
    finally:
        detach(model)


def header() -> str:
    return f"| acts on | {' | '.join(SKILLS)} | mean | n |\n{'|---' * (len(SKILLS) + 3)}|"


def row(scores: Scores, seeds: list[int], setting: str) -> str:
    """A line of the table, of the seeds whose experts are all scored."""
    done = [s for s in seeds if all(f"{s}/{setting}/{skill}" in scores for skill in SKILLS)]
    if not done:
        return f"| {setting} | " + "| " * len(SKILLS) + "| | 0 |"
    means = [sum(scores[f"{s}/{setting}/{k}"] for s in done) / len(done) for k in SKILLS]
    cells = [f"{100 * mean:.1f}" for mean in (*means, sum(means) / len(means))]
    return f"| {setting} | {' | '.join(cells)} | {len(done)} x {len(SKILLS)} x {EVALUATED} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0])
