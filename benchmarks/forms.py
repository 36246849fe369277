"""Who answers a prompt, in each of the forms in which clients send it.

    python benchmarks/forms.py demo/experts demo --out forms
    python benchmarks/forms.py POOL FOLDER --routers discriminant,retrieval --texts choose

FOLDER has prompts of each expert's own task, in wordings that it wasn't trained on, as task files
with the experts' names; `demo` stands for those of the demo. Around them come the chats of
research/forms: `report.toml` is for reports, and nothing was chosen by it, `choose.toml` to choose
rules by. The row "whole chat" is discriminant as it would read the whole conversation as one
text. Writes OUT.json and OUT.png; needs the extra `figures`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import tomllib
from argparse import RawTextHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch

from phatgoose.apps.demo import SKILLS, TASKS
from phatgoose.experts.pool import Pool
from phatgoose.routing.conversation import ChatTexts
from phatgoose.routing.opening import open_chooser
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import Chat

TEXTS = Path(__file__).parents[1] / "research" / "forms"
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SHARED = 3  # rows of a task that have an instruction's sentence in common
WHOLE_CHAT = "whole chat"
Turns = list[tuple[str, str]]  # (role, content); a bare prompt has no role
Case = tuple[str, Turns, str | None]  # form, chat, expert (None: the base answers)


class Hand:
    """Draws what chats are made of: rows of the experts' `tasks`, and texts around them."""

    def __init__(self, tasks: Mapping[str, Sequence[str]], texts: Mapping[str, Any]) -> None:
        self.rng, self.tasks, self.texts = random.Random(0), tasks, texts
        self.parts = {name: parted(rows) for name, rows in tasks.items()}

    def of(self, kind: str) -> str:
        return str(self.rng.choice(self.texts[kind]))

    def row(self, name: str) -> str:
        return self.rng.choice(self.tasks[name])

    def part(self, name: str) -> tuple[str, str]:
        return self.rng.choice(self.parts[name])

    def done(self, text: str) -> Turns:
        return [(USER, text), (ASSISTANT, self.rng.choice(("Sure.", "Here you are.", "Done.")))]

    def other(self, name: str) -> Turns:
        return self.done(self.row(self.rng.choice([each for each in self.tasks if each != name])))

    def talk(self) -> Turns:
        chat = self.rng.choice(self.texts["conversations"])
        return [(USER, chat["user"]), (ASSISTANT, chat["assistant"])]


def parted(rows: Sequence[str]) -> list[tuple[str, str]]:
    """(instruction, input) of the rows that have both: shared sentences are instruction."""
    sentences = [re.split(r"(?<=[.:?!])\s+", row) for row in rows]
    counts = Counter(each for row in sentences for each in set(row))

    def part(row: list[str], is_shared: bool) -> str:
        return " ".join(each for each in row if (counts[each] >= SHARED) == is_shared)

    parts = [(part(row, True), part(row, False)) for row in sentences]
    return [each for each in parts if all(each)]


# From a hand and an expert's name, then from a hand and a text that no expert is for.
OF_EXPERTS: dict[str, Callable[[Hand, str], Turns]] = {
    "bare prompt": lambda h, n: [("", h.row(n))],
    "chat": lambda h, n: [(USER, h.row(n))],
    "short persona": lambda h, n: [(SYSTEM, h.of("personas_short")), (USER, h.row(n))],
    "long persona": lambda h, n: [(SYSTEM, h.of("personas_long")), (USER, h.row(n))],
    "tools, 200 tokens": lambda h, n: [(SYSTEM, h.of("tools_short")), (USER, h.row(n))],
    "tools, 1,000 tokens": lambda h, n: [(SYSTEM, h.of("tools_long")), (USER, h.row(n))],
    "after its own task": lambda h, n: [*h.done(h.row(n)), (USER, h.row(n))],
    "after another task": lambda h, n: [*h.other(n), (USER, h.row(n))],
    "after three others": lambda h, n: [*h.other(n), *h.other(n), *h.other(n), (USER, h.row(n))],
    "after general talk": lambda h, n: [*h.talk(), *h.talk(), (USER, h.row(n))],
    "passage before": lambda h, n: [(USER, f"{h.of('passages_with')}\n\n{h.row(n)}")],
    "passage after": lambda h, n: [(USER, f"{h.row(n)}\n\n{h.of('passages_with')}")],
    "instruction in system": lambda h, n: [(SYSTEM, (p := h.part(n))[0]), (USER, p[1])],
    "instruction, then input": lambda h, n: [*h.done((p := h.part(n))[0]), (USER, p[1])],
    "input, then instruction": lambda h, n: [*h.done((p := h.part(n))[1]), (USER, p[0])],
    "few-shot turns": lambda h, n: [
        *(turn for _ in range(3) for turn in h.done(h.row(n))),
        (USER, h.part(n)[1]),
    ],
    "follow-up": lambda h, n: [*h.done(h.row(n)), (USER, h.of("follow_ups"))],
    "follow-up later": lambda h, n: [*h.other(n), *h.done(h.row(n)), (USER, h.of("follow_ups"))],
}
OF_NOBODY: dict[str, Callable[[Hand, str], Turns]] = {
    "general": lambda _, text: [(USER, text)],
    "general, persona": lambda h, text: [(SYSTEM, h.of("personas_short")), (USER, text)],
    "general, after a task": lambda h, text: [*h.other(""), (USER, text)],
    "neutral": lambda _, text: [(USER, text)],
}


def cases(hand: Hand, most: int) -> Iterator[Case]:
    """`most` chats of each form of experts' prompts; of those of nobody each text once."""
    for form, make in OF_EXPERTS.items():
        in_parts = "instruction" in form or "few-shot" in form
        able = [n for n in hand.tasks if not in_parts or len(hand.parts[n]) > SHARED]
        for name in itertools.islice(itertools.cycle(able), most):
            yield form, make(hand, name), name
    for form, make in OF_NOBODY.items():
        for text in hand.texts[form.partition(",")[0]]:
            yield form, make(hand, text), None


class Reader:
    """Chooses for chats by a router, and counts the tokens that a reader reads for it."""

    def __init__(self, pool: Pool, router: str) -> None:
        self._is_whole = router == WHOLE_CHAT
        named = "discriminant:fallback=off" if self._is_whole else router
        self._chooser = open_chooser(pool, router=named)
        self.tokens = 0
        self._chooser.choose(["a"])  # reads what it reads once
        reader = getattr(self._chooser.ready, "reader", None)
        if reader is not None:
            reader._model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _: Any, inputs: Any, __: Any) -> None:
        self.tokens += inputs[0].numel()

    def __call__(self, turns: Turns) -> str | None:
        if self._is_whole:
            return self._chooser.experts[int(self._chooser.score([str(Chat(turns))]).argmax())]
        prompt = ChatTexts.of(turns) if turns[0][0] else turns[0][1]
        choice = self._chooser.choose([prompt])
        return next(iter(choice.named(self._chooser.experts)[0]), None)


def counted(reader: Reader, every: Sequence[Case]) -> dict[str, dict[str, float]]:
    """For each form: n, shares right (with Wilson's interval) and to the base, tokens a choice."""
    forms = defaultdict[str, list[tuple[bool, bool, int]]](list)
    for form, turns, expert in every:
        before, chosen = reader.tokens, reader(turns)
        forms[form].append((chosen == expert, chosen is None, reader.tokens - before))
    shares = {}
    for form, rows in forms.items():
        n, (right, base, tokens) = len(rows), map(fmean, zip(*rows, strict=True))
        centre, half = right + 1.92 / n, 1.96 * (right * (1 - right) / n + 0.96 / n**2) ** 0.5
        low, high = ((centre + side * half) / (1 + 3.84 / n) for side in (-1, 1))
        shares[form] = dict(n=n, right=right, low=low, high=high, base=base, tokens=tokens)
    return shares


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A row for each form, a bar with its interval for each router."""
    forms, height = list(next(iter(results.values()))), 0.8 / len(results)
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(forms) + 1), layout="constrained")
    for i, (router, of_forms) in enumerate(results.items()):
        rows = [of_forms[form] for form in forms]
        ends = [
            [100 * (r["right"] - r["low"]) for r in rows],
            [100 * (r["high"] - r["right"]) for r in rows],
        ]
        places = [at + (i - (len(results) - 1) / 2) * height for at in range(len(forms))]
        bars: dict[str, Any] = {"height": height, "xerr": ends, "error_kw": {"lw": 0.8}}
        axes.barh(places, [100 * r["right"] for r in rows], label=router, **bars)
    axes.set_yticks(range(len(forms)), forms)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="right expert, or the base for what fits none (%)")
    figure.legend(loc="outside upper center", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("pool")
    parser.add_argument("prompts")
    parser.add_argument("--routers", default=f"{WHOLE_CHAT},discriminant")
    parser.add_argument("--texts", default="report", choices=("report", "choose"))
    parser.add_argument("--most", type=int, default=30, help="chats of a form")
    parser.add_argument("--out", type=Path, default=Path("forms"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    pool = Pool.open(given.pool)
    places = {name: Path(given.prompts, f"{name}.jsonl") for name in pool.names}
    if given.prompts == "demo":
        places = {name: TASKS / f"{SKILLS[name]}.csv" for name in pool.names}
    tasks = {
        n: [row.input for row in load_task(p).evaluation_examples()] for n, p in places.items()
    }
    texts = tomllib.loads((TEXTS / f"{given.texts}.toml").read_text(encoding="utf-8"))
    every, results = list(cases(Hand(tasks, texts), given.most)), {}
    for router in given.routers.split(","):
        results[router] = counted(Reader(pool, router), every)
        for form, each in results[router].items():
            right, low, high, left = (100 * each[key] for key in ("right", "low", "high", "base"))
            line = f"{router:<14} {form:<24} n {each['n']:<4} right {right:.0f}"
            line = f"{line} [{low:.0f}, {high:.0f}], base {left:.0f}, {each['tokens']:.0f} tokens"
            sys.stdout.write(f"{line}\n")
    given.out.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
