"""The audit of a pool: which experts don't look like the others.

A sign is a vector [E] that an attack would change, one number for each expert, made of its files;
NaN where the expert or the pool lacks what the sign is made of. Glossary: E experts, n inputs of a
site, b blocks, d their width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..base import Base, check_base
from ..config import Formatting
from ..errors import RoutingError
from ..experts.kind import Part
from ..experts.pool import Pool, check_alike
from ..experts.statistics import READ
from ..routing.compose import open_chooser
from ..routing.layers import stack_of
from ..routing.routers.phatgoose import standardise
from ..routing.routers.retrieval import best_of_each
from ..tasks.encoding import Encoder
from .measures import Finding

LEAST = 4  # experts that a median is taken of; fewer say nothing of each other
MANY = 8  # experts whose median hardly wanders
SAME = 0.9999  # cosine of two embeddings that are one
TINY = 1e-30
ASKED = 4096  # embeddings of all experts that are asked for their neighbours
COSINES = 2**25  # at once
SHOWN = 8  # example prompts of each expert that are read
READS = "discriminant:fallback=off"


class Sign(NamedTuple):
    """A sign, and `what` to say of a value above `most`.

    `few` is the limit in pools of fewer than MANY experts, whose medians wander. `title` heads its
    column in the audit's table, if it has one.
    """

    name: str
    most: float
    few: float
    title: str
    what: str

    def limit(self, experts: int) -> float:
        return self.most if experts >= MANY else self.few


# Limits come from half of a hundred honest experts made for that, never from the other half, on
# which research/audit.md reports: a ratio may be twice the largest that was seen there, a
# share or a cosine lies half-way from the largest to 1; in pools of ten, and again in pools of
# five. Copied embeddings and wins at others' embeddings were not seen, and have limits by meaning;
# a pull may be twice the largest that was seen in pools of ten. What LoRAs read and whose prompts
# are won has limits from 44 other experts, in the same way.
# An expert beyond a limit is unusual, and not shown to be an attack.
SIGNS = (
    Sign("update_size", 20, 78, "update", "its update is {:.3g} times its kind's median"),
    Sign("update_spread", 6.7, 6.7, "module", "one module's update is {:.3g} times the others'"),
    Sign("gate_size", 35, 54, "gate", "its gates are {:.3g} times as long as the median"),
    Sign("gate_own_mean", 0.74, 0.74, "cosine", "its gates have a cosine of {:.2f} with its means"),
    Sign("gate_pull", 0.13, 0.17, "", "its gates lean to the usual by {:.2f} (cosine times share)"),
    Sign("gate_wins", 0.64, 0.87, "wins", "its gates win at {:.0%} of the others' means"),
    Sign("input_pull", 0.08, 0.08, "inputs", "it reads what others see: {:.2f} (share times wins)"),
    Sign("mean_distance", 4.9, 7, "means", "its means are {:.3g} times as far as the median's"),
    Sign("reading_distance", 5.9, 9.6, "readings", "its readings are {:.3g} times as far away"),
    Sign("reading_trace", 1200, 1200, "varying", "its readings vary {:.3g} times the median"),
    Sign("reading_masks", 380, 380, "masking", "they vary {:.3g} times where others differ"),
    Sign("embedding_count", 5, 5, "", "it stores {:.3g} times the median's embeddings"),
    Sign("embedding_copies", 0.1, 0.1, "copied", "{:.0%} of its embeddings are also others'"),
    Sign("embedding_wins", 0.2, 0.2, "nearest", "its embeddings win at {:.0%} of the others'"),
    Sign("centroid_wins", 0.2, 0.2, "", "its mean embedding wins at {:.0%} of the others'"),
    Sign("prompt_wins", 0.67, 0.75, "prompts", "its readings win {:.0%} of the others' prompts"),
)
SMALL = ("gate_own_mean", "embedding_copies")  # have a meaning in pools of any size
GAINS = {  # what an expert beyond a limit may gain, by the first word of a sign
    "update": "it may outweigh others wherever updates are added, or hide a trigger in few modules",
    "gate": "gates that aren't trained may win tokens of others by a constant",
    "input": "routers arrow and spectr may give it others' tokens, whatever they hold",
    "mean": "router average-activation goes by them",
    "reading": "they move router discriminant, or hide differences between others from it",
    "embedding": "it may take prompts from others with router retrieval",
    "centroid": "it may take prompts from others with router centroid",
    "prompt": "router discriminant may give it what others are for",
}


@dataclass(frozen=True)
class Audit:
    """What an audit found: `signs` by name, a number for each of the `experts` or None."""

    experts: tuple[str, ...]
    signs: Mapping[str, tuple[float | None, ...]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def unusual(self) -> tuple[str, ...]:
        named = {name for finding in self.findings for name in finding.experts}
        return tuple(name for name in self.experts if name in named)

    @property
    def summary(self) -> str:
        if not self.findings:
            return ""
        return (
            f"{len(self.unusual)} of {len(self.experts)} experts don't look like the others: "
            f"{', '.join(self.unusual)}. 'phatgoose audit' on the pool says why; --leave-out NAME "
            f"composes without one."
        )

    def median(self, name: str) -> float | None:
        known = [value for value in self.signs[name] if value is not None]
        return median(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts),
            "signs": {name: list(values) for name, values in self.signs.items()},
            "limits": {sign.name: sign.limit(len(self.experts)) for sign in SIGNS},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }


def audit(pool: Pool | str | Path, base: Base | None = None) -> Audit:
    """The audit of `pool`: every expert's files against the pool's median.

    With a `base` it also reads the experts' example prompts, to see whose each expert takes. Raises
    as `Pool.open` does, and BaseModelError for a base that isn't the pool's.
    """
    opened = Pool.open(pool)
    signs = signs_of(opened)
    if base is None:
        return report_of(opened, signs)
    check_base(opened.base, base.reference)
    try:
        prompts, notes = _of_prompts(opened.measured(base), base)
    except RoutingError as error:  # statistics that can't be compared
        prompts, notes = {}, [str(error)]
    report = report_of(opened, {**signs, **prompts})
    return replace(report, notes=(*report.notes, *notes))


def report_of(pool: Pool, signs: Mapping[str, Tensor]) -> Audit:
    """The audit of `pool` by its `signs` [E]: findings beyond a limit, and notes."""
    findings = [finding for sign in SIGNS for finding in _beyond(pool, sign, signs)]
    findings.sort(key=lambda finding: pool.names.index(finding.experts[0]))
    plain = {
        name: tuple(value if math.isfinite(value) else None for value in values.tolist())
        for name, values in signs.items()
    }
    return Audit(pool.names, plain, tuple(findings), tuple(_notes(pool)))


def _beyond(pool: Pool, sign: Sign, signs: Mapping[str, Tensor]) -> Iterator[Finding]:
    if sign.name not in signs or (len(pool) < LEAST and sign.name not in SMALL):
        return
    values, gain = signs[sign.name], GAINS[sign.name.partition("_")[0]]
    usual = f"median {float(values.nanquantile(0.5)):.3g}"
    for z in (values > sign.limit(len(pool))).nonzero().flatten().tolist():
        name, what = pool.names[z], sign.what.format(float(values[z]))
        look = f"Look at where it comes from, compare the pool without it (--leave-out {name})."
        yield Finding(sign.name, f"{name}: {what} ({usual}): {gain}. {look}", (name,))


def _notes(pool: Pool) -> Iterator[str]:
    if len(pool) < LEAST:
        yield (
            f"{len(pool)} experts are too few to compare with a median ({LEAST} are needed): only "
            f"gates that equal means and copied embeddings are looked for."
        )
    for kind, count in Counter(expert.kind for expert in pool.experts).items():
        if count < LEAST <= len(pool):
            yield f"{count} of kind {kind} are too few to compare the sizes of updates."
    for part in ("gates", "means", "readings", "embeddings"):
        if without := pool.lacking(part):
            yield f"No {part}, so nothing to look at: {', '.join(without)}."


def signs_of(pool: Pool) -> dict[str, Tensor]:
    """The signs of the experts of `pool`, by name, float64 [E] each."""
    check_alike(pool.experts, {})
    found = {**_of_updates(pool), **_of_vectors(pool)}
    embedded = [z for z, expert in enumerate(pool.experts) if expert.has("embeddings")]
    found |= _spread_out(_of_readings, pool, _readers(pool))
    found |= _spread_out(_of_embeddings, pool, embedded)
    pool.release()
    return found


def _readers(pool: Pool) -> list[int]:
    """Who has readings, of the size that most have."""
    sizes = [  # in whatever order a file has them
        frozenset((name, part.shape) for name, part in expert.readings.items())
        for expert in pool.experts
    ]
    usual = Counter(size for size in sizes if size).most_common(1)
    return [z for z, size in enumerate(sizes) if size and size == usual[0][0]]


def ratios(values: Tensor) -> Tensor:
    """How many times the median each of `values` [.., E] is, float64; none counts below TINY.

    NaN for NaN, with under LEAST numbers, or if the median is 0.
    """
    known = ~values.isnan()
    middle = values.double().clamp(min=TINY).nanquantile(0.5, dim=-1, keepdim=True)
    enough = (known.sum(dim=-1, keepdim=True) >= LEAST) & (middle > TINY)
    return (values.double().clamp(min=TINY) / middle).masked_fill(~enough, math.nan)


def _spread_out(
    sign: Callable[[Pool], dict[str, Tensor]], pool: Pool, members: Sequence[int]
) -> dict[str, Tensor]:
    if len(members) < 2:
        return {}
    found = sign(Pool(tuple(pool.experts[z] for z in members)))
    whole = {name: torch.full((len(pool),), math.nan, dtype=torch.float64) for name in found}
    for name, values in found.items():
        whole[name][list(members)] = values
    return whole


def _of_updates(pool: Pool) -> dict[str, Tensor]:
    """Norms of updates, against those of experts of the same kind at the same site."""
    rows = []
    for site in pool.sites:
        stack = stack_of(pool, site, torch.float64, torch.device("cpu"))
        row = torch.full((len(pool),), math.nan, dtype=torch.float64)
        for part, members in stack.rows().items():
            if stack.parts[part].compared:
                row[stack.experts[members]] = ratios(squared_norms(stack.parts[part]).sqrt())
        rows.append(row)
        pool.release()
    relative = torch.stack(rows, dim=1)  # [E, sites]
    size = relative.nanquantile(0.5, dim=1)  # the median over sites
    most = relative.nan_to_num(0.0, math.inf, 0.0).amax(dim=1)
    return {"update_size": size, "update_spread": most / size}


def squared_norms(part: Part) -> Tensor:
    """The squared Frobenius norm of each update of a part of a stack, float64 [E]."""
    factors: list[Tensor] = [getattr(part, field).double() for field in part.compared]
    if len(factors) == 1:
        return factors[0].square().sum(dim=1)
    A, B = factors
    return (A @ A.mT * (B @ B.mT)).sum(dim=(1, 2)).clamp(min=0)


def _of_vectors(pool: Pool) -> dict[str, Tensor]:
    """Gates and mean activations: norms, who looks like whom, who wins at whose means."""
    sites = [_vectors_at(pool, site) for site in pool.sites]
    pool.release()
    found = {}
    for name in sites[0]:
        values = torch.stack([each[name] for each in sites], dim=1)
        own = name in ("gate_size", "mean_distance")
        found[name] = values.nanquantile(0.5, dim=1) if own else values.nanmean(dim=1)
    # Either alone may be an honest gate's: one that leans to the usual, or one in a pool of few.
    found["gate_pull"] = found.pop("gate_usual") * found["gate_wins"]
    return found


def _vectors_at(pool: Pool, site: str) -> dict[str, Tensor]:
    nothing = torch.full((len(pool),), math.nan, dtype=torch.float64)
    names = ("gate_size", "gate_own_mean", "gate_usual", "gate_wins", "input_pull", "mean_distance")
    found = {name: nothing.clone() for name in names}
    gated = [z for z, expert in enumerate(pool.experts) if site in expert.gates]
    meant = [z for z, expert in enumerate(pool.experts) if site in expert.means]
    if gated:
        gates = torch.stack([pool.experts[z].gates[site] for z in gated])
        found["gate_size"][gated] = ratios(gates.double().norm(dim=1))
    if meant:
        means = torch.stack([pool.experts[z].means[site] for z in meant])
        away = means.double() - means.double().quantile(0.5, dim=0)
        found["mean_distance"][meant] = ratios(away.norm(dim=1))
        read = [z for z, expert in enumerate(pool.experts) if site in expert.lora]
        factors = [pool.experts[z].lora[site].A for z in read]
        if len(read) > 1:
            found["input_pull"][read] = _input_pull(factors, means, _equal(read, meant))
    if not (gated and meant):
        return found
    V, U, n = standardise(gates).double(), standardise(means).double(), gates.shape[1]
    cosines = V @ U.T / n  # [gates, means], both standardised
    same = _equal(gated, meant)
    own = cosines.where(same, torch.tensor(math.nan, dtype=torch.float64))
    found["gate_own_mean"][gated] = own.nanmean(dim=1)
    usual = standardise(means.quantile(0.5, dim=0)[None]).double()[0]
    found["gate_usual"][gated] = V @ usual / n
    if len(gated) > 1:
        found["gate_wins"][gated] = _wins(cosines, same)
    return found


def _equal(rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    return torch.tensor(rows)[:, None] == torch.tensor(columns)


def _wins(scores: Tensor, same: Tensor) -> Tensor:
    """The share of others' means at which the `scores` [experts, means] of each are highest."""
    first = functional.one_hot(scores.argmax(dim=0), len(scores)).bool().T
    others = (~same).sum(dim=1).double()
    return (first & ~same).sum(dim=1) / others.masked_fill(others == 0, math.nan)


def _input_pull(factors: Sequence[Tensor], means: Tensor, same: Tensor) -> Tensor:
    """How much of the others' means lies in the rows of each A [r, n], times the wins by that.

    Of the squared length, less what any r rows have, r / n.
    """
    units = functional.normalize(means.double(), dim=1)
    bases = [torch.linalg.qr(A.double().T).Q for A in factors]  # [n, r] each
    rows = [(units @ Q).square().sum(dim=1) - Q.shape[1] / len(Q) for Q in bases]
    inside = torch.stack(rows)  # [experts, means]
    others = inside.masked_fill(same, math.nan).nanmean(dim=1)
    return others * _wins(inside, same)


def _of_readings(pool: Pool) -> dict[str, Tensor]:
    """Readings: how far from others', how much they vary, and how much along the others' means."""
    distances, traces, masks = [], [], []
    means, factors, rests = (
        torch.stack([e.readings[f"{READ}.{part}"] for e in pool.experts])
        for part in ("mean", "factor", "rest")
    )
    for block in range(means.shape[1]):
        mean, factor, rest = (t[:, block].double() for t in (means, factors, rests))
        away = mean - mean.quantile(0.5, dim=0)
        distances.append(ratios(away.norm(dim=1)))
        traces.append(ratios(factor.square().sum(dim=(1, 2)) + rest.sum(dim=1)))
        # The variance of each expert along the directions to the others, against the median.
        unit = functional.normalize(away, dim=1)  # [E, d]
        along = torch.einsum("zfd,wd->zwf", factor, unit).square().sum(dim=-1)
        along += rest @ unit.square().T
        against = ratios(along.T).T  # [E, directions]
        against.fill_diagonal_(math.nan)
        masks.append(against.nanquantile(0.5, dim=1))
    found = {"reading_distance": distances, "reading_trace": traces, "reading_masks": masks}
    return {name: torch.stack(rows).nanquantile(0.5, dim=0) for name, rows in found.items()}


def _of_embeddings(pool: Pool) -> dict[str, Tensor]:
    """Embeddings: how many, how concentrated, whose rows they copy and at whose rows they win."""
    stored = [torch.empty(0) if e.embeddings is None else e.embeddings for e in pool.experts]
    held = [functional.normalize(rows.float(), dim=-1) for rows in stored]
    infos = [expert.info for expert in pool.experts]
    made = {(info.embedder, info.embedding_form) for info in infos}
    if len(made) > 1 or len({rows.shape[1] for rows in held}) > 1:
        return {}  # of several embedders or forms: nothing to compare
    counts = torch.tensor([len(rows) for rows in held])
    owners, rows = torch.arange(len(held)).repeat_interleave(counts), torch.cat(held)
    asked = _sample(counts)
    own = functional.one_hot(owners[asked], len(held)).double()  # [asked, E]
    equals, nearest = _neighbours(rows, owners, asked)
    centroids = torch.stack([each.mean(dim=0) for each in held])
    at_centroid = (rows[asked] @ functional.normalize(centroids, dim=1).T).argmax(dim=1)
    return {
        "embedding_count": ratios(counts.double()),
        "embedding_copies": _copies(equals, own) / own.sum(dim=0),
        "embedding_wins": _taken(own, nearest),
        "centroid_wins": _taken(own, at_centroid),
    }


def _sample(counts: Tensor) -> Tensor:
    # Evenly spaced rows of each: everyone's neighbours among 36,000 would take a minute.
    most = max(ASKED // len(counts), 2)
    ends = counts.cumsum(dim=0).tolist()
    spaced = [
        torch.linspace(end - count, end - 1, min(count, most)).long()
        for end, count in zip(ends, counts.tolist(), strict=True)
    ]
    return torch.cat(spaced)


def _neighbours(rows: Tensor, owners: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows `asked`: who else has an equal one, bool [asked, E], and whose is nearest."""
    equals, nearest = [], []
    step = max(1, COSINES // len(rows))
    for first in range(0, len(asked), step):
        some = asked[first : first + step]
        cosines = rows[some] @ rows.T
        # No row is its own neighbour.
        cosines[torch.arange(len(some)), some] = -torch.inf
        best = best_of_each(cosines, owners, int(owners[-1]) + 1)
        nearest.append(best.argmax(dim=1))
        equals.append((best > SAME).scatter(1, owners[some][:, None], False))
    return torch.cat(equals), torch.cat(nearest)


def _copies(equals: Tensor, own: Tensor) -> Tensor:
    """How many rows of each expert are also others', [E]."""
    shares = own.T @ equals.double() > 0  # [E, E]
    partners = shares.sum(dim=1)
    # The expert that shares rows with more others is blamed, or both if these are as many.
    blamed = partners[:, None] >= partners  # [expert, other]
    return own.T @ (equals & blamed[own.argmax(dim=1)]).any(dim=1).double()


def _taken(own: Tensor, winners: Tensor) -> Tensor:
    """How much of the others' rows each expert wins, on average over who has some, [E]."""
    won = own.T @ functional.one_hot(winners, own.shape[1]).double()
    shares = won / won.sum(dim=1, keepdim=True)
    return shares.fill_diagonal_(math.nan).nanmean(dim=0)


def _of_prompts(pool: Pool, base: Base) -> tuple[dict[str, Tensor], list[str]]:
    """Whose example prompts the readings of each win, and a note for each expert that loses some.

    They are read as router discriminant reads them, and none is left to the base.
    """
    readers = _readers(pool)
    experts = [pool.experts[z] for z in readers]
    shown = [expert.prompts[:SHOWN] for expert in experts]
    if len(readers) < 2 or not any(shown):
        return {}, ["No example prompts beside prompt statistics, so nothing to read."]
    chooser = open_chooser(Pool(tuple(experts)), base.tokenizer, router=READS)
    encoder = Encoder.of(base, Formatting(chat=chooser.in_chats))
    prompts = [encoder.prompt(text) for texts in shown for text in texts]
    winners = chooser.score(prompts, base.model).argmax(dim=1)
    counts = torch.tensor([len(texts) for texts in shown])
    owners = torch.arange(len(experts)).repeat_interleave(counts)
    taken = _taken(functional.one_hot(owners, len(experts)).double(), winners)
    lost = Counter(zip(owners.tolist(), winners.tolist(), strict=True))
    notes = [
        f"Of {experts[z].name}'s {len(shown[z])} example prompts router discriminant gives {count} "
        f"to {experts[winner].name}."
        for (z, winner), count in lost.items()
        if winner != z
    ]
    return _spread_out(lambda _: {"prompt_wins": taken}, pool, readers), notes
