"""What experts answer to prompts in people's manners, and what a choice keeps of it.

    python research/answers.py DATA POOL OUT [--rows 20] [--prompts 200,3] [--reader e5]
        [--chosen NAME=FILE ...]

DATA is what `render_tasks.py` writes, POOL a pool whose experts are named after their tasks. Each
task's held-out prompts, in the wording that no expert was trained on, are asked plainly, in three
weights of politeness, misspelt, before, after and inside a paste (hand 2's texts in
benchmarks/people), in German and in Spanish (languages.toml). The base, the task's own expert and
whoever is chosen answer each of them; every prompt is scored as `phatgoose evaluate` does.
`discriminant` chooses by --prompts of the training prompts. --chosen adds choices from elsewhere:
FILE is JSON, the expert's name, or null for the base, by the first 16 hex digits of a prompt's
SHA-256; OUT/prompts.json has the prompts.

OUT/cells.jsonl keeps what is scored: run the command again to go on. OUT/answers.parquet has one
row a prompt and manner, and no text: answers_table.py reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from argparse import RawTextHelpFormatter
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kept_by_reader import MANNERS, training_prompts
from marks import Model, Sets, alike, answer, evaluation_sets, keys_of

from people_cases import Draw, load_hand
from phatgoose.base.identity import Base
from phatgoose.evaluation.results import ResultStore
from phatgoose.experts.pool import Pool
from phatgoose.reader import open_reader
from phatgoose.routing.compose import resolve_base
from phatgoose.routing.opening import open_chooser
from phatgoose.tasks.task import Example

LANGUAGES = {"own-de": "German", "own-es": "Spanish"}
BASE = "base"


class Prompt(NamedTuple):
    """A prompt in a manner, of a task, and its example."""

    manner: str
    task: str
    example: Example

    @property
    def mark(self) -> str:
        return hashlib.sha256(str(self.example.input).encode()).hexdigest()[:16]


Names = dict[Prompt, str | None]  # who is chosen; None: the base
Scores = dict[tuple[Prompt, str], float]  # by who answers


def main() -> None:
    given = _options()
    torch.set_num_threads(1)
    pool = Pool.open(given.pool)
    sets = sets_in_manners(given.data, pool, given.rows)
    prompts = [
        Prompt(manner, task, example)
        for (manner, task, _), asked in sets.items()
        for example in asked.examples
    ]
    texts = {prompt.mark: str(prompt.example.input) for prompt in prompts}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "prompts.json").write_text(json.dumps(texts, indent=0), encoding="utf-8")
    chosen = {
        f"{count} prompts": chosen_for(prompts, pool, given.data, int(count), given.reader)
        for count in given.prompts.split(",")
    }
    for named in given.chosen:
        name, _, file = named.partition("=")
        by_mark = json.loads(Path(file).read_text(encoding="utf-8"))
        chosen[name] = {prompt: by_mark[prompt.mark] for prompt in prompts}
    base = resolve_base(None, pool.base)
    with ResultStore.alone(given.out / "cells.jsonl") as store:
        scores = scored(store, base, pool, sets, chosen)
    write(given.out / "answers.parquet", prompts, chosen, scores)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=20, help="prompts of a task")
    parser.add_argument("--prompts", default="200,3", help="that an expert's statistics are of")
    parser.add_argument("--reader", default="e5")
    parser.add_argument("--chosen", nargs="*", default=[], metavar="NAME=FILE")
    return parser.parse_args()


def sets_in_manners(data: Path, pool: Pool, rows: int) -> Sets:
    """The same examples in each manner, by (manner, task, piece)."""
    wordings = {"own-new": "plain", **LANGUAGES}
    sets = evaluation_sets(data, pool, rows, 0, ranked=False, wordings=wordings)
    hand = load_hand(2)
    made = dict(sets)
    for (wording, task, piece), plain in sets.items():
        for manner in MANNERS if wording == "plain" else ():
            examples = []
            for example in plain.examples:
                rng = random.Random(f"{manner}/{example.input}")
                draw = Draw(hand, task, str(example.input), rng)
                examples.append(replace(example, input=MANNERS[manner](draw)))
            made[manner, task, piece] = replace(plain, examples=tuple(examples))
    return made


def chosen_for(
    prompts: Sequence[Prompt], pool: Pool, data: Path, count: int, reader_name: str
) -> Names:
    """Whom `discriminant` chooses by `count` prompts of each expert."""
    reader = open_reader(reader_name)
    experts = [
        expert.with_prompts_read(reader, training_prompts(data, expert.name, count))
        for expert in pool.experts
    ]
    chooser = open_chooser(Pool(tuple(experts)), router="discriminant", reader=reader_name)
    choices = chooser.choose([prompt.example.input for prompt in prompts])
    named = choices.named(chooser.experts)
    return {
        prompt: next(iter(weights), None) for prompt, weights in zip(prompts, named, strict=True)
    }


def scored(
    store: ResultStore, base: Base, pool: Pool, sets: Sets, chosen: Mapping[str, Names]
) -> Scores:
    """The score of the base, the own expert and each chosen one, for each prompt."""
    asked = defaultdict[str, Sets](dict)
    asked[BASE] |= sets
    for which, whole in sets.items():
        manner, task, piece = which
        asked[task][which] = whole
        others = defaultdict[str, list[Example]](list)
        for example in whole.examples:
            prompt = Prompt(manner, task, example)
            for name in {names[prompt] for names in chosen.values()} - {None, task}:
                others[str(name)].append(example)
        for name, examples in others.items():
            asked[name][manner, task, piece] = replace(whole, examples=tuple(examples))
    scores = Scores()
    for name, its_sets in asked.items():
        model = model_of(name, pool)
        for some_sets in alike(its_sets):
            answer(store, base, some_sets, model)
        for which, key in keys_of(base, its_sets, model).items():
            cell = store.get(key) or {}
            manner, task, _ = which
            for example, score in zip(its_sets[which].examples, cell["score"], strict=True):
                scores[Prompt(manner, task, example), name] = score
        print(f"{name}: {sum(len(part.examples) for part in its_sets.values())}", flush=True)
    return scores


def model_of(name: str, pool: Pool) -> Model:
    """The base, or an expert alone."""
    if name == BASE:
        return BASE, None, None, ""
    (expert,) = pool.select([name]).experts
    return f"expert/{name}", expert.info.adapter_sha256, pool.select([name]), "single"


def write(
    path: Path, prompts: Sequence[Prompt], chosen: Mapping[str, Names], scores: Scores
) -> None:
    """One row a prompt and manner."""
    columns: dict[str, list[object]] = {
        "prompt": [prompt.mark for prompt in prompts],
        "task": [prompt.task for prompt in prompts],
        "manner": [prompt.manner for prompt in prompts],
        "score/base": [scores[prompt, BASE] for prompt in prompts],
        "score/own": [scores[prompt, prompt.task] for prompt in prompts],
    }
    for by, names in chosen.items():
        columns[f"chosen/{by}"] = [names[prompt] for prompt in prompts]
        columns[f"score/{by}"] = [scores[prompt, names[prompt] or BASE] for prompt in prompts]
    pq.write_table(pa.table(columns), path, compression="zstd")


if __name__ == "__main__":
    main()
