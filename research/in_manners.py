"""Training tasks with their prompts in people's manners, to train experts that know these.

    python research/in_manners.py DATA/train OUT [--seed 0]

Each prompt comes in a manner that is drawn, as teach_reader.py draws it of its own texts: plain,
polite, misspelt, in small or capital letters, beside a paste, in a frame. None of these texts is in
benchmarks/people. Targets and choices stay.
"""

from __future__ import annotations

import argparse
import json
import random
from argparse import RawTextHelpFormatter
from pathlib import Path

from teach_reader import Texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    texts = Texts.load()
    given.out.mkdir(parents=True, exist_ok=True)
    for file in sorted(given.tasks.glob("*.jsonl")):
        lines = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            rng = random.Random(f"{given.seed}/{file.stem}/{number}")
            row["input"] = texts.in_manner(row["input"], rng)
            lines.append(json.dumps(row, ensure_ascii=False))
        (given.out / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
