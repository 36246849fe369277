"""Where does PHATGOOSE lose what an expert knows? Its choices, in part replaced by the right one.

    python research/study/taken_apart.py SUITE OUT.jsonl LIMIT POOL…

Of each task of the suite that an expert was trained on and that is answered in writing, the score
of PHATGOOSE over the pool, and of PHATGOOSE whose choices are replaced by the task's own expert

    before    for the tokens of the prompt but its last, which writes the answer's first
    prompt    for all tokens of the prompt
    answer    for those of the answer
    end       for the prompt's last token and those of the answer
    quarter   for all tokens, at a quarter of the sites, drawn by the task's name
    half      for all tokens, at half of the sites
    all       everywhere: the expert alone
    wrong     for all tokens of the prompt, by another task's expert, drawn by the task's name

For `prompt` and `wrong` a line also counts the answer's decisions (tokens times sites): those that
PHATGOOSE gives first to the task's own expert, those to the one that has read the prompt, and all.
Lines that are there are not computed again; means are told at the end.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_in import read
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.intervals import interval_of
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.open_model import loaded_base
from phatgoose.routing.routers.router import RoutingDecision, SiteRouter
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources

SHARES = {"quarter": 4, "half": 2}  # one of so many sites
Where = Callable[
    [int, int], Tensor
]  # (sequences, tokens of each in this pass) -> bool of that shape


class PartlyRight(SiteRouter):
    """A site's router whose decisions are replaced by one expert, `where` that says so.

    `first` counts the experts that are first in the decisions that stay.
    """

    def __init__(
        self, inner: SiteRouter, right: int, shape: list[int], where: Where, first: Counter[int]
    ) -> None:
        super().__init__()
        self.inner, self.right, self.shape, self.where = inner, right, shape, where
        self.first = first

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]."""
        decision = self.inner(u)
        replaced = self.where(*self.shape).flatten()[:, None]
        self.first.update(decision.experts[~replaced[:, 0], 0].tolist())
        first = torch.arange(decision.experts.shape[-1]) == 0
        alone = torch.full_like(decision.experts, self.right)
        return RoutingDecision(
            torch.where(replaced, alone, decision.experts),
            torch.where(replaced, first.to(decision.weights.dtype), decision.weights),
        )


def before_end(sequences: int, tokens: int) -> Tensor:
    """All tokens of every pass but its last; prompts are padded on the left."""
    return (torch.arange(tokens) < tokens - 1).expand(sequences, tokens)


def in_prompt(sequences: int, tokens: int) -> Tensor:
    """All tokens of a pass that reads prompts; later ones read one token of each answer."""
    return torch.full((sequences, tokens), tokens > 1)


def in_answer(sequences: int, tokens: int) -> Tensor:
    """All tokens of a pass that reads one token of each answer."""
    return ~in_prompt(sequences, tokens)


def from_end(sequences: int, tokens: int) -> Tensor:
    """The last token of every pass."""
    return ~before_end(sequences, tokens)


def everywhere(sequences: int, tokens: int) -> Tensor:
    """All tokens."""
    return torch.ones(sequences, tokens, dtype=torch.bool)


PARTS: dict[str, Where] = {
    "before": before_end,
    "prompt": in_prompt,
    "answer": in_answer,
    "end": from_end,
}
ROWS = ("phatgoose", *PARTS, *SHARES, "all", "wrong")
READ = ("prompt", "wrong")  # rows in which one expert reads the prompt and PHATGOOSE answers


def replace_choices(
    model: PreTrainedModel, expert: int, row: str, seed: str
) -> tuple[RemovableHandle, Counter[int]]:
    """Replace the choices of a composed model as `row` says by the pool's expert of that index.

    What comes back removes the hook that this puts on the model, and counts who is first in the
    decisions that stay.
    """
    layers = composition_of(model).layers
    names = sorted(layers)
    where = in_prompt if row == "wrong" else PARTS.get(row, everywhere)
    first: Counter[int] = Counter()
    if row in SHARES:
        names = random.Random(seed).sample(names, len(names) // SHARES[row])
    shape = [0, 0]

    def note_shape(_: Any, positional: Any, named: dict[str, Any]) -> None:
        shape[:] = (named["input_ids"] if "input_ids" in named else positional[0]).shape

    for name in names:
        layer: Any = layers[name]
        place = int((layer.experts == expert).nonzero().item())
        layer.router = PartlyRight(layer.router, place, shape, where, first)
        layer.one_call = False
    handle: RemovableHandle = model.register_forward_pre_hook(note_shape, with_kwargs=True)
    return handle, first


def another(names: Sequence[str], own: str) -> str:
    """Another expert's name, drawn by the task's."""
    return random.Random(own).choice([name for name in names if name != own])


def main(suite: str, out: str, limit: str, *pools: str) -> None:
    """Score every task of the suite that an expert was trained on and that is written."""
    pool, path = Pool.open(pools), Path(out)
    base = loaded_base(pool)
    entries = [entry for entry in open_suite(suite).entries if entry.name in pool.names]
    finished = read(path)
    for entry in tqdm([entry for entry in entries if entry.name not in finished], unit="task"):
        task = entry.read(Sources(None, None))
        if any(example.choices for example in task.evaluation_examples(1, 0)):
            continue
        record: dict[str, Any] = {"task": task.name, "other": another(pool.names, task.name)}
        own = pool.names.index(task.name)
        for row in ROWS:
            model = compose(pool, base, router="phatgoose")
            reader = pool.names.index(record["other"]) if row == "wrong" else own
            if row != "phatgoose":
                hook, first = replace_choices(model, reader, row, task.name)
            (score,) = evaluate(model, task, limit=int(limit), tokenizer=base.tokenizer).scores
            if row != "phatgoose":
                hook.remove()
            if row in READ:
                record[f"{row} first"] = [first[own], first[reader], first.total()]
            detach(model)
            record |= {"metric": score.metric, "n": score.n, row: round(score.score, 4)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    tell(list(read(path).values()))


def tell(records: list[dict[str, Any]]) -> None:
    """Print a table of all tasks, means in per cent, and each row's gain over PHATGOOSE."""
    print("| task | metric | " + " | ".join(ROWS) + " |\n|---|---|" + "---|" * len(ROWS))
    for record in records:
        cells = (f"{100 * record[row]:.0f}" for row in ROWS)
        print(f"| {record['task']} | {record['metric']} | " + " | ".join(cells) + " |")
    drawn = np.random.default_rng(0).integers(len(records), size=(10_000, len(records)))
    usual = 100 * np.array([record["phatgoose"] for record in records])
    for row in ROWS:
        scores = 100 * np.array([record[row] for record in records])
        more = interval_of((scores - usual)[drawn].mean(axis=1))
        gain = f"{(scores - usual).mean():+.1f} [{more.low:+.1f}, {more.high:+.1f}]"
        print(f"{row}: {scores.mean():.1f} over {len(records)} tasks, {gain}")
    for row, (place, who) in product(READ, enumerate(("own", "reader's"))):
        # An answer of one token is written by the prompt's last one: nothing is decided for it.
        counts = np.array([r[f"{row} first"] for r in records if r[f"{row} first"][2]])
        shares = 100 * counts[:, place] / counts[:, 2]
        drawn = np.random.default_rng(0).integers(len(shares), size=(10_000, len(shares)))
        within = interval_of(shares[drawn].mean(axis=1))
        told = f"{shares.mean():.0f} % [{within.low:.0f}, {within.high:.0f}]"
        print(f"{row}: the {who} expert is first in {told} of the answer's decisions")


if __name__ == "__main__":
    main(*sys.argv[1:])
