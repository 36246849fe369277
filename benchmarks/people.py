"""Who answers a prompt in a pool as people have it, in people's own manners (people/README.md).

    python benchmarks/people.py --hand 2 --readers minilm --skills 24 --prompts 3
    python benchmarks/people.py --readers minilm,smollm2:10-19 --rules \
        discriminant,discriminant:views=pairs:margin=0.3:politeness=1,logistic

The pools' statistics are of hand 1's prompts. A rule is `discriminant`, as the product has it, or
`nearest` prompt, `centroid` or `logistic` regression over the same states, then options:
  views       product (the whole, its first and last paragraph), sentences, or pairs of them too
  margin      by how much more a sentence or pair must lead than a whole text
  politeness  1: a further class of texts of the base (people/politeness.toml)
  fallback    by how much the base may lead before it answers, as the router's setting
  unit        of the fallback: fixed, or median (the median lead of the base's own texts)
Writes OUT.json and OUT.png; needs the extra `figures`. Hand 3 is for reports: choose nothing by it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import tomllib
from argparse import RawTextHelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from people_cases import SEED, TEXTS, Case, Hand, cases, load_hand
from people_readers import Reader
from phatgoose.experts.statistics import PARTS, READ, moments_of
from phatgoose.routing.conversation import ChatTexts, ScoredText, answer_to, base_texts
from phatgoose.routing.routers.discriminant import COUNTS, Discriminant
from phatgoose.routing.routers.prompt import Tables

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
LEAST_WORDS = 3  # of a sentence that is a view
LEAST_SIGNS = 8  # the same where words aren't divided
MOST_PARTS = 24  # sentences and as many pairs, from both ends of a text
RESAMPLES = 1000
Scores = Callable[[Tensor], Tensor]  # [texts, blocks, d] to [texts, E + classes of the base]


@dataclass(frozen=True)
class Rule:
    """How an expert is chosen by states: one of MAKERS, and its options."""

    name: str = "discriminant"
    views: str = "product"
    margin: float = 0.0
    politeness: int = 0
    fallback: float = 0.15
    unit: str = "fixed"

    @classmethod
    def of(cls, named: str) -> Rule:
        """By its name and options, as discriminant:views=pairs:margin=0.3."""
        name, *options = named.split(":")
        values: dict[str, Any] = {"name": name}
        for option in options:
            key, _, value = option.partition("=")
            values[key] = type(getattr(cls, key))(value)
        rule = cls(**values)
        if rule.name not in MAKERS or rule.views not in PARTS_OF or rule.unit not in UNITS:
            raise SystemExit(f"There is no rule {named!r}: see --help.")
        return rule


# Views of a text beside the product's.


def sentences(text: str) -> list[str]:
    """The sentences of `text` that say something, if there are several."""
    rows = [row.strip() for row in SENTENCE_END.split(text)]
    said = [row for row in rows if len(row.split()) >= LEAST_WORDS or _is_long_in_signs(row)]
    return said if len(said) > 1 else []


def _is_long_in_signs(row: str) -> bool:
    return not row.isascii() and " " not in row and len(row) >= LEAST_SIGNS


def pairs(text: str) -> list[str]:
    """The sentences, and each two that follow one another."""
    single = sentences(text)
    double = [f"{one} {two}" for one, two in itertools.pairwise(single)]
    return [*_ends(single), *_ends(double)]


def _ends(rows: list[str]) -> list[str]:
    half = MOST_PARTS // 2
    return rows if len(rows) <= MOST_PARTS else rows[:half] + rows[-half:]


PARTS_OF: Mapping[str, Callable[[str], list[str]]] = {
    "product": lambda text: [],
    "sentences": lambda text: _ends(sentences(text)),
    "pairs": pairs,
}
UNITS = ("fixed", "median")


class Viewed(NamedTuple):
    """A message's views: as the product has them, then parts."""

    wholes: list[str]
    parts: list[str]


def viewed(case: Case, views: str) -> list[Viewed]:
    """The views of each of the user's messages."""
    chat = ChatTexts.of(case.turns, lambda texts: [[text] for text in texts])  # type: ignore[misc]
    wholes = [[str(view[0]) for view in message] for message in chat.messages]
    return [Viewed(each, PARTS_OF[views](each[0])) for each in wholes]


# Rules: scores of experts and of the base's classes, from states of examples of both.


class Fitted(NamedTuple):
    """A rule for a pool: scores, and by how much the base may lead each expert."""

    scores: Scores
    allowances: Tensor


Classes = Sequence[Tensor]  # of examples [examples, blocks, d], for each expert or class


def discriminant(experts: Classes, base: Classes, rule: Rule) -> Fitted:
    """The product's router, over the package's own statistics."""
    rows, classes = (_moments(each) for each in (experts, base))
    counts = torch.tensor([float(len(each)) for each in experts])
    tensors = {f"readings.{READ}.{part}": rows[part] for part in PARTS}
    names = tuple(map(str, range(len(experts))))
    tables = Tables(names, {**tensors, COUNTS: counts}, base=classes)
    router = Discriminant(fallback=rule.fallback)
    lines = router.ready(tables)
    return Fitted(lambda states: router.prompt_scores(states, lines), router.allowances(tables))


def _moments(every: Classes) -> dict[str, Tensor]:
    moments = [moments_of(states) for states in every]
    return {part: torch.stack([each[part] for each in moments]) for part in PARTS}


def nearest(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """The nearest example, by the cosine of standardised states."""
    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    examples = [unit(states) for states in every]

    def scores(states: Tensor) -> Tensor:
        rows = unit(states)
        return _no_follow_ups([(rows @ each.T).amax(dim=1) for each in examples])

    return Fitted(scores, torch.zeros(len(experts)))


def centroid(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """The nearest mean of examples, by the same cosine."""
    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    means = [normalize(unit(states).mean(dim=0), dim=0) for states in every]
    return Fitted(
        lambda states: _no_follow_ups([unit(states) @ mean for mean in means]),
        torch.zeros(len(experts)),
    )


def logistic(experts: Classes, base: Classes, _: Rule) -> Fitted:
    """Logistic regression over the same states; log-probabilities."""
    from sklearn.linear_model import LogisticRegression  # comes with sentence-transformers

    every, unit = _of_all(experts, base), _standardised([*experts, *base])
    owners = [number for number, states in enumerate(every) for _ in states]
    model = LogisticRegression(C=100.0, max_iter=300)  # of unit vectors
    model.fit(unit(torch.cat(every)).numpy(), owners)

    def scores(states: Tensor) -> Tensor:
        return _no_follow_ups(torch.tensor(model.predict_log_proba(unit(states).numpy())).T)

    return Fitted(scores, torch.zeros(len(experts)))


def _of_all(experts: Classes, base: Classes) -> list[Tensor]:
    """Experts and the base's classes but follow-ups: what a leading one means differs by rule."""
    return [*experts, *base[:-1]]


def _standardised(every: Classes) -> Scores:
    """States as unit vectors, after their mean and deviation over all examples."""
    examples = torch.cat(list(every))
    mean, deviation = examples.mean(dim=0), examples.std(dim=0).clamp(min=1e-6)
    return lambda states: normalize(((states - mean) / deviation).flatten(1), dim=1)


def _no_follow_ups(columns: Iterable[Tensor]) -> Tensor:
    rows = [column.float() for column in columns]
    return torch.stack([*rows, torch.full_like(rows[0], -torch.inf)], dim=1)


MAKERS: Mapping[str, Callable[[Classes, Classes, Rule], Fitted]] = {
    "discriminant": discriminant,
    "nearest": nearest,
    "centroid": centroid,
    "logistic": logistic,
}


def in_medians(fitted: Fitted, base: Classes) -> Fitted:
    """Allowances in units of the median lead of the base's own texts, its general and neutral."""
    scores = fitted.scores(torch.cat(list(base[:2])))
    experts = len(fitted.allowances)
    leads = scores[:, :experts].amax(dim=1) - scores[:, experts:-1].amax(dim=1)
    return fitted._replace(allowances=fitted.allowances * leads.median().abs())


# The measure.


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
        politeness = tomllib.loads((TEXTS / "politeness.toml").read_text(encoding="utf-8"))
        self._classes = [*base_texts()[:-1], *politeness.values(), base_texts()[-1]]
        texts = dict.fromkeys(self._texts())
        self._rows = {text: row for row, text in enumerate(texts)}
        self._states = reader.states(list(texts))

    def _texts(self) -> Iterator[str]:
        for texts in self._classes:
            yield from texts
        for skill in (*self._pools.skills.values(), *self._pools.others.values()):
            yield from skill["prompts"]
        for of_cases in self._views.values():
            yield from (text for case in of_cases for text in _flat(case))

    def _of(self, texts: Iterable[str]) -> Tensor:
        return self._states[[self._rows[text] for text in texts]]

    def answers(self, rule: Rule, skills: int, prompts: int, draw: int) -> Iterator[Answer]:
        """The answers in pool number `draw` of so many skills with so many prompts each."""
        pool = drawn(self._pools, skills, prompts, draw)
        classes = self._classes if rule.politeness else [*self._classes[:2], self._classes[-1]]
        base = [self._of(texts) for texts in classes]
        fitted = MAKERS[rule.name]([self._of(texts) for texts in pool.values()], base, rule)
        if rule.unit == "median":
            fitted = in_medians(fitted, base)
        names = list(pool)
        for case, messages in zip(self._cases, self._views[rule.views], strict=True):
            if case.owner in pool or case.owner not in self._pools.skills:
                expert = self._expert(messages, fitted, rule.margin)
                name = None if expert is None else names[expert]
                is_right = name in case.wanted if case.wanted else name is None
                yield Answer(case.manner, case.owner, is_right, name is None)

    def _expert(self, messages: Sequence[Viewed], fitted: Fitted, margin: float) -> int | None:
        scored = list[ScoredText]()
        for message in messages:
            scores = fitted.scores(self._of([*message.wholes, *message.parts]))
            scores[len(message.wholes) :, : len(fitted.allowances)] -= margin
            scored.append(ScoredText(scores, fitted.allowances))
        answer = answer_to(scored)
        return answer.expert if answer else None


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
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(manners) + 1.5), layout="constrained")
    for number, (setting, of_manners) in enumerate(results.items()):
        rows = [of_manners[manner] for manner in manners]
        shift = 0.7 * ((number + 0.5) / len(results) - 0.5)
        places = [at + shift for at in range(len(manners))]
        right = [100 * row["right"] for row in rows]
        ends = [[100 * (row["right"] - row["low"]) for row in rows]]
        ends.append([100 * (row["high"] - row["right"]) for row in rows])
        axes.errorbar(right, places, xerr=ends, fmt="o", ms=4, lw=1, label=setting)
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
    parser.add_argument("--draws", type=int, default=6, help="pools")
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
                    answers = [
                        answer
                        for draw in range(given.draws)
                        for answer in measure.answers(rule, skills, prompts, draw)
                    ]
                    results[setting] = shares(answers)
                    settings.append({"reader": reader, "skills": skills, "prompts": prompts})
                    settings[-1] |= {"rule": asdict(rule), "manners": results[setting]}
    print(table(results))
    content = {"hand": given.hand, "draws": given.draws, "settings": settings}
    given.out.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    draw_figure(results, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
