"""How well `discriminant` knows experts by a few of their prompts, by any reader.

    python research/few_prompts.py READER DATA OUT.json [--marks FILE] [--counts 1 3 5 10 20 200]

DATA is what `render_tasks.py` writes. An expert is nothing here but the statistics of N training
prompts of a task of `pool-12.toml`, which are drawn DRAWS times. Chosen is for prompts of the tasks
in new wordings, and for the general and neutral texts of `forms/report.toml`, which belong to the
base. Printed are, for each N and in per cent, the means over draws, and their least and most:

    right        prompts that get their task's expert
    refused      prompts that are left to the base
    kept         what experts so chosen score of what the prompts' own do, by MARKS
    general      texts that are left to the base
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from pyarrow import parquet
from torch import Tensor

from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import ReaderReference, open_reader
from phatgoose.routing.conversation import ScoredText, deciding_text
from phatgoose.routing.routers.discriminant import COUNTS, Discriminant
from phatgoose.routing.routers.prompt import PromptChooser, Tables
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import draw

HERE = Path(__file__).parent
DRAWS, PROMPTS = 6, 256  # PROMPTS: those of a task to draw from
Marks = Mapping[tuple[str, str], float]  # scores by prompt and model


def main() -> None:
    """Read all prompts once, then print a line for each N."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("reader", help="minilm, smollm2, …, or MODEL:FIRST-LAST")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--marks", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 3, 5, 10, 20, 200])
    parser.add_argument("--rows", type=int, default=50, help="of a task, to choose for")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = tomllib.loads((HERE / "pool-12.toml").read_text(encoding="utf-8"))
    names = [Path(each).stem for each in recipe["tasks"]]
    texts = tomllib.loads((HERE / "forms" / "report.toml").read_text(encoding="utf-8"))
    reader = open_reader(given.reader)
    read = reader.states
    trained = []
    for name in names:
        examples = load_task(given.data / "train" / f"{name}.jsonl").train
        trained.append(read([each.input for each in draw(examples, PROMPTS, 0)]))
        print(f"{name}: {len(trained[-1])} prompts read", flush=True)
    marks = marks_of(given.marks) if given.marks else {}
    asked = [
        (name, prompt)
        for name in names
        for prompt in prompts_of(given.data / "own-new" / f"{name}.jsonl", given.rows, marks)
    ]
    own, general = read([prompt for _, prompt in asked]), read(texts["general"] + texts["neutral"])
    found = {}
    for n in given.counts:
        every = []
        for at in range(DRAWS):
            rng = random.Random(at)
            picked = [rows[rng.sample(range(len(rows)), min(n, len(rows)))] for rows in trained]
            tables = tables_of(names, picked, reader.reference)
            chooser = PromptChooser(Discriminant(reader=given.reader), tables)
            left = [each is None for each in chosen(chooser, general)]
            every.append({**shares(asked, chosen(chooser, own), marks), "general": fmean(left)})
        found[n] = {key: [each[key] for each in every] for key in every[0]}
        told = (f"{k} {tell(100 * torch.tensor(v))}" for k, v in found[n].items())
        print(f"N = {n}, {len(asked)} prompts, {len(general)} texts:", ", ".join(told), flush=True)
    given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def prompts_of(path: Path, most: int, marks: Marks) -> list[str]:
    """Prompts of the task file at `path`, those with marks where there are any."""
    prompts = [each.input for each in load_task(path).evaluation_examples()]
    marked = tuple(each for each in prompts if not marks or (key_of(each), path.stem) in marks)
    return list(draw(marked, most, 0))


def key_of(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def tables_of(names: Sequence[str], picked: Sequence[Tensor], by: ReaderReference) -> Tables:
    """What a pool would share, of experts with statistics of these prompts each."""
    statistics = [prompt_statistics_of(rows) for rows in picked]
    stacked = {
        f"readings.{p}": torch.stack([each[p] for each in statistics]) for p in statistics[0]
    }
    counts = torch.tensor([float(len(rows)) for rows in picked])
    return Tables(tuple(names), {**stacked, COUNTS: counts}, {"reader": asdict(by)})


def chosen(chooser: PromptChooser, features: Tensor) -> list[str | None]:
    """The expert for each prompt, None for the base."""
    allowances = chooser.router.allowances(chooser.tables, chooser.ready)
    scores = chooser.router.prompt_scores(features, chooser.ready)
    answers = [deciding_text([ScoredText(each[None], allowances)]) for each in scores]
    return [each and chooser.experts[each.expert] for each in answers]


def marks_of(path: Path) -> Marks:
    """How each expert, and the base, answered each prompt in a new wording."""
    table = parquet.read_table(path)
    table = table.filter([wording == "new" for wording in table["wording"].to_pylist()])
    marks = {}
    for column in table.column_names:
        kind, _, model = column.partition("/")
        if kind == "score" and (model == "base" or model.startswith("expert/")):
            rows = zip(table["prompt"].to_pylist(), table[column].to_pylist(), strict=True)
            marks |= {(prompt, model.removeprefix("expert/")): score for prompt, score in rows}
    return marks


def shares(
    asked: Sequence[tuple[str, str]], experts: Sequence[str | None], marks: Marks
) -> dict[str, float]:
    found = {
        "right": fmean(expert == name for (name, _), expert in zip(asked, experts, strict=True)),
        "refused": fmean(each is None for each in experts),
    }
    if marks:
        pairs = list(zip(asked, experts, strict=True))
        best = sum(marks[key_of(prompt), name] for (name, prompt), _ in pairs)
        scored = sum(marks[key_of(prompt), expert or "base"] for (_, prompt), expert in pairs)
        found["kept"] = scored / best
    return found


def tell(values: Tensor) -> str:
    return f"{values.mean():.0f} [{values.min():.0f}, {values.max():.0f}]"


if __name__ == "__main__":
    main()
