"""What corrections are worth: wrong choices that people put right join the expert's prompts.

    python benchmarks/corrections.py [--hand 2] [--prompts 3] [--draws 8] [--wrong 0.1]

A pool has 24 experts with a few prompts of hand 1 (people/README.md). Another hand's prompts come
one by one, half of them, in an order that is drawn. Who is answered wrongly corrects the choice:
the prompt joins the expert that should have answered, or, with the share --wrong, another one. The
other half, plain, is what the pool is scored by, before and after 5, 20 and 50 corrections. Hand 3
isn't offered. Statistics are grown as the package grows them (`experts.statistics.grown`).
"""

from __future__ import annotations

import argparse
import random
from argparse import RawTextHelpFormatter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import cast

import torch
from torch import Tensor

from people import drawn
from people_cases import load_hand
from phatgoose import reader
from phatgoose.experts.statistics import PARTS, WHOLE, grown, prompt_statistics_of
from phatgoose.routing.conversation import ScoredText, Views, base_texts, deciding_text
from phatgoose.routing.routers.discriminant import (
    COUNTS,
    Discriminant,
    Ready,
    middle_of_helpers,
    room_of,
    scores_by,
)
from phatgoose.routing.routers.prompt import Tables

SKILLS = 24
AFTER = (0, 5, 20, 50)
States = Mapping[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--hand", type=int, default=2, choices=(1, 2))
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--wrong", type=float, default=0.1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    read = reader.open_reader()
    remembered = Remembered(read)
    rows = [draw_of(given, draw, remembered) for draw in range(given.draws)]
    print(f"hand {given.hand}, {SKILLS} experts of {given.prompts}, {given.draws} draws")
    print("| after corrections | right | lowest, highest draw | largest fall of an expert, mean |")
    print("|---|---|---|---|")
    for place, after in enumerate(AFTER):
        right = [100 * fmean(row[place].values()) for row in rows]
        falls = []
        for row in rows:
            changes = [row[place][name] - row[0][name] for name in row[0]]
            falls.append(100 * min(changes))
        print(
            f"| {after} | {fmean(right):.0f} | {min(right):.0f}, {max(right):.0f} "
            f"| {fmean(falls):.0f} |"
        )


class Remembered:
    """States of texts, each read once."""

    def __init__(self, read: reader.Reader) -> None:
        self._read = read
        self._states: dict[str, Tensor] = {}

    def states(self, texts: Sequence[str]) -> Tensor:
        new = list(dict.fromkeys(text for text in texts if text not in self._states))
        if new:
            self._states |= dict(zip(new, self._read.states(new), strict=True))
        return torch.stack([self._states[text] for text in texts])


class Chooser:
    """Who answers a prompt in a pool of these statistics, as the product's chooser has it."""

    def __init__(self, names: Sequence[str], read: Remembered) -> None:
        self.names = names
        self._read = read
        self._base = [prompt_statistics_of(read.states(texts)) for texts in base_texts().values()]

    def refit(self, statistics: Mapping[str, States], counts: Mapping[str, int]) -> None:
        rule = Discriminant()
        every = [*(statistics[name] for name in self.names), *self._base]
        moments = {part: torch.stack([one[f"{WHOLE}.{part}"] for one in every]) for part in PARTS}
        self._lines = rule.lines(moments)
        self._helpers = middle_of_helpers(self._lines, moments["mean"])
        room = room_of(self._lines, moments["mean"])
        ready = Ready(self._lines, cast("reader.Reader", None), self._helpers, room)
        rows = {COUNTS: torch.tensor([float(counts[name]) for name in self.names])}
        self._allowances = rule.allowances(Tables(tuple(self.names), rows), ready)

    def choose(self, prompt: str) -> str | None:
        views = Views.of(prompt)
        scores = scores_by(self._lines, self._read.states((*views.wholes, *views.parts)))
        text = ScoredText(scores, self._allowances, len(views.wholes), self._helpers)
        answer = deciding_text([text])
        return self.names[answer.expert] if answer else None

    def right(self, prompts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """The share of each skill's prompts that its expert answers."""
        shares = {}
        for name, texts in prompts.items():
            shares[name] = fmean(self.choose(text) == name for text in texts)
        return shares


def draw_of(given: argparse.Namespace, draw: int, read: Remembered) -> list[dict[str, float]]:
    """The shares right of each skill, before and after so many corrections as AFTER has."""
    rng = random.Random(f"corrections/{draw}")
    first = load_hand(1)
    other = load_hand(given.hand)
    pool = drawn(first, SKILLS, given.prompts, draw)
    tested = {}
    stream = []
    for name, own in pool.items():
        texts = rng.sample(other.skills[name]["prompts"], len(other.skills[name]["prompts"]))
        if given.hand == 1:
            texts = [text for text in texts if text not in own]
        half = len(texts) // 2
        tested[name] = texts[:half]
        stream += [(name, text) for text in texts[half:]]
        if given.hand != 1:
            more = [text for text in first.skills[name]["prompts"] if text not in own]
            stream += [(name, text) for text in more]
    rng.shuffle(stream)
    statistics = {name: prompt_statistics_of(read.states(texts)) for name, texts in pool.items()}
    counts = {name: len(texts) for name, texts in pool.items()}
    chooser = Chooser(list(pool), read)
    chooser.refit(statistics, counts)
    results = [chooser.right(tested)]
    corrected = 0
    for name, text in stream:
        if chooser.choose(text) == name:
            continue
        if rng.random() < given.wrong:
            name = rng.choice([other for other in pool if other != name])
        statistics[name] = grown(statistics[name], counts[name], read.states([text]))
        counts[name] += 1
        corrected += 1
        chooser.refit(statistics, counts)
        if corrected in AFTER:
            results.append(chooser.right(tested))
        if corrected == AFTER[-1]:
            break
    print(f"draw {draw}: {corrected} corrections of {len(stream)} prompts", flush=True)
    return results + [results[-1]] * (len(AFTER) - len(results))


if __name__ == "__main__":
    main()
