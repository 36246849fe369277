"""The paper's FLAN pool: 166 datasets (Muqeeth et al. 2024, section 4.1 and the released code).

36 T0 held-in datasets, 36 of Flan 2021, 75 task categories of Super-NaturalInstructions and 19
more, 7 of them from P3. Those that are not from P3 contain their prompts (zero-shot, with and
without options), in the authors' dataset r-three/Phatgoose_flanv2_offline. flan.toml lists all but
the first 36.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import TaskError
from ...files import read_table
from ..loading import Row, examples_of, read_rows
from ..task import Entry, Example, Sources, Suite, Task
from .t0 import held_in_entry, t0_held_in

METRICS = ("rouge-l",)
ZERO_SHOT = ("zs_noopt", "zs_opt")  # the released code trains and validates only on these
SPLIT_SEED = 1234
VALIDATION_SHARE = 0.1
VALIDATION_MOST = 10_000
TRAIN_SEED = 42
TRAIN_MOST = 500_000


def flan() -> Suite:
    """The suite "flan": 166 tasks with a train and a validation split, in the paper's code's order.

    The 36 + 7 of P3 are as in `t0_held_in`. Of the others' zero-shot rows a tenth (10 000 at most)
    is validation, the rest (500 000 at most) training: the same rows as in the released code.
    """
    table = read_table(Path(__file__).with_suffix(".toml"), "Suite", TaskError)
    entries = [*t0_held_in().entries]
    for group in ("flan2021", "niv2", "p3", "addition"):
        if group == "p3":
            entries += map(held_in_entry, table[group])
        else:
            entries += (_prompted_entry(table["dataset"], row) for row in table[group])
    return Suite("flan", tuple(entries))


def _prompted_entry(dataset: str, row: Row) -> Entry:
    most = row["max_length"] - 1  # it counts the decoder's start token
    folder = f"FLANV2/{row['path']}"
    task = Task(row["name"], source=f"{dataset}, {folder}", metrics=METRICS, max_new_tokens=most)

    def read(sources: Sources) -> Task:
        rows = read_rows(sources, dataset, folder, "train")
        return _split(task, list(examples_of(rows, task.source, _zero_shot)))

    return Entry(task.name, read, METRICS, most, source=task.source)


def _split(task: Task, examples: list[Example]) -> Task:
    order = np.random.RandomState(SPLIT_SEED).permutation(len(examples))
    count = min(int(len(examples) * VALIDATION_SHARE), VALIDATION_MOST)
    train = order[count:]
    if len(train) > TRAIN_MOST:
        generator = np.random.default_rng(TRAIN_SEED)
        train = train[generator.choice(len(train), size=TRAIN_MOST, replace=False)]
    return replace(
        task,
        train=tuple(examples[i] for i in train),
        validation=tuple(examples[i] for i in order[:count]),
        validation_origin=f"{count} of {len(examples)} examples, seed {SPLIT_SEED}",
    )


def _zero_shot(row: Row) -> Example | None:
    kind = row["_template_type"] or ""
    text = row["inputs"] or ""
    target = row["targets"] or ""
    is_zero_shot = any(name in kind for name in ZERO_SHOT)
    is_complete = text.strip() and target.strip()
    return Example(text, target) if is_zero_shot and is_complete else None
