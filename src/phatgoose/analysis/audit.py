"""The audit of a pool: which experts don't look like the others.

Their files show some signs (`audit_signs`). Neutral text shows others: who wins where no expert's
task is asked, and who changes what.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base import Base
from ..errors import PoolError
from ..experts.kind import SiteModule
from ..experts.pool import Pool
from ..experts.registry import kinds
from ..files import write_text
from ..routing.compose import check_pool_fits
from ..routing.routers.phatgoose import Phatgoose, affinities, standardise
from ..routing.routers.retrieval import best_of_each, centroids_of, embeddings_of
from ..sites import Site, execution_device, find_sites
from ..tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed, embed_texts, prompt_texts
from ..tasks.encoding import Encoder
from ..tasks.prompt_passes import read_pairs
from ..tasks.task import neutral_examples
from .audit_signs import LEAST, TINY, over_sites, ratios, signs_of
from .findings import Finding

EVERY = 12  # of the tokens of neutral text one is kept at each site


@dataclass(frozen=True)
class NeutralText:
    """A base's activations on neutral text, `inputs` [tokens, n] by site, and its embeddings.

    `vectors` [texts, dims] are None without an embedder.
    """

    inputs: Mapping[str, Tensor]
    vectors: Tensor | None


@torch.no_grad()
def read_neutral_text(base: Base, names: Iterable[str], *, embed: bool = True) -> NeutralText:
    """What the sites called `names` see of the neutral text, with its embeddings.

    Every EVERYth token's input is kept. `vectors` is None without `embed`, or without an embedder.
    """
    every, kept = find_sites(base.model), dict[str, list[Tensor]]()

    def see(site: Site, u: Tensor) -> None:
        kept.setdefault(site.name, []).append(u[::EVERY].cpu())

    pairs = Encoder.for_model(base.model, base.tokenizer).pairs(neutral_examples())
    prompts = [pair.prompt for pair in pairs]
    sites = {name: every[name] for name in names}
    read_pairs(base.model, sites, pairs, base.tokenizer.pad_token_id, see)
    texts = prompt_texts(base.tokenizer, prompts)
    vectors = embed_texts(texts) if embed and can_embed() else None
    return NeutralText({name: torch.cat(parts) for name, parts in kept.items()}, vectors)


def neutral_signs(pool: Pool, base: Base, text: NeutralText) -> dict[str, Tensor]:
    """The signs of the experts of `pool` over neutral text, by name, float64 [E] each.

    `update_effect` is the change of a layer's output under an expert's module, over the pool's
    median, `effect_spread` how far the site that stands out most is above that. The others are the
    shares of tokens and sites (`gate_neutral`) or passages that routers would give to each expert.
    """
    found = {**_effects(pool, base, text), "gate_neutral": _by_gates(pool, text)}
    if text.vectors is not None and len(pool) > 1 and _are_like(pool, text.vectors):
        stored = embeddings_of(pool)
        best = best_of_each(text.vectors @ stored.rows.T, stored.owners, len(pool))
        found["retrieval_neutral"] = _shares(best)
        found["centroid_neutral"] = _shares(text.vectors @ centroids_of(stored).T)
    pool.release()
    return found


def _are_like(pool: Pool, vectors: Tensor) -> bool:
    """True if all experts have embeddings made as `vectors` were, and of their length."""
    return all(
        (expert.info.embedder, expert.info.embedding_form) == (DEFAULT_EMBEDDER, PROMPT)
        and expert.embeddings is not None
        and expert.embeddings.shape[1] == vectors.shape[1]
        for expert in pool.experts
    )


@torch.no_grad()
def _effects(pool: Pool, base: Base, text: NeutralText) -> dict[str, Tensor]:
    rows = []
    for name, u in text.inputs.items():
        row = torch.full((len(pool),), math.nan, dtype=torch.float64)
        for z, expert in enumerate(pool.experts):
            if len(u) and name in expert.modules:
                row[z] = _change(base.model.get_submodule(name), u, expert.modules[name])
        rows.append(ratios(row))
    size, spread = over_sites(torch.stack(rows, dim=1))
    return {"update_effect": size, "effect_spread": spread}


def _change(layer: torch.nn.Module, u: Tensor, module: SiteModule) -> float:
    """The norm of what `module` adds to the output of `layer` for u [T, n], over the output's."""
    u = u.to(execution_device(layer))
    plain = layer(u)
    changed = module.at(torch.empty(0, dtype=u.dtype, device=u.device)).apply(layer, u)
    difference = (changed.double() - plain.double()).norm()
    return float(difference / plain.double().norm().clamp(min=TINY))


def _by_gates(pool: Pool, text: NeutralText) -> Tensor:
    first, seen = (torch.zeros(len(pool), dtype=torch.float64) for _ in range(2))
    for name, u in text.inputs.items():
        gated = [z for z, expert in enumerate(pool.experts) if name in expert.gates]
        if len(gated) < 2:
            continue
        gates = standardise(torch.stack([pool.experts[z].gates[name] for z in gated]))
        best = affinities(u, gates, Phatgoose.eps).argmax(dim=1)
        first[gated] += torch.bincount(best, minlength=len(gated)).double()
        seen[gated] += len(u)
    return first / seen.masked_fill(seen == 0, math.nan)


def _shares(scores: Tensor) -> Tensor:
    return functional.one_hot(scores.argmax(dim=1), scores.shape[1]).double().mean(dim=0)


# Limits come from half of a hundred honest experts made for that, never from the other half, on
# which `benchmarks/audit.py` reports: a ratio may be twice the largest that was seen there, a
# share or a cosine lies half-way from the largest to 1; in pools of ten, and again in pools of
# five. Copied embeddings and wins at others' embeddings were not seen, and have limits by meaning;
# a pull may be twice the largest that was seen in pools of ten.
# An expert beyond a limit is unusual, and not shown to be an attack.

MANY = 8  # experts whose median hardly wanders


@dataclass(frozen=True)
class Limit:
    """The largest value of a sign that isn't reported, and the `message` about a larger one.

    `few` is the limit in pools of fewer than MANY experts, whose medians wander. `small` signs have
    a meaning in pools of any size; others need LEAST experts.
    """

    most: float
    message: str
    small: bool = False
    few: float | None = None

    def of(self, experts: int) -> float:
        return self.most if self.few is None or experts >= MANY else self.few


USUAL = "(median {median:.0%})"
OUTWEIGHS = "it outweighs others wherever updates are added"
TRIGGER = "(each against the pool's median there; {median:.3g} is usual): as with a hidden trigger"
HIDES = "they hide differences between the others from router discriminant"

LIMITS: dict[str, Limit] = {
    "update_size": Limit(
        20, f"its update is {{value:.3g}} times its kind's median: {OUTWEIGHS}", few=78
    ),
    "update_effect": Limit(
        21,
        f"its modules change outputs on neutral text {{value:.3g}} times the median: {OUTWEIGHS}",
        few=280,
    ),
    "update_spread": Limit(
        6.7, f"one module's update is {{value:.3g}} times as large as its others are {TRIGGER}"
    ),
    "effect_spread": Limit(
        32, f"one module changes outputs {{value:.3g}} times as much as its others do {TRIGGER}"
    ),
    "gate_size": Limit(
        35,
        "its gates are {value:.3g} times as long as the median: harmless with router phatgoose, "
        "which standardises them",
        few=54,
    ),
    "gate_own_mean": Limit(
        0.74,
        "its gates have a cosine of {value:.2f} with its own mean activations (median "
        "{median:.2f}): trained gates don't, and such ones win tokens of others",
        small=True,
    ),
    "gate_pull": Limit(
        0.13,
        "its gates lean towards what sites usually see, and win at the others' mean activations "
        "(cosine times share: {value:.2f}, median {median:.2f}): they win by a constant, whatever "
        "a prompt asks",
        few=0.17,
    ),
    "gate_wins": Limit(
        0.64, f"its gates win at {{value:.0%}} of the others' mean activations {USUAL}", few=0.87
    ),
    "gate_neutral": Limit(
        0.69, f"its gates fit {{value:.0%}} of the tokens of neutral text best {USUAL}", few=0.84
    ),
    "mean_distance": Limit(
        4.9,
        "its mean activations are {value:.3g} times as far from the pool's as the median expert's: "
        "router average-activation goes by them",
        few=7,
    ),
    "reading_distance": Limit(
        5.9,
        "the means of its readings are {value:.3g} times as far from the pool's as the median "
        "expert's: they move router discriminant",
        few=9.6,
    ),
    "reading_trace": Limit(1200, f"its readings vary {{value:.3g}} times the median: {HIDES}"),
    "reading_masks": Limit(
        380, f"its readings vary {{value:.3g}} times the median where the others differ: {HIDES}"
    ),
    "embedding_count": Limit(
        5,
        "it stores {value:.3g} times as many embeddings as the median expert: more chances to be "
        "nearest with router retrieval",
    ),
    "embedding_copies": Limit(
        0.1,
        f"{{value:.0%}} of its embeddings are also those of other experts {USUAL}: copied, or made "
        f"of the same data",
        small=True,
    ),
    "embedding_wins": Limit(
        0.2, f"one of its embeddings is nearest to {{value:.0%}} of the others' own {USUAL}"
    ),
    "centroid_wins": Limit(
        0.2, f"the mean of its embeddings is nearest to {{value:.0%}} of the others' own {USUAL}"
    ),
    "retrieval_neutral": Limit(
        0.79, f"router retrieval would give it {{value:.0%}} of neutral prompts {USUAL}", few=0.88
    ),
    "centroid_neutral": Limit(
        0.83, f"router centroid would give it {{value:.0%}} of neutral prompts {USUAL}", few=0.85
    ),
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
            "limits": {name: limit.of(len(self.experts)) for name, limit in LIMITS.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def write_json(self, path: str | Path) -> None:
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n", PoolError)


def audit(pool: Pool | str | Path, base: Base | None = None) -> Audit:
    """The audit of `pool`: every expert against the pool's median.

    With the `base` neutral text is read too: a pass over forty passages. Without it only files are.
    Raises as `Pool.open` does, ExpertError if an expert doesn't fit the base.
    """
    opened = Pool.open(pool)
    if base is not None:
        check_pool_fits(opened, find_sites(base.model))
    found = signs_of(opened)
    if base is not None:
        embed = any(expert.has("embeddings") for expert in opened.experts)
        text = read_neutral_text(base, opened.sites, embed=embed)
        found |= neutral_signs(opened, base, text)
    return report_of(opened, found)


def report_of(pool: Pool, signs: Mapping[str, Tensor]) -> Audit:
    """The audit of `pool` by its `signs` [E]: findings beyond a limit, and notes."""
    findings = [
        finding for name in LIMITS if name in signs for finding in _beyond(pool, name, signs)
    ]
    findings.sort(key=lambda finding: pool.names.index(finding.experts[0]))
    plain = {
        name: tuple(value if math.isfinite(value) else None for value in values.tolist())
        for name, values in signs.items()
    }
    return Audit(pool.names, plain, tuple(findings), tuple(_notes(pool, signs)))


def _beyond(pool: Pool, name: str, signs: Mapping[str, Tensor]) -> Iterator[Finding]:
    limit, values = LIMITS[name], signs[name]
    if len(pool) < LEAST and not limit.small:
        return
    usual = float(values.nanquantile(0.5))
    for z in (values > limit.of(len(pool))).nonzero().flatten().tolist():
        what = limit.message.format(value=float(values[z]), median=usual)
        message = (
            f"{pool.names[z]}: {what}. Look at where it comes from, compare the pool without it "
            f"(--leave-out {pool.names[z]})."
        )
        yield Finding(name, message, (pool.names[z],))


def _notes(pool: Pool, signs: Mapping[str, Tensor]) -> Iterator[str]:
    if len(pool) < LEAST:
        yield (
            f"{len(pool)} experts are too few to compare with a median ({LEAST} are needed): only "
            f"gates that equal means and copied embeddings are looked for."
        )
    for kind in dict.fromkeys(expert.kind for expert in pool.experts):
        count = sum(expert.kind == kind for expert in pool.experts)
        if count < LEAST <= len(pool):
            yield (
                f"{count} of kind {kinds()[kind].label} are too few to compare the sizes of "
                f"updates with their own kind"
                f"{'' if 'update_effect' in signs else '; a base compares all'}."
            )
    for part in ("gates", "means", "readings", "embeddings"):
        if without := pool.lacking(part):
            yield f"No {part}, so nothing to look at: {', '.join(without)}."
    if "update_effect" not in signs:
        yield "Neutral text was not read: that needs the base."
