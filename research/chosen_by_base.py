"""Whom `discriminant` chose when the base read prompts, for `answers.py --chosen`.

    python research/chosen_by_base.py BASE DATA PROMPTS.json OUT.json [--count 200]

By the package of commit 6074a014, the last one in which the base read prompts itself. DATA is what
`render_tasks.py` writes, PROMPTS.json what `answers.py` wrote. Statistics are of the same training
prompts as there.
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from pathlib import Path

import torch

from phatgoose.base import load_base
from phatgoose.config import Formatting
from phatgoose.experts.statistics import prompt_states, readings_of
from phatgoose.routing.routers.discriminant import COUNTS, Discriminant
from phatgoose.routing.routers.prompt import PromptRouter, Tables
from phatgoose.tasks.batching import read_prompts
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_task

POOL = Path(__file__).parent / "pool-12.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200, help="prompts of each expert")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [Path(task).stem for task in tomllib.loads(POOL.read_text(encoding="utf-8"))["tasks"]]
    base = load_base(given.base)
    encoder = Encoder.of(base, Formatting())
    shared = []
    for name in names:
        texts = [row.input for row in load_task(given.data / "train" / f"{name}.jsonl").train]
        drawn = random.Random(f"kept/{name}").sample(texts, min(given.count, len(texts)))
        tokens = [encoder.prompt(text) for text in drawn]
        states = read_prompts(base.model.eval(), tokens, prompt_states(base.model))
        shared.append(readings_of(states) | {COUNTS: torch.tensor(float(len(drawn)))})
    stacked = {
        part if part == COUNTS else f"readings.{part}": torch.stack([each[part] for each in shared])
        for part in shared[0]
    }
    tables = Tables(tuple(names), stacked)
    chooser = PromptRouter(Discriminant(), tables, base.tokenizer)
    by_mark = json.loads(given.prompts.read_text(encoding="utf-8"))
    choices = chooser.choose(list(by_mark.values()), base.model).named(chooser.experts)
    chosen = {
        mark: next(iter(weights), None) for mark, weights in zip(by_mark, choices, strict=True)
    }
    given.out.write_text(json.dumps(chosen, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()
