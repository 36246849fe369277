"""Pools: collections of experts for one base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import Base, BaseReference, same_base
from ..config import closest
from ..errors import ExpertError, PoolError
from ..files import prefetch
from ..names import HUB, require_pool_there
from .expert import FORM, LAYOUT, Expert, adapters_in
from .hub import HubReference, fetch, reference_of
from .importing import read_adapters

MOST_NAMED = 8  # experts in the repr of a pool
REMEDIES = {"gates": "gate"}  # commands that add what is missing
REMEDIES |= dict.fromkeys(("means", "readings", "embeddings"), "stats")
RECORDED = ("adapter_sha256", "vectors_sha256", "embeddings_sha256", "acts_on", "measured_in")


@dataclass(frozen=True, eq=False)
class Pool(Mapping[str, Expert]):
    """Experts that share a base model, by name. Open one with `Pool.open`.

    `pool["reviews"]` is the expert of that name, `pool.experts[0]` the first one; `len`, `in`,
    `keys`, `values` and `items` are those of any mapping.
    """

    experts: tuple[Expert, ...]

    @classmethod
    def open(cls, source: Pool | Expert | str | Path | Sequence[Expert | str | Path]) -> Pool:
        """The pool in `source`, or `source` itself if it is a pool.

        Every expert is read and fully checked once.

        Args:
            source: A folder of expert directories, one expert directory, a reference to either on
                the Hub ("hub:owner/name@revision"), an expert that is loaded, or a list of these. A
                folder of PEFT adapters, or one adapter's, is read as `import_adapter` would import
                it; an adapter that can't be routed is a warning, and an error only where none can.

        Raises:
            PoolError: No place is given or one has no expert, two share a name, or bases differ.
            ExpertError: An expert is damaged or unsupported.
        """
        if isinstance(source, Pool) and source.experts:
            return source
        places = [source] if isinstance(source, Expert | str | Path) else source
        experts = [each for place in places for each in _experts_at(place)]
        read = prefetch(lambda e: e if isinstance(e, Expert) else Expert.load(e), experts)
        pool, others = cls(tuple(read)), dict[str, Expert]()
        problems = [] if experts else ["The list of experts is empty; name a folder of experts."]
        for expert in pool.experts:
            who, first = f"Expert {expert.name!r}", pool._anchor
            if other := others.get(expert.name):
                why = f"has the name of the one in {other.place}; rename it."
                problems.append(f"{who} in {expert.place} {why}")
            if not same_base(expert.info.base, first.info.base):
                problems.append(
                    f"{who} was trained on base {expert.info.base.id!r}, but {first.name!r} on "
                    f"{first.info.base.id!r}; a pool has one base. If both are one, import both "
                    f"adapters again with --fingerprint."
                )
            others[expert.name] = expert
        if problems:
            raise PoolError(problems[0])
        return pool

    @cached_property
    def names(self) -> tuple[str, ...]:
        """In order: index z of a routing is the z-th of them."""
        return tuple(expert.name for expert in self.experts)

    @property
    def base(self) -> BaseReference:
        """The base all experts were trained on, with its fingerprint if any expert has it."""
        return self._anchor.info.base

    @cached_property
    def _anchor(self) -> Expert:
        marked = (expert for expert in self.experts if expert.info.base.fingerprint)
        return next(marked, self.experts[0])

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Every site at which at least one expert acts."""
        return tuple(dict.fromkeys(site for expert in self.experts for site in expert.modules))

    @cached_property
    def prompts(self) -> dict[str, str]:
        """An example prompt of each expert that brings some."""
        return {expert.name: expert.prompts[0] for expert in self.experts if expert.prompts}

    @cached_property
    def unread(self) -> tuple[Expert, ...]:
        """Experts that bring prompts, but no statistics of any."""
        return tuple(each for each in self.experts if not each.has("readings") and each.prompts)

    def __getitem__(self, name: object) -> Expert:
        """The expert called `name`. Raises KeyError, which lists the names, when there is none."""
        if name in self.names:
            return self.experts[self.names.index(name)]
        raise KeyError(self._unknown(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.experts)

    def __repr__(self) -> str:
        on = f" on {self.base.id!r}" if self.experts else ""
        more = ["…"] if len(self) > MOST_NAMED else []
        return f"<Pool{on} (experts: {len(self)}): {', '.join([*self.names[:MOST_NAMED], *more])}>"

    def select(
        self, keep: Iterable[str] | None = None, leave_out: Iterable[str] | None = None
    ) -> Pool:
        """The pool of the experts named in `keep` (None: all), without those in `leave_out`.

        Names are `Expert.name`, not those of directories. Raises PoolError for an unknown name, and
        when no expert is left.
        """
        kept, left = list(keep) if keep is not None else list(self.names), list(leave_out or ())
        unknown = [self._unknown(name) for name in (*kept, *left) if name not in self]
        staying = set(kept) - set(left)
        if unknown or not staying:
            none = "No expert is left in the pool after keep and leave_out."
            raise PoolError(next(iter(unknown), none))
        return Pool(tuple(expert for expert in self.experts if expert.name in staying))

    def measured(self, base: Base) -> Pool:
        """The pool in which `base` has read all prompts; without a tokenizer none can be read."""
        if not self.unread or base.tokenizer is None:
            return self
        read = {each.name: each.with_prompts_read(base) for each in self.unread}
        return Pool(tuple(read.get(each.name, each) for each in self.experts))

    def _unknown(self, name: object) -> str:
        inside = [expert.name for expert in self.experts if expert.place.name == name]
        hint = f" The directory {name!r} holds the expert {inside[0]!r}." if inside else ""
        hint = hint or closest(name, self.names)
        return f"The pool has no expert {name!r}; it has {', '.join(self.names)}.{hint}"

    def release(self) -> None:
        """Free the memory of bytes read from the experts' files (see `Expert`)."""
        for expert in self.experts:
            expert.release()

    def vectors(self, kind: str, site: str) -> Tensor:
        """The "gates" or "means" (`kind`) at `site`, [E, n], of the experts that act there."""
        return torch.stack([getattr(e, kind)[site] for e in self.experts if site in e.modules])

    def lacking(self, part: str) -> tuple[str, ...]:
        """The names of the experts that don't have a `part` (see `Expert.has`)."""
        return tuple(expert.name for expert in self.experts if not expert.has(part))

    def records(self) -> list[dict[str, Any]]:
        """One record per expert: name, path, the hashes of its files and its inputs' formatting.

        The path of an expert from the Hub is its reference there, pinned to a commit.
        """
        records = []
        for expert in self.experts:
            info, place = expert.info, expert.place.resolve()
            pinned = reference_of(place) if "snapshots" in place.parts else None
            told = {key: getattr(info, key) for key in RECORDED}
            form = {
                name: info.hyperparameters[name] for name in FORM if name in info.hyperparameters
            }
            form |= {"inputs_cut": info.metrics.get("inputs_cut")} if form else {}
            record = {key: v for key, v in told.items() if v is not None or key.endswith("sha256")}
            about = {"name": expert.name, "path": str(pinned or place), "formatting": form or None}
            records.append(about | record)
        return records


def _experts_at(place: Expert | str | Path) -> Iterable[Expert | Path]:
    """The experts at `place`, or its adapters read as experts; a refused one is a warning."""
    if isinstance(place, Expert):
        return [place]
    require_pool_there(place)
    folder = fetch(HubReference.parse(str(place))) if str(place).startswith(HUB) else Path(place)
    inside, root = adapters_in(folder), folder.resolve()
    leading_out = [each for each in inside if not each.resolve().is_relative_to(root)]
    experts: list[Expert | Path] = [each for each in inside if (each / LAYOUT.info).is_file()]
    others = [each for each in inside if each not in experts]
    refused = dict.fromkeys(map(str, others), "it is an adapter among experts; import it")
    if not experts:
        read = read_adapters(each for each in others if each not in leading_out)
        experts, refused = [*read.experts], dict(read.refused)
    linked = f"it is a symbolic link that leads out of {folder}; name what it leads to"
    refused |= dict.fromkeys(map(str, leading_out), linked)
    experts = [each for each in experts if each not in leading_out]
    if not experts:
        why = "".join(f" {reason}" for reason in [*refused.values()][:1])
        raise PoolError(f"No expert and no PEFT adapter in {folder} can be used.{why}")
    for left_out, why in refused.items():
        warnings.warn(f"{left_out} is left out: {why}", stacklevel=4)
    return experts


def check_alike(experts: Iterable[Expert], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise ExpertError unless `experts` act on layers of the same `sizes` (n, d) at each site."""
    known = {(site, letter): n for site, by in sizes.items() for letter, n in by.items()}
    for expert in experts:
        for site, module in expert.modules.items():
            vectors = [each[site] for each in (expert.gates, expert.means) if site in each]
            for letter, size in (*module.sizes.items(), *(("n", len(v)) for v in vectors)):
                if letter in "nd" and known.setdefault((site, letter), size) != size:
                    raise ExpertError(
                        f"Expert {expert.name!r}, site {site}: it and the experts that are there "
                        f"are of layers of {known[site, letter]} and {size} features; they can't "
                        f"be of one base."
                    )
