"""Who answers a prompt in a pool as people have it, in people's own manners (people/README.md).

    python benchmarks/people.py --hand 2 --readers minilm --skills 24 --prompts 3
    python benchmarks/people.py --readers minilm,smollm2:10-19 --rules \
        discriminant,discriminant:views=wholes,logistic

The pools' statistics are of hand 1's prompts. A rule is `discriminant`, as the product has it, or
`nearest` prompt, `centroid` or `logistic` regression over the same states, then options:
  views       wholes (the whole, its first and last paragraph), or parts too, as the product has it
  margin      by how much more a part must lead than a whole text
  fallback    by how much the base may lead before it answers, as the router's setting
  unit        of the fallback: fixed, or median (the median lead of the base's own texts)
Writes OUT.json and OUT.png; needs the extra `figures`. Hand 3 is for reports: choose nothing by it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from argparse import RawTextHelpFormatter
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from people_cases import SEED, Case, Hand, cases, load_hand
from people_readers import Reader
from people_rules import MAKERS, Fitted, Rule, Viewed, in_medians, viewed
from phatgoose.routing import conversation
from phatgoose.routing.conversation import ScoredText, base_texts, deciding_text

RESAMPLES = 1000
MARKS = "osD^v"
CHUNK = 1024  # texts whose states are scored at a time


class Answer(NamedTuple):
    """Of one case in one pool: whether what answers is right, and whether it is the base."""

    manner: str
    owner: str
    is_right: bool
    is_base: bool


class Measure:
    """Cases of a hand, read by a reader: answers of rules in pools that are drawn of hand 1."""

    def __init__(self, reader: Reader, given: Sequence[Case], rules: Sequence[Rule]) -> None:
        self._pools, self._cases = load_hand(1), given
        self._views = {rule.views: [viewed(each, rule.views) for each in given] for rule in rules}
        self._classes = dict(base_texts())
        texts = dict.fromkeys(self._texts())
        self._rows = {text: row for row, text in enumerate(texts)}
        self._states = reader.states(list(texts))

    def _texts(self) -> Iterator[str]:
        for texts in self._classes.values():
            yield from texts
        for skill in (*self._pools.skills.values(), *self._pools.others.values()):
            yield from skill["prompts"]
        for of_cases in self._views.values():
            yield from (text for case in of_cases for text in _flat(case))

    def _of(self, texts: Iterable[str]) -> Tensor:
        return self._states[[self._rows[text] for text in texts]]

    def in_pools(self, rule: Rule, skills: int, prompts: int, draws: int) -> Iterator[Answer]:
        """The answers in as many pools as a skill is in `draws` of, on average."""
        of_cases = len(self._pools.skills)
        for draw in range(math.ceil(draws * of_cases / min(skills, of_cases))):
            yield from self.answers(rule, skills, prompts, draw)

    def answers(self, rule: Rule, skills: int, prompts: int, draw: int) -> Iterator[Answer]:
        """The answers in pool number `draw` of so many skills with so many prompts each."""
        pool = drawn(self._pools, skills, prompts, draw)
        base = [self._of(texts) for texts in self._classes.values()]
        conversation.MARGIN = rule.margin
        conversation.HELPS = rule.helps
        conversation.ONLY_FOLLOWS = rule.only_follows
        fitted = MAKERS[rule.name]([self._of(texts) for texts in pool.values()], base, rule)
        if rule.unit == "median":
            fitted = in_medians(fitted, base)
        scores = torch.cat([fitted.scores(states) for states in torch.split(self._states, CHUNK)])
        names = list(pool)
        for case, messages in zip(self._cases, self._views[rule.views], strict=True):
            if case.owner in pool or case.owner not in self._pools.skills:
                scored = [self._scored(each, scores, fitted) for each in messages]
                answer = deciding_text(scored)
                name = names[answer.expert] if answer else None
                is_right = name in case.wanted if case.wanted else name is None
                yield Answer(case.manner, case.owner, is_right, name is None)

    def _scored(self, message: Viewed, scores: Tensor, fitted: Fitted) -> ScoredText:
        views = scores[[self._rows[text] for text in (*message.wholes, *message.parts)]]
        count = len(message.wholes)
        wholes = ScoredText(views[:count], fitted.allowances, None, fitted.helpers)
        if wholes.lead > conversation.MARGIN:  # parts aren't read then
            return wholes
        return ScoredText(views, fitted.allowances, count, fitted.helpers)


def _flat(messages: Sequence[Viewed]) -> list[str]:
    return [text for message in messages for texts in message for text in texts]


def drawn(hand: Hand, skills: int, prompts: int, draw: int) -> dict[str, list[str]]:
    """Pool number `draw`: so many prompts of each of so many skills, of others where few are."""
    rng = random.Random(f"{SEED}/{skills}/{prompts}/{draw}")
    names = rng.sample(list(hand.skills), min(skills, len(hand.skills)))
    more = rng.sample(list(hand.others), min(skills - len(names), len(hand.others)))
    rows = {name: hand.skills[name]["prompts"] for name in names}
    rows |= {name: hand.others[name]["prompts"] for name in more}
    return {name: rng.sample(texts, min(prompts, len(texts))) for name, texts in rows.items()}


def shares(answers: Iterable[Answer]) -> dict[str, dict[str, float]]:
    """For each manner n, shares right (with a bootstrap over skills or texts) and to the base."""
    manners = defaultdict[str, dict[str, list[Answer]]](lambda: defaultdict(list))
    for answer in answers:
        manners[answer.manner][answer.owner].append(answer)
    found = {}
    for manner, owners in manners.items():
        counts = torch.tensor([float(len(rows)) for rows in owners.values()])
        right = torch.tensor([float(sum(r.is_right for r in rows)) for rows in owners.values()])
        base = sum(answer.is_base for rows in owners.values() for answer in rows)
        picks = torch.randint(
            len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(SEED)
        )
        means = right[picks].sum(dim=1) / counts[picks].sum(dim=1)
        low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
        n = int(counts.sum())
        share = float(right.sum()) / n
        found[manner] = dict(n=n, right=share, low=low, high=high, base=base / n)
    return found


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each manner; for each setting right [interval] and what the base answers."""
    lines = ["", "per cent right [95 %] / left to the base:"]
    lines += [f"({number}) {setting}" for number, setting in enumerate(results, 1)]
    manners = list(next(iter(results.values())))
    for manner in manners:
        cells = [_cell(of_manners[manner]) for of_manners in results.values()]
        lines.append(f"{manner:<30}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Mapping[str, float]) -> str:
    right, low, high, base = (100 * row[key] for key in ("right", "low", "high", "base"))
    return f"{right:.0f} [{low:.0f}, {high:.0f}] / {base:.0f}"


def draw_figure(results: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """A row for each manner, a dot with its interval for each setting."""
    manners = list(next(iter(results.values())))
    height = len(manners) * (0.25 + 0.04 * len(results)) + 0.2 * len(results) + 0.8
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    for number, (setting, of_manners) in enumerate(results.items()):
        rows = [of_manners[manner] for manner in manners]
        shift = 0.7 * ((number + 0.5) / len(results) - 0.5)
        places = [at + shift for at in range(len(manners))]
        right = [100 * row["right"] for row in rows]
        ends = [[100 * (row["right"] - row["low"]) for row in rows]]
        ends.append([100 * (row["high"] - row["right"]) for row in rows])
        mark = MARKS[number // 10 % len(MARKS)]  # colours come again after ten
        axes.errorbar(right, places, xerr=ends, fmt=mark, ms=4, lw=1, label=setting)
    axes.set_yticks(range(len(manners)), manners)
    axes.set_ylim(len(manners) - 0.5, -0.5)
    axes.set(xlim=(-2, 102), xlabel="right expert, or the base for what fits none (%)")
    axes.grid(axis="x", lw=0.4)
    for at in range(1, len(manners), 2):
        axes.axhspan(at - 0.5, at + 0.5, color="0.95", zorder=0)
    figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--hand", type=int, default=2, choices=(2, 3))
    parser.add_argument("--readers", default="minilm", help="minilm, smollm2:10-19, gemma, qwen")
    parser.add_argument("--rules", default="discriminant")
    parser.add_argument("--skills", default="24", help="experts in a pool, as 5,24,100")
    parser.add_argument("--prompts", default="3", help="of each expert, as 1,3,16")
    parser.add_argument("--draws", type=int, default=4, help="pools that a skill is in, on average")
    parser.add_argument("--most", type=int, default=2, help="cases of each manner and skill")
    parser.add_argument("--manners", help="only these, as plain,light")
    parser.add_argument("--out", type=Path, default=Path("people"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = cases(load_hand(given.hand), given.most)
    if given.manners:
        every = [case for case in every if case.manner in given.manners.split(",")]
    rules = {named: Rule.of(named) for named in given.rules.split(",")}
    results, settings = {}, list[dict[str, Any]]()
    for reader in given.readers.split(","):
        measure = Measure(Reader.of(reader), every, list(rules.values()))
        for named, rule in rules.items():
            for skills in map(int, given.skills.split(",")):
                for prompts in map(int, given.prompts.split(",")):
                    setting = f"{reader} {named}, {skills} experts of {prompts}"
                    results[setting] = shares(measure.in_pools(rule, skills, prompts, given.draws))
                    settings.append({"reader": reader, "skills": skills, "prompts": prompts})
                    settings[-1] |= {"rule": asdict(rule), "manners": results[setting]}
    print(table(results))
    content = {"hand": given.hand, "draws": given.draws, "settings": settings}
    given.out.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw_figure(results, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
