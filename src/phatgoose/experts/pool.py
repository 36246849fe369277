"""Pools: collections of experts for one base model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.identity import BaseReference, same_base
from ..config import READER, closest
from ..errors import ExpertError, PoolError
from ..files import prefetch
from ..names import HUB, require_pool_there
from ..reader import open_reader, usable_reader
from .corrections import FILE as CORRECTIONS
from .corrections import Correction, corrections_in
from .expert import FORM, LAYOUT, Expert, adapters_in
from .hub import HubReference, fetch, reference_of

TABLE = ".toml"  # of names and prompts alone, for a gateway
MOST_NAMED = 8  # experts in the repr of a pool
REMEDIES = {"gates": "gate"}  # commands that add what is missing
REMEDIES |= dict.fromkeys(("means", "prompt_statistics", "embeddings"), "stats")
RECORDED = ("adapter_sha256", "vectors_sha256", "embeddings_sha256", "acts_on", "measured_in")


@dataclass(frozen=True, eq=False)
class Pool(Mapping[str, Expert]):
    """Experts that share a base model, by name. Open one with `Pool.open`.

    `corrections` are prompts that `measured` adds to those of experts.

    `pool["reviews"]` is the expert of that name, `pool.experts[0]` the first one; `len`, `in`,
    `keys`, `values` and `items` are those of any mapping.
    """

    experts: tuple[Expert, ...]
    corrections: tuple[Correction, ...] = ()

    @classmethod
    def open(
        cls,
        source: Pool | Expert | str | Path | Sequence[Expert | str | Path],
        *,
        one_base: bool = True,
    ) -> Pool:
        """The pool in `source`, or `source` itself if it is a pool.

        Every expert is read and fully checked once.

        Args:
            source: A folder of expert directories, one expert directory, a reference to either on
                the Hub ("hub:owner/name@revision"), an expert that is loaded, or a list of these. A
                folder of PEFT adapters, or one adapter's, is read as `import_adapter` would import
                it; an adapter that can't be routed is a warning, and an error only where none can.
            one_base: False lets bases differ, where each expert acts alone on its own.

        Raises:
            PoolError: No place is given or one has no expert, two share a name, or bases differ.
            ExpertError: An expert is damaged or unsupported.
        """
        if isinstance(source, Pool) and source.experts:
            return source
        places = [source] if isinstance(source, Expert | str | Path) else source
        experts = [expert for place in places for expert in _experts_at(place)]
        if not experts:
            raise PoolError("The list of experts is empty; name a folder of experts.")
        pool = cls(tuple(prefetch(_loaded, experts)))
        by_name: dict[str, Expert] = {}
        for expert in pool.experts:
            other = by_name.get(expert.name)
            if other:
                raise PoolError(
                    f"Expert {expert.name!r} in {expert.place} has the name of the one in "
                    f"{other.place}; rename it."
                )
            if one_base and not same_base(expert.info.base, pool.base):
                raise PoolError(
                    f"Expert {expert.name!r} was trained on base {expert.info.base.id!r}, but "
                    f"{pool._anchor.name!r} on {pool.base.id!r}; a pool has one base. If both are "
                    f"one, import both adapters again with --fingerprint; else only 'phatgoose "
                    f"serve --upstream' takes both."
                )
            by_name[expert.name] = expert
        folders = [Path(place) for place in places if isinstance(place, str | Path)]
        corrected = [folder for folder in folders if (folder / CORRECTIONS).exists()]
        rows = [row for folder in corrected for row in corrections_in(folder)]
        return replace(pool, corrections=tuple(rows))

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
        return tuple(
            expert
            for expert in self.experts
            if not expert.has("prompt_statistics") and expert.prompts
        )

    @property
    def was_read(self) -> bool:
        """Whether `measured` has read the prompts of an expert."""
        return any(expert.states is not None for expert in self.experts)

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
        names = ", ".join(self.names[:MOST_NAMED])
        if len(self) > MOST_NAMED:
            names += ", …"
        return f"<Pool{on} (experts: {len(self)}): {names}>"

    def select(
        self, keep: Iterable[str] | None = None, leave_out: Iterable[str] | None = None
    ) -> Pool:
        """The pool of the experts named in `keep` (None: all), without those in `leave_out`.

        Names are `Expert.name`, not those of directories. Raises PoolError for an unknown name, and
        when no expert is left.
        """
        kept = self.names if keep is None else tuple(keep)
        dropped = tuple(leave_out or ())
        for name in kept + dropped:
            if name not in self:
                raise PoolError(self._unknown(name))
        staying = set(kept) - set(dropped)
        if not staying:
            raise PoolError("No expert is left in the pool after keep and leave_out.")
        experts = tuple(expert for expert in self.experts if expert.name in staying)
        return replace(self, experts=experts)

    def measured(self, named: str | None = None) -> Pool:
        """The pool in which all prompts have been read, by the reader of its other experts.

        Without others it is the usual one, or the one that the user `named`. Corrections join the
        statistics of their experts; those of experts that aren't here, or have none, are left out.
        """
        if not (self.unread or self.corrections):
            return self
        readers = (expert.info.reader for expert in self.experts)
        recorded = next(filter(None, readers), None)
        if recorded:
            reader = open_reader(usable_reader(recorded, named))
        else:
            reader = open_reader(named or READER)
        experts = list[Expert]()
        for expert in self.experts:
            prompts = [row.prompt for row in self.corrections if row.expert == expert.name]
            if expert in self.unread:
                expert = expert.with_prompts_read(reader)
            experts.append(expert.with_more_prompts(reader, prompts) if prompts else expert)
        return Pool(tuple(experts))

    def _unknown(self, name: object) -> str:
        hint = closest(name, self.names)
        for expert in self.experts:
            if expert.place.name == name:
                hint = f" The directory {name!r} holds the expert {expert.name!r}."
                break
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
            info = expert.info
            place = expert.place.resolve()
            path = str(reference_of(place) or place)
            trained = info.hyperparameters
            form = {name: trained[name] for name in FORM if name in trained}
            if form:
                form["inputs_cut"] = info.metrics.get("inputs_cut")
            record = {"name": expert.name, "path": path, "formatting": form or None}
            for key in RECORDED:
                value = getattr(info, key)
                if value is not None or key.endswith("sha256"):
                    record[key] = value
            records.append(record)
        return records


def _loaded(expert: Expert | Path) -> Expert:
    return expert if isinstance(expert, Expert) else Expert.load(expert)


def _experts_at(place: Expert | str | Path) -> Sequence[Expert | Path]:
    """The experts at `place`, or its adapters read as experts; a refused one is a warning."""
    if isinstance(place, Expert):
        return [place]
    folder = Path(place)
    if str(place).startswith(HUB):
        folder = fetch(HubReference.parse(str(place)))
    root = folder.resolve()
    experts: list[Expert | Path] = []
    adapters = []
    refused: dict[str, str] = {}
    linked: dict[str, str] = {}
    has_experts = False
    for path in adapters_in(folder):
        is_expert = (path / LAYOUT.info).is_file()
        has_experts |= is_expert
        if not path.resolve().is_relative_to(root):
            linked[str(path)] = (
                f"it is a symbolic link that leads out of {folder}; name what it leads to"
            )
        elif is_expert:
            experts.append(path)
        else:
            adapters.append(path)
    if has_experts:
        refused |= dict.fromkeys(map(str, adapters), "it is an adapter among experts; import it")
    else:
        from .importing import read_adapters  # loads transformers and PEFT, for seconds

        read = read_adapters(adapters)
        experts += read.experts
        refused |= read.refused
    refused |= linked
    if not experts:
        require_pool_there(place)
        why = "".join(f" {reason}" for reason in list(refused.values())[:1])
        if folder.suffix == TABLE or any(folder.glob(f"*/{LAYOUT.prompts}")):
            why += " Only 'phatgoose serve --upstream' takes names and prompts without adapters."
        raise PoolError(f"No expert and no PEFT adapter in {folder} can be used.{why}")
    for left_out, why in refused.items():
        warnings.warn(f"{left_out} is left out: {why}", stacklevel=3)
    return experts


def check_alike(experts: Iterable[Expert], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise ExpertError unless `experts` act on layers of the same `sizes` (n, d) at each site."""
    features = {site: dict(by_letter) for site, by_letter in sizes.items()}
    for expert in experts:
        for site, module in expert.modules.items():
            at_site = features.setdefault(site, {})
            measured = list(module.sizes.items())
            for vectors in (expert.gates, expert.means):
                if site in vectors:
                    measured.append(("n", len(vectors[site])))
            for letter, size in measured:
                earlier = at_site.setdefault(letter, size)
                if letter in "nd" and earlier != size:
                    raise ExpertError(
                        f"Expert {expert.name!r}, site {site}: it and the experts that are there "
                        f"are of layers of {earlier} and {size} features; they can't be of one "
                        f"base."
                    )
