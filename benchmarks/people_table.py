"""The pool of people as a benchmark: who answers, by our routers, plain rules, an LLM, and yours.

    python benchmarks/people_table.py --out table          # all of our rows, on hand 2
    python benchmarks/people_table.py --row my_rows:most_words --only --out mine

A row is a function of a pool and its chats (people_rows.Pool), which answers each chat by itself
with an expert's name, or None for the base: --row MODULE:FUNCTION, of a module in this folder or
on the path; repeatable. docs/people.md has the rules. OUT.json keeps finished rows, and the same
command goes on with the others; OUT.md is the table. Hand 3 is for reports: run it once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
import tomllib
from argparse import RawTextHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from people import Answer, drawn, shares
from people_cases import TEXTS, Case, cases, load_hand
from people_rows import OURS, Pool, Row
from phatgoose.routing.conversation import base_texts

COLUMNS = {  # manner: what the table calls it
    "plain": "plain",
    "light": "light",
    "medium": "medium",
    "heavy": "heavy",
    "typos 7 %": "typos 7 %",
    "de": "German",
    "ja": "Japanese",
    "middle of 400 words": "middle of 400",
    "beside code": "code",
    "frame": "frames",
    "helper -> base": "helpers",
    "general -> base": "general",
    "near -> base": "near misses",
}
Shares = Mapping[str, Mapping[str, float]]


def pools(skills: int, prompts: int, draws: int) -> Iterator[Pool]:
    """As many pools as a skill is in `draws` of, on average; their prompts are of hand 1."""
    hand = load_hand(1)
    text = (TEXTS / "skills.toml").read_text(encoding="utf-8")
    descriptions = tomllib.loads(text)
    of_skills = len(hand.skills)
    if skills > of_skills:
        sys.exit(f"Only {of_skills} skills have a description, wanted {skills} experts.")
    for draw in range(math.ceil(draws * of_skills / skills)):
        own = drawn(hand, skills, prompts, draw)
        yield Pool(own, {name: descriptions[name] for name in own}, base_texts())


def answers(row: Row, pool: Pool, every: Sequence[Case], names: set[str]) -> Iterator[Answer]:
    """Of the cases whose skill is in the pool, or that are nobody's; `names` are all skills."""
    given = [case for case in every if case.owner in pool.prompts or case.owner not in names]
    answered = row(pool, [case.turns for case in given])
    if len(answered) != len(given):
        sys.exit(f"The row gave {len(answered)} answers to {len(given)} chats.")
    for case, name in zip(given, answered, strict=True):
        if name is not None and name not in pool.prompts:
            sys.exit(f"The row answered {name!r}, which is no expert of the pool, nor None.")
        is_right = name in case.wanted if case.wanted else name is None
        yield Answer(case.manner, case.owner, is_right, name is None)


def measured(row: Row, hand: int, skills: int, prompts: int, draws: int, most: int) -> Shares:
    """For each manner of COLUMNS n, and the share right with its interval."""
    given = load_hand(hand)
    every = [case for case in cases(given, most) if case.manner in COLUMNS]
    names = set(given.skills)
    found = [
        answer
        for pool in pools(skills, prompts, draws)
        for answer in answers(row, pool, every, names)
    ]
    return shares(found)


def row_named(named: str) -> Row:
    """The function of --row, as MODULE:FUNCTION."""
    module, _, name = named.partition(":")
    try:
        row: Row = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        sys.exit(f"--row {named}: wanted MODULE:FUNCTION, a function of a pool and chats: {error}.")
    return row


def table(results: Mapping[str, Shares]) -> str:
    """Markdown: a row for each method, a column for each manner."""
    manners = [manner for manner in COLUMNS if all(manner in row for row in results.values())]
    heads = ["", *(COLUMNS[manner] for manner in manners)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    counts = next(iter(results.values()))
    lines.append("| n | " + " | ".join(str(int(counts[m]["n"])) for m in manners) + " |")
    for label, row in results.items():
        lines.append(f"| {label} | " + " | ".join(_cell(row[m]) for m in manners) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, float]) -> str:
    right, low, high = (100 * row[key] for key in ("right", "low", "high"))
    return f"{right:.0f} [{low:.0f}, {high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--hand", type=int, default=2, choices=(2, 3))
    parser.add_argument(
        "--row", action="append", default=[], help="a row of yours: MODULE:FUNCTION"
    )
    parser.add_argument("--only", action="store_true", help="leave our rows out")
    parser.add_argument("--skills", type=int, default=24, help="experts in a pool, 40 at most")
    parser.add_argument("--prompts", type=int, default=3, help="of each expert, 16 at most")
    parser.add_argument("--draws", type=int, default=2, help="pools that a skill is in, on average")
    parser.add_argument("--most", type=int, default=1, help="cases of each manner and skill")
    parser.add_argument("--out", type=Path, default=Path("table"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {key: getattr(given, key) for key in ("hand", "skills", "prompts", "draws", "most")}
    rows = {**({} if given.only else OURS), **{named: row_named(named) for named in given.row}}
    kept = given.out.with_suffix(".json")
    content: dict[str, Any] = {**sizes, "rows": {}}
    if kept.exists():
        content = json.loads(kept.read_text(encoding="utf-8"))
        if any(content[key] != value for key, value in sizes.items()):
            sys.exit(f"{kept} is of other sizes: name another --out.")
    for label, row in rows.items():
        if label not in content["rows"]:
            start = time.process_time()
            content["rows"][label] = measured(row, **sizes)
            seconds = time.process_time() - start
            print(f"{label}: {seconds:.0f} s of a core", file=sys.stderr, flush=True)
            kept.write_text(json.dumps(content, indent=1), encoding="utf-8")
    labels = dict.fromkeys([*rows, *content["rows"]])
    text = table({label: content["rows"][label] for label in labels})
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
