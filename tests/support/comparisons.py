"""Small comparisons: experts, suites and references, and their cells by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phatgoose.base import Base, load_base
from phatgoose.evaluation.compare import METHODS, compare, single_rows
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.results import Comparison
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach, load
from phatgoose.tasks.task import Example, Task

OTHERS = ("base", "best-individual", "oracle", "few-shot")  # few-shot needs a task's examples
ROUTERS = [name for name in METHODS if name not in OTHERS]
EXPERTS = ("e0", "e1", "e2")
REFERENCES = ("an expert", "a pool", "a routed model", "a base")
SUITES = {"mixed": ("choose", "pick", "say"), "plain": ("choose", "count")}
TASKS = ("choose", "pick", "say", "count")
TOKENS = 4  # of generated answers where a task says nothing
TOML = """
name = "mixed"
tasks = [
    { file = "plain/choose.jsonl" },
    { file = "pick.jsonl", metrics = ["accuracy"] },
    { file = "say.jsonl", metrics = ["rouge-l", "bleu"], max_new_tokens = 8 },
]
"""
WORDS = ("good", "bad", "so so", "none")
CHOOSE = [{"input": f"Film {i} is", "target": WORDS[i % 4], "choices": WORDS} for i in range(9)]
PICK = [{"input": f"{i} odd?", "target": "no", "choices": ["yes", "no"]} for i in range(7)]
SAY = [f"Tell me of {word}:" for word in (*WORDS, "more")]
COUNT = [f"{i} + 1 =" for i in range(3)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    return path


def answers_of(inputs: Sequence[str], tokens: int, base: Base, pool: Pool) -> list[dict[str, Any]]:
    """Rows whose targets are what one model after the other answers: all score more than 0."""
    rows = []
    turns = ({"k": 1}, {"router": "merged"}, {"router": "single:expert=e1"}, {"k": 2}, {})
    for text, options in zip(inputs, turns, strict=False):
        model = compose(pool, base, **{"router": "phatgoose", **options})
        task = Task("t", test=(Example(text, "x"),))
        answer = evaluate(model, task, max_new_tokens=tokens).scores[0].predictions[0].answer
        rows.append({"input": text, "target": answer, "references": [answer, "something else"]})
        detach(base.model)
    return rows


@dataclass(frozen=True)
class Setting:
    base: Path
    pool: Pool
    suites: tuple[Path | str, ...]
    references: dict[str, Path | str]

    def run(self, out: Path, methods: Any = "all", **options: Any) -> Comparison:
        options.setdefault("base", load_base(self.base, dtype="float32"))
        options.setdefault("max_new_tokens", TOKENS)
        suites = options.pop("suites", self.suites)
        return compare(options.pop("pool", self.pool), suites, methods, out=out, **options)


@dataclass(frozen=True)
class Done:
    folder: Path
    comparison: Comparison


def runs_of(*rows: str, tasks: Sequence[str] = TASKS) -> list[tuple[str, str]]:
    return [(row, task) for row in rows for task in tasks]


def runs_in(folder: Path, pool: Pool) -> list[tuple[str, str]]:
    """(router, expert or base; dataset) of every run that is stored, in their order."""
    experts = {row.identity["pool"][0]: row.name for row in single_rows(pool)}
    runs = []
    for key in (line["key"] for line in stored_in(folder)):
        name, method = key["method"].get("router", "base"), key["method"]
        runs.append((experts[method["pool"][0]] if name == "single" else name, key["task"]))
    return runs


def by_hand(row: str, setting: Setting, base: Base) -> Any:
    """The model of a row, composed without `compare`."""
    if row in (*ROUTERS, *EXPERTS):
        router = row if row in ROUTERS else f"single:expert={row}"
        return compose(setting.pool, base, router=router)
    place = setting.references.get(row)
    return {
        "base": lambda: base,
        "an expert": lambda: compose(place, base, router="single"),
        "a pool": lambda: compose(place, base, router="phatgoose"),
        "a routed model": lambda: load(place, base),
        "a base": lambda: load_base(place, dtype="float32"),
    }[row]()


def stored_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_bytes().splitlines()]
