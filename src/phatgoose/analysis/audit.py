"""The audit of a pool: which experts don't look like the others.

A sign is a vector [E] that an attack would change, one number for each expert, made of its files;
NaN where the expert or the pool lacks what the sign is made of. Glossary: E experts, n inputs of a
site, b blocks, d their width.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import PhatgooseError
from ..experts.pool import Pool, check_alike
from ..experts.stack import Part
from ..experts.statistics import PARTS, WHOLE
from ..routing.opening import open_chooser
from ..routing.routers.phatgoose import standardise
from ..routing.routers.retrieval import best_of_each
from ..routing.stacks import stack_of
from .findings import Finding

LEAST = 4  # experts that a median is taken of; fewer say nothing of each other
MANY = 8  # experts whose median hardly wanders
SAME = 0.9999  # cosine of two embeddings that are one
TINY = 1e-30
SAMPLED = 4096  # embeddings of all experts whose neighbours are looked for
COSINES = 2**25  # at once
SHOWN = 8  # example prompts of each expert that are read
READS = "discriminant:fallback=off"
Signs = dict[str, Tensor]  # by name, [E] each


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
    Sign("reading_distance", 5.9, 9.6, "statistics", "its prompts are {:.3g} times as far away"),
    Sign("reading_trace", 1200, 1200, "varying", "its prompts vary {:.3g} times the median"),
    Sign("reading_masks", 380, 380, "masking", "they vary {:.3g} times where others differ"),
    Sign("embedding_count", 5, 5, "", "it stores {:.3g} times the median's embeddings"),
    Sign("embedding_copies", 0.1, 0.1, "copied", "{:.0%} of its embeddings are also others'"),
    Sign("embedding_wins", 0.2, 0.2, "nearest", "its embeddings win at {:.0%} of the others'"),
    Sign("centroid_wins", 0.2, 0.2, "", "its mean embedding wins at {:.0%} of the others'"),
    Sign("prompt_wins", 0.67, 0.75, "prompts", "its statistics win {:.0%} of the others' prompts"),
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
        """Whom findings name, in the pool's order, as findings come."""
        return tuple(dict.fromkeys(finding.experts[0] for finding in self.findings))

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
        values = [value for value in self.signs[name] if value is not None]
        return median(values) if values else None

    def to_dict(self) -> dict[str, object]:
        return {
            "experts": self.experts,
            "signs": self.signs,
            "limits": {sign.name: sign.limit(len(self.experts)) for sign in SIGNS},
            "findings": list(map(asdict, self.findings)),
            "notes": self.notes,
        }


def audit(pool: Pool | str | Path, reader: str | None = None) -> Audit:
    """The audit of `pool`: every expert's files against the pool's median.

    The experts' example prompts are read too, to see whose each expert takes: by their reader,
    which the user must name as `reader` if it isn't a known one. Raises as `Pool.open` does.
    """
    opened = Pool.open(pool)
    signs = signs_of(opened)
    try:
        prompt_signs, notes = _of_prompts(opened.measured(reader), reader)
        signs |= prompt_signs
    except PhatgooseError as error:  # statistics that can't be compared
        notes = [str(error)]
    report = report_of(opened, signs)
    return replace(report, notes=(*report.notes, *notes))


def report_of(pool: Pool, signs: Mapping[str, Tensor]) -> Audit:
    """The audit of `pool` by its `signs` [E]: findings beyond a limit, and notes."""
    findings = list[Finding]()
    for sign in SIGNS:
        if sign.name in signs and (len(pool) >= LEAST or sign.name in SMALL):
            findings += _beyond(pool, sign, signs[sign.name])
    findings.sort(key=lambda finding: pool.names.index(finding.experts[0]))
    plain = {}
    for name, values in signs.items():
        numbers = values.tolist()
        plain[name] = tuple(value if math.isfinite(value) else None for value in numbers)
    return Audit(pool.names, plain, tuple(findings), tuple(_notes(pool)))


def _beyond(pool: Pool, sign: Sign, values: Tensor) -> Iterator[Finding]:
    gain = GAINS[sign.name.partition("_")[0]]
    usual = float(values.nanquantile(0.5))
    for name, value in zip(pool.names, values.tolist(), strict=True):
        if value > sign.limit(len(pool)):
            yield Finding(
                sign.name,
                f"{name}: {sign.what.format(value)} (median {usual:.3g}): {gain}. Look at where it "
                f"comes from, compare the pool without it (--leave-out {name}).",
                (name,),
            )


def _notes(pool: Pool) -> Iterator[str]:
    if len(pool) < LEAST:
        yield (
            f"{len(pool)} experts are too few to compare with a median ({LEAST} are needed): only "
            f"gates that equal means and copied embeddings are looked for."
        )
    for kind, count in Counter(expert.kind for expert in pool.experts).items():
        if count < LEAST <= len(pool):
            yield f"{count} of kind {kind} are too few to compare the sizes of updates."
    for part in ("gates", "means", "prompt_statistics", "embeddings"):
        lacking = pool.lacking(part)
        if lacking:
            yield f"No {part}, so nothing to look at: {', '.join(lacking)}."
    compared = _read_alike(pool)
    others = [
        e.name for z, e in enumerate(pool.experts) if e.prompt_statistics and z not in compared
    ]
    if others:
        yield f"Prompts were read by another reader than most, or otherwise: {', '.join(others)}."


def signs_of(pool: Pool) -> Signs:
    """The signs of the experts of `pool`, by name, float64 [E] each."""
    check_alike(pool.experts, {})
    signs = {**_of_updates(pool), **_of_vectors(pool)}
    embedded = [z for z, expert in enumerate(pool.experts) if expert.has("embeddings")]
    signs |= _spread_out(_of_prompt_statistics, pool, _read_alike(pool))
    signs |= _spread_out(_of_embeddings, pool, embedded)
    pool.release()
    return signs


def _read_alike(pool: Pool) -> list[int]:
    """Whose prompts the reader of most has read, and whose statistics have its usual sizes."""
    alike = defaultdict[object, list[int]](list)
    for z, expert in enumerate(pool.experts):
        if expert.prompt_statistics:  # in whatever order a file has them
            sizes = frozenset((name, part.shape) for name, part in expert.prompt_statistics.items())
            alike[expert.info.reader, sizes].append(z)
    return max(alike.values(), key=len, default=[])


def ratios(values: Tensor) -> Tensor:
    """How many times the median each of `values` [.., E] is, float64; none counts below TINY.

    NaN for NaN, with under LEAST numbers, or if the median is 0.
    """
    values = values.double().clamp(min=TINY)
    middle = values.nanquantile(0.5, dim=-1, keepdim=True)
    counts = (~values.isnan()).sum(dim=-1, keepdim=True)
    is_comparable = (counts >= LEAST) & (middle > TINY)
    return (values / middle).masked_fill(~is_comparable, math.nan)


def _spread_out(sign: Callable[[Pool], Signs], pool: Pool, members: Sequence[int]) -> Signs:
    signs = Signs()
    if len(members) > 1:
        for name, values in sign(_part_of(pool, members)).items():
            signs[name] = _nans(pool)
            signs[name][list(members)] = values
    return signs


def _part_of(pool: Pool, members: Sequence[int]) -> Pool:
    return Pool(tuple(pool.experts[z] for z in members))


def _nans(pool: Pool) -> Tensor:
    return torch.full((len(pool),), math.nan, dtype=torch.float64)


def _of_updates(pool: Pool) -> Signs:
    """Norms of updates, against those of experts of the same kind at the same site."""
    rows = []
    for site in pool.sites:
        stack = stack_of(pool, site, torch.float64, torch.device("cpu"))
        row = _nans(pool)
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


def _of_vectors(pool: Pool) -> Signs:
    """Gates and mean activations: norms, who looks like whom, who wins at whose means."""
    sites = [_vectors_at(pool, site) for site in pool.sites]
    pool.release()
    signs = {}
    for name in sites[0]:
        values = torch.stack([at_site[name] for at_site in sites], dim=1)
        if name in ("gate_size", "mean_distance"):
            signs[name] = values.nanquantile(0.5, dim=1)
        else:
            signs[name] = values.nanmean(dim=1)
    # Either alone may be an honest gate's: one that leans to the usual, or one in a pool of few.
    signs["gate_pull"] = signs.pop("gate_usual") * signs["gate_wins"]
    return signs


def _vectors_at(pool: Pool, site: str) -> Signs:
    names = ("gate_size", "gate_own_mean", "gate_usual", "gate_wins", "input_pull", "mean_distance")
    signs = {name: _nans(pool) for name in names}
    gated, gate_rows = _having(pool, "gates", site)
    meant, mean_rows = _having(pool, "means", site)
    if gated:
        gates = torch.stack(gate_rows)
        signs["gate_size"][gated] = ratios(gates.double().norm(dim=1))
    if meant:
        means = torch.stack(mean_rows)
        away = means.double() - means.double().quantile(0.5, dim=0)
        signs["mean_distance"][meant] = ratios(away.norm(dim=1))
        adapted, loras = _having(pool, "lora", site)
        if len(adapted) > 1:
            factors = [lora.A for lora in loras]
            signs["input_pull"][adapted] = _input_pull(factors, means, _equal(adapted, meant))
    if gated and meant:
        V = standardise(gates).double()
        U = standardise(means).double()
        n = gates.shape[1]
        cosines = V @ U.T / n  # [gates, means], both standardised
        is_own = _equal(gated, meant)
        signs["gate_own_mean"][gated] = cosines.masked_fill(~is_own, math.nan).nanmean(dim=1)
        usual = standardise(means.quantile(0.5, dim=0)[None]).double()[0]
        signs["gate_usual"][gated] = V @ usual / n
        if len(gated) > 1:
            signs["gate_wins"][gated] = _wins(cosines, is_own)
    return signs


def _having(pool: Pool, part: str, site: str) -> tuple[list[int], list[Any]]:
    """Who has a `part` at `site`, and their parts."""
    owners = []
    parts = []
    for z, expert in enumerate(pool.experts):
        by_site = getattr(expert, part)
        if site in by_site:
            owners.append(z)
            parts.append(by_site[site])
    return owners, parts


def _equal(rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    return torch.tensor(rows)[:, None] == torch.tensor(columns)


def _wins(scores: Tensor, same: Tensor) -> Tensor:
    """The share of others' means at which the `scores` [experts, means] of each are highest."""
    is_first = functional.one_hot(scores.argmax(dim=0), len(scores)).bool().T
    return is_first.double().masked_fill(same, math.nan).nanmean(dim=1)


def _input_pull(factors: Sequence[Tensor], means: Tensor, same: Tensor) -> Tensor:
    """How much of the others' means lies in the rows of each A [r, n], times the wins by that.

    Of the squared length, less what any r rows have, r / n.
    """
    units = functional.normalize(means.double(), dim=1)
    rows = []
    for A in factors:
        Q = torch.linalg.qr(A.double().T).Q  # [n, r]
        rows.append((units @ Q).square().sum(dim=1) - Q.shape[1] / len(Q))
    inside = torch.stack(rows)  # [experts, means]
    others = inside.masked_fill(same, math.nan).nanmean(dim=1)
    return others * _wins(inside, same)


def _of_prompt_statistics(pool: Pool) -> Signs:
    """Readings: how far from others', how much they vary, and how much along the others' means."""
    by_block = defaultdict[str, list[Tensor]](list)
    parts = [_stacked(pool, part) for part in PARTS]
    for mean, factor, rest in zip(*parts, strict=True):
        away = mean - mean.quantile(0.5, dim=0)
        by_block["reading_distance"].append(ratios(away.norm(dim=1)))
        trace = factor.square().sum(dim=(1, 2)) + rest.sum(dim=1)
        by_block["reading_trace"].append(ratios(trace))
        # The variance of each expert along the directions to the others, against the median.
        unit = functional.normalize(away, dim=1)  # [E, d]
        along = torch.einsum("zfd,wd->zwf", factor, unit).square().sum(dim=-1)
        along += rest @ unit.square().T
        against = ratios(along.T).T  # [E, directions]
        against.fill_diagonal_(math.nan)
        by_block["reading_masks"].append(against.nanquantile(0.5, dim=1))
    return {name: torch.stack(rows).nanquantile(0.5, dim=0) for name, rows in by_block.items()}


def _stacked(pool: Pool, part: str) -> Iterator[Tensor]:
    """A part of all experts' prompt statistics, float64 [E, ..] for each block."""
    rows = torch.stack(
        [expert.prompt_statistics[f"{WHOLE}.{part}"] for expert in pool.experts], dim=1
    )
    return map(Tensor.double, rows)


def _of_embeddings(pool: Pool) -> Signs:
    """Embeddings: how many, how concentrated, whose rows they copy and at whose rows they win."""
    embeddings = []
    embedders = set[object]()
    for expert in pool.experts:
        stored = torch.empty(0) if expert.embeddings is None else expert.embeddings
        embeddings.append(functional.normalize(stored.float(), dim=-1))
        embedders.add((expert.info.embedder, expert.info.embedding_form, stored.shape[-1]))
    if len(embedders) > 1:
        return {}  # of several embedders or forms: nothing to compare
    counts = torch.tensor(list(map(len, embeddings)))
    owners = torch.arange(len(pool)).repeat_interleave(counts)
    rows = torch.cat(embeddings)
    sample = _sample(counts)
    is_own = functional.one_hot(owners[sample], len(pool)).double()  # [sample, E]
    equals, nearest = _neighbours(rows, owners, sample)
    centroids = torch.stack([stored.mean(dim=0) for stored in embeddings])
    at_centroid = (rows[sample] @ functional.normalize(centroids, dim=1).T).argmax(dim=1)
    return {
        "embedding_count": ratios(counts.double()),
        "embedding_copies": _copies(equals, is_own) / is_own.sum(dim=0),
        "embedding_wins": _taken(is_own, nearest),
        "centroid_wins": _taken(is_own, at_centroid),
    }


def _sample(counts: Tensor) -> Tensor:
    # Evenly spaced rows of each: everyone's neighbours among 36,000 would take a minute.
    most = max(SAMPLED // len(counts), 2)
    sample = []
    start = 0
    for count in counts.tolist():
        sample.append(torch.linspace(start, start + count - 1, min(count, most)).long())
        start += count
    return torch.cat(sample)


def _neighbours(rows: Tensor, owners: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows in `sample`: who else has an equal one, bool [.., E], and whose is nearest."""
    equals = []
    nearest = []
    for batch in torch.split(sample, max(1, COSINES // len(rows))):
        cosines = rows[batch] @ rows.T
        # No row is its own neighbour.
        cosines[torch.arange(len(batch)), batch] = -torch.inf
        best = best_of_each(cosines, owners, int(owners[-1]) + 1)
        nearest.append(best.argmax(dim=1))
        equals.append((best > SAME).scatter(1, owners[batch][:, None], False))
    return torch.cat(equals), torch.cat(nearest)


def _copies(equals: Tensor, is_own: Tensor) -> Tensor:
    """How many rows of each expert are also others', [E]."""
    shares = is_own.T @ equals.double() > 0  # [E, E]
    partners = shares.sum(dim=1)
    # The expert that shares rows with more others is blamed, or both if these are as many.
    blamed = partners[:, None] >= partners  # [expert, other]
    is_copied = (equals & blamed[is_own.argmax(dim=1)]).any(dim=1)
    return is_own.T @ is_copied.double()


def _taken(is_own: Tensor, winners: Tensor) -> Tensor:
    """How much of the others' rows each expert wins, on average over who has rows, [E]."""
    won = is_own.T @ functional.one_hot(winners, is_own.shape[1]).double()
    shares = won / won.sum(dim=1, keepdim=True)
    return shares.fill_diagonal_(math.nan).nanmean(dim=0)


def _of_prompts(pool: Pool, reader: str | None) -> tuple[Signs, list[str]]:
    """Whose example prompts each expert's statistics win, and a note for each that loses some.

    They are read as router discriminant reads them, and none is left to the base.
    """
    members = _read_alike(pool)
    experts = _part_of(pool, members)
    texts = list[str]()
    owners = []
    for z, expert in enumerate(experts.experts):
        shown = expert.prompts[:SHOWN]
        texts += shown
        owners += [z] * len(shown)
    if len(members) < 2 or not texts:
        return {}, ["No example prompts beside prompt statistics, so nothing to read."]
    winners = open_chooser(experts, router=READS, reader=reader).score(texts).argmax(dim=1)
    is_own = functional.one_hot(torch.tensor(owners), len(experts)).double()
    taken = _taken(is_own, winners)
    notes = []
    for (z, winner), count in Counter(zip(owners, winners.tolist(), strict=True)).items():
        if winner != z:
            notes.append(
                f"Of {experts.names[z]}'s {owners.count(z)} example prompts router discriminant "
                f"gives {count} to {experts.names[winner]}."
            )
    return _spread_out(lambda _: {"prompt_wins": taken}, pool, members), notes
