"""Signs: numbers of each expert of a pool that an attack would change, from its files alone.

A sign is a vector [E], one number for each expert, NaN where the expert or the pool lacks what the
sign is made of. Glossary: E experts, n inputs of a site, b blocks, d their width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..experts.pool import Pool, check_alike
from ..experts.statistics import PLACES
from ..routing.routers.phatgoose import standardise
from ..routing.routers.retrieval import best_of_each
from ..routing.stacks import stack_of
from .findings import squared_norms

LEAST = 4  # experts that a median is taken of; fewer say nothing of each other
SAME = 0.9999  # cosine of two embeddings that are one
TINY = 1e-30
ASKED = 4096  # embeddings of all experts that are asked for their neighbours
COSINES = 2**25  # at once


def signs_of(pool: Pool) -> dict[str, Tensor]:
    """The signs of the experts of `pool`, by name, float64 [E] each."""
    check_alike(pool.experts, {}, {})
    found = {**_of_updates(pool), **_of_vectors(pool)}
    sizes = [tuple(part.shape for part in expert.readings.values()) for expert in pool.experts]
    usual = Counter(size for size in sizes if size).most_common(1)
    readers = [z for z, size in enumerate(sizes) if size and size == usual[0][0]]
    embedded = [z for z, expert in enumerate(pool.experts) if expert.has("embeddings")]
    found |= _spread_out(_of_readings, pool, readers)
    found |= _spread_out(_of_embeddings, pool, embedded)
    pool.release()
    return found


def ratios(values: Tensor) -> Tensor:
    """How many times the median each of `values` [.., E] is, float64; none counts below TINY.

    NaN for NaN, with under LEAST numbers, or if the median is 0.
    """
    known = values.isfinite() | values.isinf()
    middle = values.double().clamp(min=TINY).nanquantile(0.5, dim=-1, keepdim=True)
    enough = (known.sum(dim=-1, keepdim=True) >= LEAST) & (middle > TINY)
    return (values.double().clamp(min=TINY) / middle).masked_fill(~enough, math.nan)


def over_sites(relative: Tensor) -> tuple[Tensor, Tensor]:
    """The median over sites of ratios [E, sites], and how far the largest is above it, [E] each."""
    size = relative.nanquantile(0.5, dim=1)
    most = relative.nan_to_num(0.0, math.inf, 0.0).amax(dim=1)
    return size, most / size


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
            row[stack.experts[members]] = ratios(squared_norms(stack.parts[part]).sqrt())
        rows.append(row)
        pool.release()
    size, spread = over_sites(torch.stack(rows, dim=1))
    return {"update_size": size, "update_spread": spread}


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
    names = ("gate_size", "gate_own_mean", "gate_usual", "gate_wins", "mean_distance")
    found = {name: nothing.clone() for name in names}
    gated = [z for z, expert in enumerate(pool.experts) if site in expert.gates]
    meant = [z for z, expert in enumerate(pool.experts) if site in expert.means]
    gates = torch.stack([pool.experts[z].gates[site] for z in gated]) if gated else None
    means = torch.stack([pool.experts[z].means[site] for z in meant]) if meant else None
    if gates is not None:
        found["gate_size"][gated] = ratios(gates.double().norm(dim=1))
    if means is not None:
        away = means.double() - means.double().quantile(0.5, dim=0)
        found["mean_distance"][meant] = ratios(away.norm(dim=1))
    if gates is None or means is None:
        return found
    V, U, n = standardise(gates).double(), standardise(means).double(), gates.shape[1]
    cosines = V @ U.T / n  # [gates, means], both standardised
    same = torch.tensor(gated)[:, None] == torch.tensor(meant)
    own = cosines.where(same, torch.tensor(math.nan, dtype=torch.float64))
    found["gate_own_mean"][gated] = own.nanmean(dim=1)
    usual = standardise(means.quantile(0.5, dim=0)[None]).double()[0]
    found["gate_usual"][gated] = V @ usual / n
    if len(gated) > 1:
        found["gate_wins"][gated] = _wins(cosines.T, same.T)
    return found


def _wins(scores: Tensor, own: Tensor) -> Tensor:
    """The share of others' rows of `scores` [rows, E] that each expert wins; `own` marks own."""
    first = functional.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
    others = (~own).sum(dim=0).double()
    return (first & ~own).sum(dim=0) / others.masked_fill(others == 0, math.nan)


def _of_readings(pool: Pool) -> dict[str, Tensor]:
    """Readings: how far from others', how much they vary, and how much along the others' means."""
    distances, traces, masks = [], [], []
    for place in PLACES:
        parts = ("mean", "factor", "rest")
        means, factors, rests = (
            torch.stack([e.readings[f"{place}.{part}"] for e in pool.experts]) for part in parts
        )
        for block in range(means.shape[1]):
            mean, factor, rest = (t[:, block].double() for t in (means, factors, rests))
            away = mean - mean.quantile(0.5, dim=0)
            distances.append(ratios(away.norm(dim=1)))
            traces.append(ratios(factor.square().sum(dim=(1, 2)) + rest.sum(dim=1)))
            masks.append(_masking(away, factor, rest))
    found = {"reading_distance": distances, "reading_trace": traces, "reading_masks": masks}
    return {name: torch.stack(rows).nanquantile(0.5, dim=0) for name, rows in found.items()}


def _masking(away: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
    """The variance of each expert along the directions to the others, against the median, [E]."""
    unit = functional.normalize(away, dim=1)  # [E, d]
    along = torch.einsum("zfd,wd->zwf", factor, unit).square().sum(dim=-1)
    along += rest @ unit.square().T
    against = ratios(along.T).T  # [E, directions]
    against.fill_diagonal_(math.nan)
    return against.nanquantile(0.5, dim=1)


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
        "embedding_concentration": centroids.norm(dim=1).double(),
        "embedding_wins": _taken(nearest, own),
        "centroid_wins": _taken(at_centroid, own),
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


def _taken(winners: Tensor, own: Tensor) -> Tensor:
    """How much of the others' rows each expert wins, on average over them, [E]."""
    E = own.shape[1]
    shares = own.T @ functional.one_hot(winners, E).double() / own.sum(dim=0)[:, None]
    return (shares.sum(dim=0) - shares.diagonal()) / (E - 1)
