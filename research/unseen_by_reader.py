"""What a reader gains where no expert is a task's own, from SmolLM2's marks.

    python research/unseen_by_reader.py DATA [--readers e5,taught,minilm] [--count 200]

DATA is what `render_tasks.py` writes, readers are those of benchmarks/people. For each unseen
prompt, read as a whole, `discriminant` chooses an expert; it can't leave one to the base. Its score
is what that expert has for the prompt in the marks. Choices by the base's own reading are in the
marks.
Points with 95 % intervals over datasets and examples, in pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from argparse import RawTextHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from ceiling import Datasets, best, chosen, read, told
from kept_by_reader import MARKS, training_prompts

from people_readers import Reader
from people_rules import Rule, discriminant
from phatgoose.routing.conversation import base_texts
from phatgoose.tasks.loading import load_task

UNSEEN = MARKS / "smollm2-135m-tails.parquet"
ENDING = "\nAnswer:"  # of BIG-bench's prompts, as they were scored


def main() -> None:
    given = _options()
    torch.set_num_threads(1)
    data = read(UNSEEN, "unseen")
    prompts = prompts_of(given.data / "eval", data)
    experts = json.loads(parquet.read_schema(UNSEEN).metadata[b"phatgoose"])["experts"]
    columns = {
        "base": [each["base"] for each in data.values()],
        "random expert": [each["experts"].mean(axis=1) for each in data.values()],
        "best expert": [best(each["experts"]) for each in data.values()],
        "base's reading": [chosen(each["experts"], each["discriminant"]) for each in data.values()],
    }
    readers = given.readers.split(",")
    for name in readers:
        reader = Reader.of(name)
        samples = [training_prompts(given.data, expert, given.count) for expert in experts]
        columns[name] = chosen_by(reader, samples, data, prompts)
    pairs = [(name, "random expert") for name in ("base's reading", *readers)]
    pairs += [("taught", name) for name in readers if "taught" in readers and name != "taught"]
    rows = sum(map(len, columns["base"]))
    print(f"{len(data)} datasets, n = {rows}; {len(experts)} experts, {given.count} prompts each")
    for difference, (value, low, high) in told(columns, *pairs).items():
        print(f"| {difference} | {value:+.1f} [{low:.1f}, {high:.1f}] |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--readers", default="e5,taught,minilm")
    parser.add_argument("--count", type=int, default=200, help="prompts of each expert")
    return parser.parse_args()


def prompts_of(folder: Path, data: Datasets) -> dict[str, list[str]]:
    """The prompts of each dataset in the order of its marks, found by their hashes."""
    table = parquet.read_table(UNSEEN, columns=["prompt", "task", "wording"]).to_pylist()
    found = {}
    for task in data:
        ending = ENDING if task.startswith("bb") else ""
        rows = load_task(folder / f"{task}.jsonl").evaluation_examples()
        texts = [row.input + ending for row in rows]
        by_mark = {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}
        marks = [
            row["prompt"] for row in table if row["wording"] == "unseen" and row["task"] == task
        ]
        found[task] = [by_mark[mark] for mark in marks]
    return found


def chosen_by(
    reader: Reader,
    samples: Sequence[Sequence[str]],
    data: Datasets,
    prompts: dict[str, list[str]],
) -> list[np.ndarray]:
    """The scores of whom `discriminant` chooses, for each dataset."""
    every = [*(text for texts in samples for text in texts)]
    every += [text for texts in prompts.values() for text in texts]
    classes = dict(base_texts())
    every += [text for texts in classes.values() for text in texts]
    texts = list(dict.fromkeys(every))
    states = reader.states(texts)
    rows = {text: row for row, text in enumerate(texts)}

    def of(some: Sequence[str]) -> torch.Tensor:
        return states[[rows[text] for text in some]]

    fitted = discriminant([of(each) for each in samples], list(map(of, classes.values())), Rule())
    got = []
    for task, each in data.items():
        by = fitted.scores(of(prompts[task]))[:, : len(samples)]
        got.append(chosen(each["experts"], by.numpy()))
    return got


if __name__ == "__main__":
    main()
