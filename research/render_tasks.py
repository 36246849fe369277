"""Render the study's tasks so that one wording of each is never trained on.

    python research/render_tasks.py OUT [--wordings ../shared/data/wordings.py] [--max-words 120]

Each training task of ../shared/data has up to four wordings. One of them, drawn by a hash of the
task's name, is held out. Writes

    OUT/train/TASK.jsonl      training rows, and half of the validation rows to choose checkpoints
                              by, in the other wordings
    OUT/own-new/TASK.jsonl    the other half of the validation rows, in the held-out wording
    OUT/own-known/TASK.jsonl  the same rows in the wordings of training
    OUT/first/, OUT/last/     own-new with the instruction before what it is about, and after it:
                              the lines that all rows of a task share, moved; tasks without such
                              lines are left out
    OUT/own-de/, OUT/own-es/  own-new asked in German and Spanish, tasks of languages.toml alone
    OUT/*.toml                each of these six folders as a suite, with the tasks' metrics
    OUT/eval/TASK.jsonl       evaluation tasks: wordings that share no instruction with training,
                              and BIG-bench as it is

The data may not be distributed, so only this script is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def main() -> None:
    """Write all tasks, and print how many rows of each there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordings", type=Path, default=SHARED / "wordings.py")
    parser.add_argument("--max-words", type=int, default=120)
    given = parser.parse_args()
    library = _load(given.wordings)
    languages = tomllib.loads((Path(__file__).parent / "languages.toml").read_text("utf-8"))
    print(f"{'task':24} held out  train  selection  own")
    for task in library.TASKS.values():
        if task.folder == "eval":
            rows, _ = library.convert(task, 0, given.max_words)
            _write(given.out / "eval" / f"{task.name}.jsonl", rows)
            continue
        held = held_out(task)
        others = [each for each in range(task.drop, len(task.wordings)) if each != held]
        known = _render(library, task, given.max_words, others)
        new = _render(library, task, given.max_words, [held])
        training = {i: row for i, row in known.items() if row["split"] == "train"}
        choosing = {i: row for i, row in known.items() if i not in training and _coin(task, i)}
        own = sorted(i for i in known if i in new and i not in training and i not in choosing)
        _write(given.out / "train" / f"{task.name}.jsonl", [*training.values(), *choosing.values()])
        _write(given.out / "own-new" / f"{task.name}.jsonl", [new[i] for i in own])
        _write(given.out / "own-known" / f"{task.name}.jsonl", [known[i] for i in own])
        for place, moved in ordered([new[i] for i in own]).items():
            _write(given.out / place / f"{task.name}.jsonl", moved)
        for language, templates in languages.items():
            if task.name in templates:
                asked = in_language(library, task, held, templates[task.name], own)
                _write(given.out / f"own-{language}" / f"{task.name}.jsonl", asked)
        print(f"{task.name:24} {held:8}  {len(training):5}  {len(choosing):9}  {len(own)}")
    metrics = {each["name"]: each["metric"] for each in _tasks(given.wordings.parent)}
    own_folders = [f"own-{language}" for language in languages]
    for folder in ("own-new", "own-known", "first", "last", *own_folders):
        _write_suite(given.out, folder, metrics)
    for path in sorted((given.wordings.parent / "eval").glob("bb*.jsonl")):
        shutil.copy(path, given.out / "eval")


def held_out(task: Any) -> int:
    """The wording of a task that no expert is trained on."""
    usable = range(task.drop, len(task.wordings))
    return usable[_number(f"held out|{task.name}") % len(usable)]


def in_language(
    library: ModuleType, task: Any, held: int, template: str, lines: list[int]
) -> list[Row]:
    """The rows of `lines` in another language, with the labels of the held-out wording."""
    _, labels = task.wordings[held]
    task.wordings.append((template, labels))
    task.fixed.append("")  # no instruction in another language holds a target
    rendered = _render(library, task, 0, [len(task.wordings) - 1])
    return [rendered[line] for line in lines]


def ordered(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows with the lines that all of them share first, and last; {} if no line is shared.

    A cue such as "Answer:" is no instruction, so an instruction has four words or more.
    """
    lines = [row["input"].split("\n") for row in rows]
    shared = set.intersection(*map(set, lines)) if lines else set()
    if not any(len(line.split()) > 3 for line in shared):
        return {}
    found: dict[str, list[Row]] = {"first": [], "last": []}
    for row, own in zip(rows, lines, strict=True):
        instruction = "\n".join(line for line in own if line and line in shared)
        content = "\n".join(line for line in own if line and line not in shared)
        found["first"].append({**row, "input": f"{instruction}\n{content}"})
        found["last"].append({**row, "input": f"{content}\n{instruction}"})
    return found


def _write_suite(out: Path, folder: str, metrics: dict[str, str]) -> None:
    """Write OUT/FOLDER.toml: the folder's tasks, those that are written with their metric."""
    names = {"rouge-L": "rouge-l", "exact match": "exact-match"}
    lines = []
    for path in sorted((out / folder).glob("*.jsonl")):
        metric = names.get(metrics[path.stem])
        scored = f', metrics = ["{metric}"]' if metric else ""
        lines.append(f'  {{ file = "{folder}/{path.name}"{scored} }},\n')
    text = f'name = "{folder}"\ntasks = [\n{"".join(lines)}]\n'
    (out / f"{folder}.toml").write_text(text, encoding="utf-8")


def _tasks(place: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((place / "tasks.json").read_text(encoding="utf-8"))
    return found


def _render(library: ModuleType, task: Any, max_words: int, wordings: list[int]) -> dict[int, Row]:
    """The rows by line number, each in one of `wordings`; those that would leak are left out."""
    drawn: dict[int, int] = {}
    rows = library.load(task)[0]  # also finds the task's labels, which rendering needs

    def draw(task: Any, seed: int, index: int, row: Row) -> int:
        first = _number(f"{seed}|{task.name}|{index}") % len(wordings)
        tries = [*wordings[first:], *wordings[:first]]
        drawn[index] = next((each for each in tries if not library.leaks(task, each, row)), -1)
        return max(drawn[index], 0)

    return {
        number: row
        for number, row in _converted(library, task, max_words, rows, draw).items()
        if drawn.get(number, -1) >= 0
    }


def _converted(
    library: ModuleType,
    task: Any,
    max_words: int,
    rows: list[tuple[int, Row]],
    draw: Callable[..., int],
) -> dict[int, Row]:
    """What `library.convert` makes of each row on its own, so that line numbers are known."""
    found: dict[int, Row] = {}
    original, load = library.draw, library.load
    library.draw = draw
    try:
        for number, row in rows:
            library.load = lambda _, one=(number, row): ([one], 0)
            converted, _ = library.convert(task, 0, max_words)
            if converted:
                found[number] = converted[0]
    finally:
        library.draw, library.load = original, load
    return found


def _coin(task: Any, line: int) -> bool:
    return _number(f"choosing|{task.name}|{line}") % 2 == 0


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wordings", path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["wordings"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
