"""Pools: collections of experts for one base model."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import BaseReference, closest_beside, same_base
from ..config import closest
from ..errors import ExpertError, PoolError
from ..files import (
    one_line,
    prefetch,
    read_json,
    sha256_of,
    shortened,
    write_text,
)
from .expert import FORM, LAYOUT, Expert, ExpertInfo, adapter_files
from .hub import HubReference, local_folder, reference_of
from .importing import adapters_in, read_adapters

MANIFEST, MANIFEST_VERSION = ".json", 1  # how its name ends
LONGEST_PATH = 1000  # characters
STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a terminal, if printed
MOST_NAMED = 8  # experts in the repr of a pool
REMEDIES = {"gates": "gate"}  # commands that add what is missing
REMEDIES |= dict.fromkeys(("means", "readings", "embeddings"), "stats")


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
                the Hub ("hub:owner/name@revision"), an expert that is loaded, a list of these, or a
                manifest written by `write_manifest`, against whose hashes the experts are then
                checked. A folder of PEFT adapters, or one adapter's, is read as `import_adapter`
                would import it; an adapter that can't be routed is a warning, and an error only
                where none can.

        Raises:
            PoolError: There is no expert, two share a name, or bases differ.
            ExpertError: An expert is damaged or unsupported.
        """
        if isinstance(source, Pool):
            return source
        if isinstance(source, str | Path) and Path(source).suffix == MANIFEST:
            return cls._of(_read_manifest(Path(source)))
        places = [source] if isinstance(source, Expert | str | Path) else source
        experts = [each for place in places for each in _experts_at(place)]
        if not experts:
            raise PoolError(
                f"No expert was found in {', '.join(map(str, places)) or 'an empty list'}; wanted "
                f"expert directories, each with a {LAYOUT.info}, or PEFT adapters."
            )
        return cls._of(prefetch(lambda e: e if isinstance(e, Expert) else Expert.load(e), experts))

    @classmethod
    def _of(cls, experts: Iterable[Expert]) -> Pool:
        pool = cls(tuple(experts))
        first = pool._anchor
        places: dict[str, Path] = {}
        for expert in pool.experts:
            if expert.name in places:
                raise PoolError(
                    f"Two experts are named {expert.name!r}: {places[expert.name]} and "
                    f"{expert.place}; rename one, or leave it out."
                )
            places[expert.name] = expert.place
            if not same_base(expert.info.base, first.info.base):
                raise PoolError(
                    f"Expert {expert.name!r} was trained on base {expert.info.base.id!r}, but "
                    f"{first.name!r} on {first.info.base.id!r}; a pool has one base. If both are "
                    f"one, import both adapters again with --fingerprint."
                )
        return pool

    @property
    def names(self) -> tuple[str, ...]:
        """In order: index z of a routing is the z-th of them."""
        return tuple(expert.name for expert in self.experts)

    @property
    def base(self) -> BaseReference:
        """The base all experts were trained on, with its fingerprint if any expert has it."""
        return self._anchor.info.base

    @property
    def _anchor(self) -> Expert:
        if not self.experts:
            raise PoolError("The pool has no experts.")
        marked = (expert for expert in self.experts if expert.info.base.fingerprint)
        return next(marked, self.experts[0])

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Every site at which at least one expert acts."""
        return tuple(dict.fromkeys(site for expert in self.experts for site in expert.modules))

    def __getitem__(self, name: object) -> Expert:
        """The expert called `name`. Raises KeyError, which lists the names, when there is none."""
        if name in self.names:
            return self.experts[self.names.index(name)]
        raise KeyError(self._unknown(name))

    def __contains__(self, name: object) -> bool:
        return name in self.names

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
        for name in [*kept, *left]:
            if name not in self:
                raise PoolError(self._unknown(name))
        staying = set(kept) - set(left)
        if not staying:
            raise PoolError("No expert is left in the pool after keep and leave_out.")
        return Pool(tuple(expert for expert in self.experts if expert.name in staying))

    def _unknown(self, name: object) -> str:
        inside = [expert.name for expert in self.experts if expert.place.name == name]
        hint = f" The directory {name!r} holds the expert {inside[0]!r}." if inside else ""
        hint = hint or closest(name, self.names)
        return f"The pool has no expert {name!r}; it has {', '.join(self.names)}.{hint}"

    def check_on_disk(self, why: str) -> None:
        """Raise PoolError, which says `why`, for adapters that were read as experts."""
        for expert in self.experts:
            if not (expert.directory / LAYOUT.info).is_file():
                raise PoolError(
                    f"Expert {expert.name!r} is an adapter, and {why}; make experts of adapters by "
                    f"'phatgoose import' first."
                )

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

    def check_vectors(self, kind: str) -> None:
        """Raise PoolError, naming them, when experts lack a `kind` of REMEDIES."""
        if without := self.lacking(kind):
            one = len(without) == 1
            raise PoolError(
                f"Expert{'' if one else 's'} {', '.join(map(repr, without))} "
                f"{'has' if one else 'have'} no {kind}: run 'phatgoose {REMEDIES[kind]}' with the "
                f"data of the training, leave {'it' if one else 'them'} out, or compose the pool "
                f"by a router that needs none, such as arrow."
            )

    def records(self) -> list[dict[str, Any]]:
        """One record per expert: name, path, the hashes of its files and its inputs' formatting.

        The path of an expert from the Hub is its reference there, pinned to a commit.
        """
        return [
            {
                "name": expert.name,
                "path": str(reference_of(expert.place) or expert.place.resolve()),
                "adapter_sha256": expert.info.adapter_sha256,
                "vectors_sha256": expert.info.vectors_sha256,
                "embeddings_sha256": expert.info.embeddings_sha256,
                "formatting": _formatting(expert.info),
                **{
                    key: value
                    for key in ("acts_on", "measured_in")
                    if (value := getattr(expert.info, key)) is not None
                },
            }
            for expert in self.experts
        ]

    def write_manifest(self, path: str | Path) -> None:
        """Write a JSON manifest that `open` reads; paths in it are relative to it where possible.

        Raises PoolError as `check_manifest_name` does, and when it can't be written.
        """
        path = Path(path)
        check_manifest_name(path)
        folder = path.parent.resolve()
        records = self.records()
        self.check_on_disk("a manifest lists experts")
        for record, expert in zip(records, self.experts, strict=True):
            record["config_sha256"] = _config_sha256(expert)
            if not HubReference.is_one(record["path"]):
                record["path"] = os.path.relpath(record["path"], folder)
        content = {
            "manifest_version": MANIFEST_VERSION,
            "base": asdict(self.base),
            "experts": records,
        }
        write_text(path, json.dumps(content, indent=2) + "\n", PoolError)


def _formatting(info: ExpertInfo) -> dict[str, Any] | None:
    recorded = {name: info.hyperparameters[name] for name in FORM if name in info.hyperparameters}
    return {**recorded, "inputs_cut": info.metrics.get("inputs_cut")} if recorded else None


def check_manifest_name(path: Path) -> None:
    """Raise PoolError unless a manifest can be called so."""
    if path.suffix != MANIFEST:
        raise PoolError(f"{path} can't be a manifest's name; let it end in {MANIFEST}.")


def _experts_at(place: Expert | str | Path) -> Iterable[Expert | Path]:
    if isinstance(place, Expert):
        return [place]
    folder = local_folder(place)
    experts = list(_expert_directories(folder))
    adapters = [each for each in adapters_in(folder) if not (each / LAYOUT.info).is_file()]
    if not experts:
        return _adapters_in(folder, adapters)
    if adapters:
        warnings.warn(
            f"{folder} holds experts, and adapters that are left out: "
            f"{', '.join(each.name for each in adapters)}. Name their folders too, or import them.",
            stacklevel=4,
        )
    return experts


def _adapters_in(place: Path, folders: Sequence[Path]) -> Sequence[Expert]:
    """The adapters in a folder without experts, read as experts; a refused one is a warning."""
    for folder in folders:
        _check_inside(folder, place)
    read = read_adapters(folders)
    if folders and not read.experts:
        first = next(iter(read.refused.values()))
        raise PoolError(f"No adapter in {place} can be used. {first}" if folders[1:] else first)
    for left_out, why in read.refused.items():
        warnings.warn(f"{left_out} is left out: {why}", stacklevel=5)
    return read.experts


def _check_inside(folder: Path, place: Path) -> None:
    if not folder.resolve().is_relative_to(place.resolve()):
        raise PoolError(
            f"{folder} is a symbolic link that leads out of {place}; name the folder that it leads "
            f"to beside {place} instead."
        )


def _expert_directories(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        hint = "" if place.exists() else closest_beside(place)
        raise PoolError(f"{place} is no folder of experts or of PEFT adapters.{hint}")
    if (place / LAYOUT.info).is_file():
        yield place
        return
    for folder in sorted(place.iterdir()):
        if not folder.name.startswith(".") and (folder / LAYOUT.info).is_file():
            _check_inside(folder, place)
            yield folder


def _read_manifest(path: Path) -> Iterator[Expert]:
    try:
        content = read_json(path, dict, PoolError)
        version, records = content["manifest_version"], content["experts"]
        if version != MANIFEST_VERSION or not records:
            raise TypeError(f"its version is {shortened(version)}, its experts {len(records)}")
        for record in records:
            named = record["path"]
            if not isinstance(named, str) or len(named) > LONGEST_PATH or STEERING.search(named):
                raise TypeError(f"path is {shortened(named)}")
    except (KeyError, TypeError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise PoolError(f"{path} is no pool manifest: {one_line(lacks)}.") from error
    folder = path.resolve().parent  # where a link to the manifest leads
    places = [
        local_folder(named if HubReference.is_one(named) else folder / named)
        for named in (record["path"] for record in records)
    ]
    for expert, record in zip(prefetch(Expert.load, places), records, strict=True):
        _check_hashes(expert, record)
        yield expert


def _config_sha256(expert: Expert) -> str:
    return sha256_of(expert.directory / adapter_files(expert.directory).config)


def _check_hashes(expert: Expert, record: Mapping[str, Any]) -> None:
    hashes = {**asdict(expert.info), "config_sha256": _config_sha256(expert)}
    for part in ("config", "adapter", "vectors", "embeddings"):
        key = f"{part}_sha256"
        if key in record and hashes[key] != record[key]:
            raise ExpertError(
                f"Expert {shortened(record.get('name'))} at {expert.directory} has changed: the "
                f"manifest has another hash of its {part}; write it again if it should be so."
            )


def check_alike(
    experts: Iterable[Expert], inputs: Mapping[str, int], outputs: Mapping[str, int]
) -> None:
    """Raise ExpertError unless `experts` act on layers of the same sizes at each site."""
    inputs, outputs = dict(inputs), dict(outputs)
    for expert in experts:
        for site, module in expert.modules.items():
            lengths = {len(each[site]) for each in (expert.gates, expert.means) if site in each}
            for sizes, size, others in (
                (inputs, module.in_features, lengths),
                (outputs, module.out_features, set()),
            ):
                found = {*others, size, sizes.get(site)} - {None}
                if len(found) > 1:
                    raise ExpertError(
                        f"Expert {expert.name!r}, site {site}: it and the experts that are there "
                        f"are of layers of {' and '.join(map(str, found))} features; they can't be "
                        f"of one base."
                    )
                sizes.update((site, own) for own in found if own is not None)
