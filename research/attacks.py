"""What statistics that a stranger publishes take from a pool, with router discriminant.

    PYTHONPATH=benchmarks python research/attacks.py OUT.json [--prompts 3 16] [--draws 4]

Pools are drawn of hand 1 (benchmarks/people): 24 experts, of which the last turns attacker and
comes first, so that it wins ties. Its statistics are one of PLACEMENTS. Chosen is by the product's
own `open_chooser`, for the other experts' prompts of hand 2 and for its general requests. Experts
publish three prompts: of their statistics' own, or where "other words" are said, of hand 2, which
are then not chosen for. Printed are, in per cent, what the attacker takes of both with bootstrap
intervals over skills or texts, and in how many pools the audit names it, and anyone else. Then, who
answers in pools without an attacker where a client pastes others' requests beside its own.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from people import Answer as Taken
from people import drawn, shares
from people_cases import SEED, Hand, load_hand
from phatgoose.analysis.audit import audit
from phatgoose.base.identity import BaseReference
from phatgoose.errors import PhatgooseError
from phatgoose.experts.expert import Expert, ExpertInfo
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import PARTS, WHOLE, prompt_statistics_of
from phatgoose.reader import Reader, open_reader
from phatgoose.routing.conversation import base_texts
from phatgoose.routing.opening import open_chooser
from phatgoose.routing.routers.base_classes import moments_of_base
from phatgoose.sites import Tensors

SKILLS = 24
PUBLISHED = 3  # example prompts of each expert
TARGETS = 3
TRIES = 60
MEAN, FACTOR, REST = (f"{WHOLE}.{part}" for part in PARTS)
LARGEST = torch.finfo(torch.float32).max


class Placed(NamedTuple):
    """What it publishes, and of how many prompts it says that is."""

    statistics: Tensors
    count: int | None = None


class Given(NamedTuple):
    """What a stranger knows: its own statistics and the others', and their published prompts."""

    own: Tensors
    others: Sequence[Tensors]
    published: Sequence[Tensor]  # the states of each other's
    of_base: Mapping[str, Tensor]
    general: Sequence[str]  # the base's own texts of that class
    won: Callable[[Placed, Sequence[str]], float]  # the share of texts that it would take
    prompts: Sequence[str]  # the published ones


Placement = Callable[[Given], Placed]


def of_class(name: str, share: float = 1.0, count: int | None = None) -> Placement:
    """The statistics of a class of the base, or the own mean, moved there by a `share`."""

    def placed(given: Given) -> Placed:
        at = list(base_texts()).index(name)
        there = {f"{WHOLE}.{part}": given.of_base[part][at] for part in PARTS}
        mean = given.own[MEAN] + share * (there[MEAN] - given.own[MEAN])
        covariance = there if share == 1 else given.own
        return Placed({**covariance, MEAN: mean}, count)

    return placed


def searched(of_others: bool) -> Placement:
    """The best of TRIES means between others' or the base's, by texts that are public."""

    def placed(given: Given) -> Placed:
        rng = torch.Generator().manual_seed(SEED)
        others = torch.stack([other[MEAN] for other in given.others])
        centre = others.mean(dim=0)
        corners = others if of_others else torch.stack([given.own[MEAN], *given.of_base["mean"]])
        texts = given.prompts if of_others else given.general
        tried = list[tuple[float, int, Placed]]()
        for number in range(TRIES):
            weights = torch.rand(len(corners), generator=rng) ** 8
            mean = torch.einsum("e,ebd->bd", weights / weights.sum(), corners)
            beyond = 0.5 + 1.5 * float(torch.rand((), generator=rng))
            candidate = Placed({**given.own, MEAN: centre + beyond * (mean - centre)}, 1)
            tried.append((given.won(candidate, texts), number, candidate))
        return max(tried)[2]

    return placed


def of_half_the_class(given: Given) -> Placed:
    """Statistics of every other text of the base's general class."""
    texts = given.general[::2]
    return Placed(prompt_statistics_of(open_reader("e5").states(texts)), len(texts))


def at_centre(share: float = 1.0) -> Placement:
    """The own mean, moved to that of the others by a `share`."""

    def placed(given: Given) -> Placed:
        centre = torch.stack([other[MEAN] for other in given.others]).mean(dim=0)
        return Placed({**given.own, MEAN: torch.lerp(given.own[MEAN], centre, share)})

    return placed


def of_published(count: int, owners: int | None = None) -> Placement:
    """Statistics of so many published prompts of each other expert, or of the first `owners`."""

    def placed(given: Given) -> Placed:
        states = torch.cat([rows[:count] for rows in given.published[:owners]])
        return Placed(prompt_statistics_of(states), len(states))

    return placed


def moved(one: Tensors, other: Tensors, share: float) -> Tensors:
    return {name: torch.lerp(part, other[name], share) for name, part in one.items()}


def scaled(mean: float = 1.0, deviation: float = 1.0, count: int | None = None) -> Placement:
    """The own statistics, times these."""

    def placed(given: Given) -> Placed:
        own = given.own
        parts = {
            MEAN: mean * own[MEAN],
            FACTOR: deviation * own[FACTOR],
            REST: deviation**2 * own[REST],
        }
        finite = {name: part.clamp(-LARGEST, LARGEST) for name, part in parts.items()}
        return Placed(finite, count)

    return placed


def filled(value: float) -> Placement:
    return lambda given: Placed({n: torch.full_like(p, value) for n, p in given.own.items()})


def masking(by: float) -> Placement:
    """The own prompts seem to vary most in directions that tell the others apart."""

    def placed(given: Given) -> Placed:
        means = torch.stack([other[MEAN] for other in given.others])
        factor = torch.zeros_like(given.own[FACTOR])
        away = (means - means.mean(dim=0)).transpose(0, 1)[:, : factor.shape[1]]
        factor[:, : away.shape[1]] = by * away
        return Placed({**given.own, FACTOR: factor})

    return placed


PLACEMENTS: Mapping[str, Placement] = {
    "honest": lambda given: Placed(given.own),
    **{f"class {name}": of_class(name) for name in base_texts()},
    **{f"general x {share}": of_class("general", share) for share in (0.3, 0.5, 0.7, 0.9, 1.1)},
    "general x 0.5, of 1 prompt": of_class("general", 0.5, count=1),
    "general x 0.7, of 1 prompt": of_class("general", 0.7, count=1),
    "half of the general class": of_half_the_class,
    "best of 60 for general": searched(of_others=False),
    "best of 60 for others": searched(of_others=True),
    "centre": at_centre(),
    "half way to the centre": at_centre(0.5),
    "copy of one": lambda given: Placed(given.others[0]),
    "copy of one, moved by 2 %": lambda given: Placed(moved(given.others[0], given.own, 0.02)),
    "copy of one, moved by 20 %": lambda given: Placed(moved(given.others[0], given.own, 0.2)),
    "published, 1 of each": of_published(1),
    "published, 2 of each": of_published(2),
    "published, 3 of each": of_published(PUBLISHED),
    "published of three": of_published(PUBLISHED, TARGETS),
    "published of one": of_published(PUBLISHED, 1),
    "of 1 prompt": scaled(count=1),
    "of 2^53 prompts": scaled(count=1 << 53),
    "no variance": scaled(deviation=0),
    "deviation / 1000": scaled(deviation=1e-3),
    "deviation x 10": scaled(deviation=10),
    "deviation x 1e15": scaled(deviation=1e15),
    "masking x 1": masking(1),
    "masking x 10": masking(10),
    "mean x 3": scaled(mean=3),
    "mean x -1": scaled(mean=-1),
    "mean x 1e30": scaled(mean=1e30),
    "zeros": filled(0.0),
    "denormal": filled(1e-44),
    "largest": filled(LARGEST),
}
TARGETED = {
    "copy of one": 1,
    "copy of one, moved by 2 %": 1,
    "copy of one, moved by 20 %": 1,
    "published of one": 1,
    "published of three": TARGETS,
}


class Remembering:
    """The states of texts by a reader, each read once, and kept in a file."""

    def __init__(self, reader: Reader, place: Path) -> None:
        self._read, self._place = reader.states, place
        self._known = load_file(place) if place.is_file() else {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known |= zip(missing, self._read(missing).unbind(), strict=True)
        return torch.stack([self._known[text] for text in texts])

    def keep(self) -> None:
        save_file({text: row.clone() for text, row in self._known.items()}, self._place)


def expert_of(name: str, reader: Reader, placed: Placed, folder: Path) -> Expert:
    """An expert that is nothing but these statistics; what `folder` has are its example prompts."""
    info = ExpertInfo(name, BaseReference("smollm2"), "", reader=reader.reference)
    info = replace(info, prompts_read=placed.count)
    draw = torch.Generator().manual_seed(len(name))
    factors = LoraFactors(torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw))
    return Expert(info, folder, {"x": factors}, {}, {}, None, placed.statistics)


class Pools:
    """Pools in which one expert is another's; texts are those of `hand`."""

    def __init__(self, reader: Reader, hand: Hand, folder: Path, most: int) -> None:
        self._reader, self._hand, self._folder, self._most = reader, hand, folder, most
        self._given = load_hand(1)

    def texts_of(self, skill: str) -> Sequence[str]:
        """What is chosen for: not the prompts that the skill's expert may publish."""
        return self._hand.skills[skill]["prompts"][PUBLISHED:][: self._most]

    def with_attackers(
        self, prompts: int, draw: int, in_other_words: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = drawn(self._given, SKILLS, prompts, draw)
        own = [*rows][-1]
        shown = {name: texts[:PUBLISHED] for name, texts in rows.items()}
        if in_other_words:
            shown = {name: self._hand.skills[name]["prompts"][:PUBLISHED] for name in rows}
        of_all = {n: prompt_statistics_of(self._reader.states(texts)) for n, texts in rows.items()}
        others = [name for name in rows if name != own]
        honest = [self._expert(n, Placed(of_all[n], len(rows[n])), shown[n]) for n in others]

        def pool_with(placed: Placed) -> Pool:
            placed = placed._replace(count=placed.count or prompts)
            return Pool((self._expert("attacker", placed, shown[own]), *honest))

        def won(placed: Placed, texts: Sequence[str]) -> float:
            names = answers_in(pool_with(placed), texts)
            return names.count("attacker") / len(names)

        given = Given(
            of_all[own],
            [of_all[name] for name in others],
            [self._reader.states(shown[name]) for name in others],
            moments_of_base(self._reader),
            base_texts()["general"],
            won,
            [text for name in others for text in shown[name]],
        )
        for title, place in PLACEMENTS.items():
            targets = others[: TARGETED.get(title, len(others))]
            texts = [(name, text) for name in targets for text in self.texts_of(name)]
            texts += [("", text) for text in self._hand.texts["general"]]
            yield title, self._outcome(pool_with(place(given)), texts)

    def with_clients(self, prompts: int, draw: int) -> Iterator[tuple[str, str, str]]:
        """(title, owner, answer): what beside a client's own request changes who answers."""
        rows = drawn(self._given, SKILLS, prompts, draw)
        experts = []
        for name, texts in rows.items():
            placed = Placed(prompt_statistics_of(self._reader.states(texts)), len(texts))
            experts.append(self._expert(name, placed, texts[:PUBLISHED]))
        pool = Pool(tuple(experts))
        rng = random.Random(SEED + draw)
        for title, make in PASTES.items():
            asked = list[tuple[str, str]]()
            for name in rows:
                for text in self.texts_of(name)[:2]:
                    others = [self.texts_of(other)[0] for other in rows if other != name]
                    rng.shuffle(others)
                    asked.append((name, make(text, others, rng.choice(self._hand.texts["short"]))))
            answers = answers_in(pool, [text for _, text in asked])
            yield from ((title, name, got) for (name, _), got in zip(asked, answers, strict=True))
        asked_of_nobody = self._hand.texts["general"]
        for title, make in PASTES.items():
            others = [self.texts_of(other)[0] for other in rows]
            made = [make(text, others, self._hand.texts["short"][0]) for text in asked_of_nobody]
            for text, got in zip(asked_of_nobody, answers_in(pool, made), strict=True):
                yield f"general: {title}", text, got

    def _expert(self, name: str, placed: Placed, texts: Sequence[str]) -> Expert:
        folder = self._folder / f"{name}-{abs(hash(tuple(texts)))}"
        folder.mkdir(exist_ok=True)
        lines = [" ".join(text.split()) for text in texts[:PUBLISHED]]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return expert_of(name, self._reader, placed, folder)

    def _outcome(self, pool: Pool, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
        report = audit(pool)
        outcome: dict[str, Any] = {
            "named": [f.kind for f in report.findings if f.experts == ("attacker",)],
            "accused": [name for name in report.unusual if name != "attacker"],
            "signs": {name: values for name, values in report.signs.items()},
        }
        try:
            answers = answers_in(pool, [text for _, text in texts])
        except PhatgooseError as error:
            return outcome | {"error": str(error), "rows": []}
        rows = [(*asked, got) for asked, got in zip(texts, answers, strict=True)]
        return outcome | {"rows": rows}


def answers_in(pool: Pool, texts: Sequence[str]) -> list[str]:
    """Who answers each text, "" for the base."""
    chosen = open_chooser(pool, router="discriminant").choose(texts)
    return [next(iter(named), "") for named in chosen.named(pool.names)]


Paste = Callable[[str, Sequence[str], str], str]  # of a request, others' requests and a passage
PASTES: Mapping[str, Paste] = {
    "alone": lambda text, others, passage: text,
    "a passage after it": lambda text, others, passage: f"{text}\n\n{passage}",
    "a passage with another's request in it": lambda text, others, passage: (
        f"{text}\n\n{passage} {others[0]} {passage}"
    ),
    "another's request after it": lambda text, others, passage: f"{text}\n\n{others[0]}",
    "a request of each other after it": lambda text, others, passage: "\n\n".join([text, *others]),
    "a request of each other on both sides": lambda text, others, passage: "\n".join(
        [*others[::2], text, *others[1::2]]
    ),
    "a request of each other, in its line": lambda text, others, passage: " ".join([text, *others]),
}


def interval(rows: Sequence[tuple[str, bool]]) -> str:
    """The share of rows (owner, bool) that are true, with its interval over owners."""
    found = shares(Taken("", owner, is_taken, False) for owner, is_taken in rows)[""]
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * found[key] for key in ("right", "low", "high")))


def line(title: str, outcomes: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for outcome in outcomes for row in outcome["rows"]]
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if not rows:
        return f"| {title} | {errors[0]} |"
    own = [row for row in rows if row[0]]
    general = [row for row in rows if not row[0]]
    named = Counter(kind for outcome in outcomes for kind in dict.fromkeys(outcome["named"]))
    found = sum(bool(outcome["named"]) for outcome in outcomes)
    accused = sum(len(outcome["accused"]) for outcome in outcomes)
    cells = (
        title,
        interval([(owner, got == "attacker") for owner, _, got in own]),
        interval([(owner, got == owner) for owner, _, got in own]),
        interval([(text, got == "attacker") for _, text, got in general]),
        interval([(text, not got) for _, text, got in general]),
        f"{found} of {len(outcomes)}",
        ", ".join(named),
        str(accused),
        f"{len(errors)} refused" if errors else "",
    )
    return "| " + " | ".join(cells) + " |"


HEAD = "| placement | takes of others | theirs right | takes of general | base | named |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[3, 16])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--hand", type=int, default=2, choices=(2,), help="3 is for reports once")
    parser.add_argument("--most", type=int, default=8, help="prompts of each skill of the hand")
    parser.add_argument("--clients", action="store_true", help="no attacker, only such clients")
    given = parser.parse_args()
    torch.set_num_threads(1)
    reader = open_reader("e5")
    remembered = Remembering(reader, given.out.with_suffix(".states"))
    reader.states = remembered  # type: ignore[method-assign]
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pools = Pools(reader, load_hand(given.hand), Path(folder), given.most)
        for prompts in given.prompts:
            for in_other_words in () if given.clients else (False, True):
                results = defaultdict[str, list[dict[str, Any]]](list)
                for draw in range(given.draws):
                    for title, outcome in pools.with_attackers(prompts, draw, in_other_words):
                        results[title].append(outcome)
                    remembered.keep()
                heading = f"{prompts} prompts{', published in other words' * in_other_words}"
                print(f"\n{heading}\n{HEAD}")
                for title, outcomes in results.items():
                    print(line(title, outcomes), flush=True)
                content[heading] = results
                given.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
            print(f"\n{prompts} prompts, no attacker\n| message | own expert | base | another |")
            by_title = defaultdict[str, list[tuple[str, str]]](list)
            for draw in range(given.draws):
                for title, owner, got in pools.with_clients(prompts, draw):
                    by_title[title].append((owner, got))
            remembered.keep()
            for title, rows in by_title.items():
                cells = (
                    interval([(owner, got == owner) for owner, got in rows]),
                    interval([(owner, not got) for owner, got in rows]),
                    interval([(owner, got not in ("", owner)) for owner, got in rows]),
                )
                print(f"| {title} | {' | '.join(cells)} |", flush=True)
            content[f"{prompts} prompts, clients"] = by_title
    given.out.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
