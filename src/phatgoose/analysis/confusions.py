"""A pool's own check: whose the experts' example prompts become once they are left out.

Of every expert one prompt at a time is left out of its statistics, and router discriminant chooses
for it. All experts lose one together: else those that keep all of theirs would be ahead. Whether
two experts are alike, or a prompt is another's, is seen in scores of the whole prompt. Not in the
paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import PoolError
from ..evaluation.tables import Table
from ..experts.expert import ENOUGH, FEW, Expert
from ..experts.pool import Pool
from ..experts.statistics import WHOLE, prompt_statistics_of
from ..reader import Reader
from ..routing.opening import open_chooser
from ..routing.routers.prompt import PromptChooser
from .findings import Finding

# Limits on mean differences of scores, chosen on hand 1 of benchmarks/people (pool_check.py), never
# on hand 3. They grow with the prompts that are left when one is out.
TWINS = -0.12  # what a prompt may lose at most where its expert's twin scores it
MISLABELLED = 0.4  # by how much another expert leads at a prompt that is clearly its own, less
LIKENESS = 2.0  # times the prompt's mean cosine with its expert's other prompts
STRAY = 0.5  # the same, on average over all prompts of an expert that keeps none
NEAREST = 0.5  # the least share of twins' prompts to which the twin is nearest
TAKEN = 1.5  # times as many prompts as its own a thief takes, from
ROBBED = 3  # so many experts
SAME = 0.01  # of the length of a mean: statistics are of these prompts
SHOWN = 60  # characters of a prompt
NAMED = 3  # warnings in a summary
BASE = "base"


@dataclass(frozen=True)
class LeftOut:
    """An example prompt of `owner`, and the expert that it gets without it: `winner`, or BASE."""

    owner: str
    prompt: str
    winner: str


@dataclass(frozen=True)
class Confusions:
    """Whose the `prompts` became, in the pool's order, with warnings and notes."""

    experts: tuple[str, ...]
    prompts: tuple[LeftOut, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        kept = sum(row.winner == row.owner for row in self.prompts)
        summary = (
            f"{kept} of {len(self.prompts)} example prompts stay with their expert when they are "
            f"left out; warnings: {len(self.findings)}"
        )
        titles = [f"{finding.kind} {' and '.join(finding.experts)}" for finding in self.findings]
        named = list(dict.fromkeys(titles))
        if not named:
            return summary
        more = ", …" if len(named) > NAMED else ""
        return f"{summary} ({', '.join(named[:NAMED])}{more})"

    @property
    def table(self) -> Table:
        """A row for each expert: how many of its prompts it keeps, and who gets the others."""
        rows = []
        for name in self.experts:
            winners = Counter(row.winner for row in self.prompts if row.owner == name)
            others = [f"{n} {winner}" for winner, n in winners.most_common() if winner != name]
            if winners:
                rows.append(
                    [name, str(winners.total()), str(winners[name]), ", ".join(others) or "-"]
                )
        notes = [*self.notes, *(finding.message for finding in self.findings)]
        return Table(self.summary, ["expert", "prompts", "kept", "the others go to"], rows, notes)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def confusions(pool: Pool | str | Path, reader: str | None = None) -> Confusions:
    """Whose each example prompt in `pool` becomes, left out of its own expert's statistics.

    Statistics that are of other prompts, such as training data, stay as they are, which a note
    says; so are experts of fewer than FEW prompts, which aren't judged. `reader` is that of
    `audit`. Raises PoolError where no expert has enough, and what `open_chooser` does.
    """
    opened = Pool.open(pool).measured(reader)
    judged = {z: e.prompts for z, e in enumerate(opened.experts) if len(e.prompts) >= FEW}
    if not judged:
        raise PoolError(
            f"No expert has {FEW} example prompts beside it; run 'phatgoose stats EXPERT --prompts "
            f"…' on each, which keeps them in prompts.txt."
        )
    chooser = open_chooser(opened, router="discriminant", reader=reader)
    reading = _RememberingReader(chooser.ready.reader)
    for z, prompts in judged.items():
        read = opened.experts[z].states
        if read is not None:
            reading.read.update(zip(prompts, read, strict=True))
    states = {z: reading.states(prompts) for z, prompts in judged.items()}
    own = {z for z in judged if is_of(opened.experts[z], states[z])}
    rows = list[LeftOut]()
    scored: dict[int, list[Tensor]] = {z: [] for z in judged}
    for turn in range(max(map(len, judged.values()))):
        experts = list(opened.experts)
        for z in own:
            experts[z] = without(experts[z], states[z], turn)
        rest = PromptChooser(chooser.router, chooser.router.tables(Pool(tuple(experts))))
        rest.ready = rest.ready._replace(reader=reading)
        present = [z for z, prompts in judged.items() if turn < len(prompts)]
        choice = rest.choose([judged[z][turn] for z in present])
        whole = torch.stack([states[z][turn] for z in present])
        scores = chooser.router.prompt_scores(whole, rest.ready)[:, : len(opened)]
        for z, named, row in zip(present, choice.named(opened.names), scores, strict=True):
            winner = next(iter(named), BASE)
            rows.append(LeftOut(opened.names[z], judged[z][turn], winner))
            scored[z].append(row - row[z])
    leads = {z: torch.stack(of_expert) for z, of_expert in scored.items()}
    rows.sort(key=lambda row: opened.names.index(row.owner))
    centre = torch.stack([of_expert.mean(dim=0) for of_expert in states.values()]).mean(dim=0)
    alike = {z: _alike(of_expert - centre) for z, of_expert in states.items()}
    findings = tuple(_findings(opened.names, rows, leads, alike))
    notes = [*_notes(opened, judged, own), *_helpful(opened.names, rows, findings)]
    return Confusions(opened.names, tuple(rows), findings, tuple(notes))


class _RememberingReader:
    """A reader of which each text is asked once."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.read: dict[str, Tensor] = {}

    def states(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.read]
        if new:
            self.read.update(zip(new, self._reader.states(new), strict=True))
        return torch.stack([self.read[text] for text in texts])


def is_of(expert: Expert, states: Tensor) -> bool:
    """Whether the statistics of `expert` are of the prompts with these `states`."""
    mean = expert.prompt_statistics[f"{WHOLE}.mean"]
    return bool((states.mean(dim=0) - mean).norm() < SAME * mean.norm())


def without(expert: Expert, states: Tensor, row: int) -> Expert:
    """`expert` with the statistics of all its `states` but one, or as it is where that is none."""
    if row >= len(states):
        return expert
    rest = torch.cat([states[:row], states[row + 1 :]])
    return expert.with_statistics(
        prompt_statistics=prompt_statistics_of(rest), prompts_read=len(rest)
    )


def _alike(states: Tensor) -> Tensor:
    """The mean cosine of each of the `states` [prompts, ..] with the others, [prompts]."""
    directions = normalize(states.flatten(1), dim=1)
    cosines = directions @ directions.sum(dim=0)
    return (cosines - 1) / (len(states) - 1)


def _notes(pool: Pool, judged: Iterable[int], own: set[int]) -> Iterator[str]:
    names = [pool.names[z] for z in judged if z not in own]
    if names:
        listed = ", ".join(names)
        yield f"Statistics of other prompts than prompts.txt, so none is left out: {listed}."


def _helpful(
    names: Iterable[str], rows: Iterable[LeftOut], findings: Iterable[Finding]
) -> Iterator[str]:
    """What would help experts that lose several prompts to one other, without a warning."""
    warned = {name for finding in findings for name in finding.experts}
    for name in names:
        winners = Counter(row.winner for row in rows if row.owner == name)
        count = winners.total()
        del winners[name]
        for other, lost in winners.most_common(1):
            if name not in warned and lost > 1:
                lost_to = f"{lost} of its {count} go to {other}"
                yield f"Two more prompts for {name} would help: {lost_to}."


def _findings(
    names: tuple[str, ...],
    rows: list[LeftOut],
    leads: dict[int, Tensor],
    alike: Mapping[int, Tensor],
) -> Iterator[Finding]:
    """Warnings by `leads` [prompts, E]: how much more each expert scores than a prompt's own.

    How `alike` an expert's prompts are tells others' prompts from its own that others do too.
    """
    wins = {z: Counter(row.winner for row in rows if row.owner == names[z]) for z in leads}
    best = {}
    nearest = {}
    unsure = set()
    for z, of_expert in leads.items():
        name = names[z]
        others = of_expert.clone()
        others[:, z] = -torch.inf
        best[z], nearest[z] = others.max(dim=1)
        count = len(of_expert)
        if wins[z][BASE] * 2 >= count:
            unsure.add(z)
            yield Finding(
                "orphan",
                f"{name} is an orphan: {wins[z][BASE]} of its {count} prompts go to the base. Give "
                f"it more prompts that say what it is for.",
                (name,),
            )
        elif best[z].min() > 0 and best[z].mean() > STRAY * _sure(count):
            unsure.add(z)
            takers = ", ".join(dict.fromkeys(names[y] for y in nearest[z].tolist()))
            yield Finding(
                "stray",
                f"{name} keeps none of its {count} prompts, which are more like those of {takers}. "
                f"Give it prompts of its own.",
                (name,),
            )
    yield from _thieves(names, wins, leads)
    sure = [z for z in leads if z not in unsure and len(leads[z]) >= ENOUGH]
    for z in sure:
        yield from _twins_of(z, sure, names, wins, leads, nearest)
        name = names[z]
        strange = best[z] / _sure(len(leads[z])) - LIKENESS * alike[z] > MISLABELLED
        for row in strange.nonzero().flatten().tolist():
            prompt = [given.prompt for given in rows if given.owner == name][row]
            other = names[int(nearest[z][row])]
            yield Finding(
                "mislabelled",
                f"A prompt of {name} is clearly {other}'s: {prompt[:SHOWN]!r}. Move it there, or "
                f"give {name} two more like it.",
                (name, other),
            )


Wins = Mapping[int, Counter[str]]  # of each expert's prompts, whose they became
Leads = Mapping[int, Tensor]


def _thieves(names: tuple[str, ...], wins: Wins, leads: Leads) -> Iterator[Finding]:
    for y, name in enumerate(names):
        robbed = [z for z in leads if z != y and wins[z][name]]
        taken = sum(wins[z][name] for z in robbed)
        if y not in leads or len(robbed) < ROBBED or taken < TAKEN * len(leads[y]):
            continue
        if wins[y][name] * 2 >= len(leads[y]):
            yield Finding(
                "thief",
                f"{name} is a thief: it takes {taken} prompts of {len(robbed)} experts and keeps "
                f"its own. Make its prompts narrower.",
                (name,),
            )


def _twins_of(
    z: int,
    sure: list[int],
    names: tuple[str, ...],
    wins: Wins,
    leads: Leads,
    nearest: Mapping[int, Tensor],
) -> Iterator[Finding]:
    name = names[z]
    count = len(leads[z])
    for y in sure:
        near = (nearest[z] == y).float().mean() + (nearest[y] == z).float().mean()
        lost = leads[z][:, y].mean() + leads[y][:, z].mean()
        if z < y and near / 2 >= NEAREST and lost / 2 > TWINS * _sure(count):
            yield Finding(
                "twins",
                f"{name} and {names[y]} are twins: their prompts are hardly told apart "
                f"({wins[z][names[y]]} and {wins[y][name]} go to the other). Give each two "
                f"more prompts that the other isn't for, or merge them.",
                (name, names[y]),
            )


def _sure(count: int) -> float:
    """The share of a difference of scores that is left with `count` prompts, one of them out."""
    return 1 - 1 / (count - 1)
