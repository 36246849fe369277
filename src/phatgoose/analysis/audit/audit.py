"""The audit of a pool: experts whose signs are beyond what honest experts were seen to have.

Limits come from half of a hundred honest experts made for that, never from the other half, on which
`benchmarks/audit.py` reports: a ratio may be twice the largest that was seen there, a share or a
cosine lies half-way from the largest to 1; in pools of ten, and again in pools of five. Of copied
embeddings and of wins at others' there were none, and their limits are by what they mean. An expert
beyond a limit is unusual, and not shown to be an attack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ...base.loading import Base
from ...base.sites import find_sites
from ...config import KIND_NAMES
from ...errors import PoolError
from ...experts.pool import Pool
from ...files.atomic import write_text
from ...routing.compose import check_pool_fits
from ..findings import Finding
from .neutral import neutral_signs, read_neutral_text
from .signs import LEAST, signs_of

__all__ = ["LIMITS", "Audit", "Limit", "audit", "report_of"]


MANY = 8  # experts whose median hardly wanders


@dataclass(frozen=True)
class Limit:
    """What a sign may be at most, and what is said of one above that.

    `message` has {value} and {median}. In pools of fewer than MANY experts the limit is `few`, if
    that is given: medians of few wander. `small` says that the sign means something in pools of any
    size; other signs need LEAST experts.
    """

    most: float
    message: str
    small: bool = False
    few: float | None = None

    def of(self, experts: int) -> float:
        """The limit in a pool of so many experts."""
        return self.most if self.few is None or experts >= MANY else self.few


LIMITS: dict[str, Limit] = {
    "update_size": Limit(
        20,
        "its update is {value:.3g} times as large as the median of its kind: it outweighs others "
        "wherever updates are added, most of all with routers merged and logo",
        few=78,
    ),
    "update_effect": Limit(
        21,
        "its modules change outputs on neutral text {value:.3g} times as much as the median "
        "expert's: it outweighs others wherever updates are added",
        few=280,
    ),
    "update_spread": Limit(
        6.7,
        "one module's update is {value:.3g} times as large as its others are (each against the "
        "pool's median at that module; {median:.3g} is usual): updates made for a trigger can look "
        "like that",
    ),
    "effect_spread": Limit(
        32,
        "one module changes outputs {value:.3g} times as much as its others do (each against the "
        "pool's median at that module; {median:.3g} is usual): updates made for a trigger can look "
        "like that",
    ),
    "gate_size": Limit(
        35,
        "its gates are {value:.3g} times as long as the median: harmless with router phatgoose, "
        "which standardises them, but it decides with --affinity raw",
        few=54,
    ),
    "gate_own_mean": Limit(
        0.74,
        "its gates have a cosine of {value:.2f} with its own mean activations (median "
        "{median:.2f}): trained gates don't, and such ones win tokens of others",
        small=True,
    ),
    "gate_usual": Limit(
        0.63,
        "its gates have a cosine of {value:.2f} with what sites usually see (median {median:.2f}): "
        "they win by a constant, whatever a prompt asks",
    ),
    "gate_wins": Limit(
        0.64,
        "its gates win at {value:.0%} of the others' mean activations (median {median:.0%})",
        few=0.87,
    ),
    "gate_neutral": Limit(
        0.69,
        "its gates fit {value:.0%} of the tokens of neutral text best (median {median:.0%})",
        few=0.84,
    ),
    "mean_distance": Limit(
        4.9,
        "its mean activations are {value:.3g} times as far from the pool's as the median expert's: "
        "they move affinities centred and trimmed",
        few=7,
    ),
    "reading_distance": Limit(
        5.9,
        "the means of its readings are {value:.3g} times as far from the pool's as the median "
        "expert's: they move routers named after discriminants",
        few=9.6,
    ),
    "reading_trace": Limit(
        1200,
        "its readings vary {value:.3g} times as much as the median expert's: they hide differences "
        "between the others from routers named after discriminants",
    ),
    "reading_masks": Limit(
        380,
        "its readings vary {value:.3g} times as much as the median expert's in those directions in "
        "which the others differ: they hide these from routers named after discriminants",
    ),
    "embedding_count": Limit(
        5,
        "it stores {value:.3g} times as many embeddings as the median expert: more chances to be "
        "nearest with router retrieval",
    ),
    "embedding_copies": Limit(
        0.1,
        "{value:.0%} of its embeddings are also those of other experts (median {median:.0%}): "
        "copied, or made of the same data",
        small=True,
    ),
    "embedding_wins": Limit(
        0.2,
        "one of its embeddings is nearest to {value:.0%} of the others' own (median {median:.0%})",
    ),
    "centroid_wins": Limit(
        0.2,
        "the mean of its embeddings is nearest to {value:.0%} of the others' own (median "
        "{median:.0%})",
    ),
    "retrieval_neutral": Limit(
        0.79,
        "router retrieval would give it {value:.0%} of neutral prompts (median {median:.0%})",
        few=0.88,
    ),
    "centroid_neutral": Limit(
        0.83,
        "router centroid would give it {value:.0%} of neutral prompts (median {median:.0%})",
        few=0.85,
    ),
}


@dataclass(frozen=True)
class Audit:
    """What an audit found: `signs` by name, a number for each of the `experts` or None.

    `findings` have the sign's name as their kind and one expert each. `notes` say what could not be
    compared.
    """

    experts: tuple[str, ...]
    signs: Mapping[str, tuple[float | None, ...]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def unusual(self) -> tuple[str, ...]:
        """The experts with findings, in the pool's order."""
        named = {name for finding in self.findings for name in finding.experts}
        return tuple(name for name in self.experts if name in named)

    @property
    def summary(self) -> str:
        """The findings on one line; empty without any."""
        if not self.findings:
            return ""
        return (
            f"{len(self.unusual)} of {len(self.experts)} experts don't look like the others: "
            f"{', '.join(self.unusual)}. 'phatgoose audit' on the pool says why; --leave-out NAME "
            f"composes without one."
        )

    def median(self, name: str) -> float | None:
        """The median of a sign over the experts that have it; None where none has."""
        known = [value for value in self.signs[name] if value is not None]
        return median(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the limits; numbers that JSON lacks are null."""
        return {
            "experts": list(self.experts),
            "signs": {name: list(values) for name, values in self.signs.items()},
            "limits": {name: limit.of(len(self.experts)) for name, limit in LIMITS.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict` to `path`. Raises PoolError where that can't be written."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n", PoolError)


def audit(pool: Pool | str | Path, base: Base | None = None) -> Audit:
    """The audit of `pool`: every expert against the pool's median.

    With the `base` neutral text is read too, which takes a pass over forty passages and, with
    embeddings, the default embedder where it is on this machine. Without it only files are looked
    at. Raises as `Pool.open` does, ExpertError where an expert doesn't fit the base.
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
    """The audit of `pool` by its `signs`, as `signs_of` and `neutral_signs` have them."""
    findings = [
        finding for name in LIMITS if name in signs for finding in _beyond(pool, name, signs)
    ]
    findings.sort(key=lambda finding: pool.names.index(finding.experts[0]))
    plain = {name: tuple(map(_plain, values.tolist())) for name, values in signs.items()}
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
    """What could not be compared, a sentence each."""
    if len(pool) < LEAST:
        yield (
            f"{len(pool)} experts are too few to compare with a median ({LEAST} are needed): only "
            f"gates that equal means and copied embeddings are looked for."
        )
    for kind in dict.fromkeys(expert.kind for expert in pool.experts):
        count = sum(expert.kind == kind for expert in pool.experts)
        if count < LEAST <= len(pool):
            yield (
                f"{count} of kind {KIND_NAMES[kind]} are too few to compare the sizes of updates "
                f"with their own kind{'' if 'update_effect' in signs else '; a base compares all'}."
            )
    for part in ("gates", "means", "readings", "embeddings"):
        without = [expert.name for expert in pool.experts if not expert.has(part)]
        if without:
            yield f"No {part}, so nothing to look at: {', '.join(without)}."
    if "update_effect" not in signs:
        yield "Neutral text was not read: that needs the base."


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
