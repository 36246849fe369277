"""The tensors of a packed routed model: one file, or several that hold experts added later.

A segment is a file of stacks and vectors, by site, of some of the experts; together the segments
are the pool, in order. Experts that were removed are left out here, while their rows stay in the
files until these are compacted. What lies in one segment as it is used is mapped, never copied.

Factors may be stored in int8: each row of A and B as whole numbers from -127 to 127 times the
row's largest magnitude / 127, so that every number is off by at most 1/254 of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Routing
from .errors import ExpertError, RoutingError
from .files import read_json_object, shortened
from .mapped import TensorFile
from .reading import ahead
from .rows import joined, kept, used_rank
from .stacks import TENSORS, SiteStack, joined_stacks, kept_stack

__all__ = [
    "EMBEDDINGS",
    "FACTORS",
    "OWNERS",
    "ROUTED_INFO",
    "ROUTED_WEIGHTS",
    "Packed",
    "PackedTensors",
    "Segment",
    "quantised",
    "read_info",
    "read_packed",
    "routing_record",
]

ROUTED_INFO = "routed.json"
ROUTED_WEIGHTS = "routed.safetensors"
SEGMENT_FILE = re.compile(r"routed(-[0-9a-f]{12})?\.safetensors")
VERSIONS = (1, 2)  # 2 has segments
EMBEDDINGS, OWNERS = "lookup.embeddings", "lookup.owners"
VOTES = "lookup.votes."  # before a site's name
FACTORS = ("A", "B")
SCALES = tuple(f"{kind}_scale" for kind in FACTORS)
LARGEST = 127
NAMED_ANEW = "retrieval_embedder"  # by whoever loads the model: a file's word loads nothing


@dataclass(frozen=True)
class Segment:
    """A file of a packed model; `first` is the index of its first expert, of `experts`."""

    tensors: TensorFile
    first: int
    experts: int


class PackedTensors(Mapping[str, Tensor]):
    """All tensors of a packed model by name, as one file of the experts that are left has them."""

    def __init__(self, segments: Sequence[Segment], left: Sequence[int]) -> None:
        """`left` are the indices of the experts that are left, in order."""
        self._segments = segments
        count = sum(segment.experts for segment in segments)
        self._place = torch.full((count,), -1)
        self._place[list(left)] = torch.arange(len(left))
        self._rows = {}  # by site, where experts that act there were removed
        self._ranks: dict[str, int] = {}
        gone = set()
        for name in self._all_names():
            kind, _, site = name.partition(".")
            if kind == "experts" and len(left) < count:
                stay = (self._place[self._counted(name)] >= 0).nonzero().flatten()
                self._rows[site] = stay
                if not len(stay):
                    gone.add(site)
        names = (name for name in self._all_names() if name.partition(".")[2] not in gone)
        self._mixed = {site: None for site in self._mixed_sites() if site not in gone}
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})  # a mixed site's stack, by name
        plain = (name for name in names if not self._is_of_mixed_stack(name))
        mixed = (f"{kind}.{site}" for site in self._mixed for kind in self._stack(site))
        self._names = dict.fromkeys((*plain, *mixed))
        self._latest = ("", {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        kind, _, site = name.partition(".")
        if name == EMBEDDINGS:
            return self._joined(name)[self._place[self._counted(OWNERS)] >= 0]
        if name == OWNERS or kind == "experts":
            place = self._place[self._counted(name)]
            return place[place >= 0]
        if self._is_of_mixed_stack(name):
            return self._stack(site)[kind]
        tensor = self._joined(name)
        if site not in self._rows:
            return tensor
        tensor = kept(tensor, self._rows[site])
        return tensor[:, : self._rank(site)].contiguous() if kind in FACTORS else tensor

    def _all_names(self) -> dict[str, None]:
        names = (name for segment in self._segments for name in segment.tensors)
        return dict.fromkeys(name for name in names if name.partition(".")[0] not in SCALES)

    def _mixed_sites(self) -> dict[str, None]:
        """Sites at which others than plain LoRAs act, by what there is beside A and B."""
        parts = (name.partition(".") for name in self._all_names())
        return {site: None for kind, _, site in parts if kind in TENSORS and kind not in FACTORS}

    def _is_of_mixed_stack(self, name: str) -> bool:
        kind, _, site = name.partition(".")
        return kind in TENSORS and site in self._mixed

    def _stack(self, site: str) -> dict[str, Tensor]:
        """The tensors of the stack at a mixed `site`, whose rows are no experts' of the site."""
        if self._latest[0] != site:
            stacks = []
            for segment in self._segments:
                file = segment.tensors
                if f"experts.{site}" not in file:
                    continue
                names = (kind for kind in TENSORS if f"{kind}.{site}" in file)
                held = {kind: dequantised(file, f"{kind}.{site}") for kind in names}
                stacks.append(SiteStack.of(held, file[f"experts.{site}"]))
            stack = joined_stacks(stacks) if len(stacks) > 1 else stacks[0]
            if site in self._rows:
                stack = kept_stack(stack, self._rows[site])
            self._latest = (site, stack.tensors())
        return self._latest[1]

    def _joined(self, name: str) -> Tensor:
        files = (segment.tensors for segment in self._segments)
        return joined([dequantised(file, name) for file in files if name in file])

    def _counted(self, name: str) -> Tensor:
        """Indices of experts, those of each segment counting on from the segment before."""
        held = (s for s in self._segments if name in s.tensors)
        return joined([segment.tensors[name] + segment.first for segment in held])

    def _rank(self, site: str) -> int:
        if site not in self._ranks:
            held = [self._joined(f"{kind}.{site}") for kind in FACTORS]
            self._ranks[site] = used_rank([kept(factor, self._rows[site]) for factor in held])
        return self._ranks[site]


@dataclass(frozen=True)
class Packed:
    """A packed model as it lies in its folder: its description, segments, and who is left.

    `left` are indices into the description's experts, in order.
    """

    info: dict[str, Any]
    segments: tuple[Segment, ...]
    left: tuple[int, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those of the experts that are left."""
        return [self.info["experts"][z] for z in self.left]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the experts that are left."""
        return tuple(record["name"] for record in self.records)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where at least one of them acts."""
        begin = "experts."
        return tuple(n.removeprefix(begin) for n in self.tensors if n.startswith(begin))

    @property
    def tensors(self) -> PackedTensors:
        """All tensors of the experts that are left."""
        return PackedTensors(self.segments, self.left)


def read_packed(directory: Path) -> Packed:
    """The packed model in `directory`, every file checked against its hash and for finiteness.

    Raises RoutingError when it is missing or damaged.
    """
    path = directory / ROUTED_INFO
    info = read_info(path)
    listed = info.get("segments") or [
        {
            "file": ROUTED_WEIGHTS,
            "sha256": info["weights_sha256"],
            "experts": len(info["experts"]),
        }
    ]
    segments, first = [], 0
    try:
        for entry in listed:
            file, count = entry["file"], entry["experts"]
            if not SEGMENT_FILE.fullmatch(file) or type(count) is not int or count < 1:
                raise ValueError(f"segment {shortened(entry)}")
            segments.append(Segment(_read_weights(directory / file, entry["sha256"]), first, count))
            first += count
        gone = set(info.get("removed", ()))
        left = tuple(z for z in range(first) if z not in gone)
        if first != len(info["experts"]) or len(left) != first - len(gone) or not left:
            raise ValueError(f"{first} experts in segments, {len(gone)} removed")
        return Packed(info, tuple(segments), left)
    except (ValueError, KeyError, TypeError) as error:
        raise RoutingError(
            f"{path} is not a valid description of a routed model: {error}."
        ) from error


def _read_weights(path: Path, sha256: str) -> TensorFile:
    try:
        tensors = TensorFile(path)
        _, found = ahead(lambda look: look(), (tensors.check_finite, tensors.sha256))
    except ExpertError as error:
        raise RoutingError(str(error)) from error
    if found != sha256:
        raise RoutingError(f"{path} was changed after it was written.")
    return tensors


def routing_record(routing: Routing) -> dict[str, Any]:
    """What a description says of `routing`: all but the embedder."""
    return {key: value for key, value in asdict(routing).items() if key != NAMED_ANEW}


def read_info(path: Path) -> dict[str, Any]:
    """The description in the file `path`. Raises RoutingError when it is missing or damaged."""
    try:
        info = read_json_object(path, RoutingError)
    except FileNotFoundError as error:
        raise RoutingError(
            f"{path.parent} holds no routed model: {path.name} can't be read."
        ) from error
    if info.get("format_version") not in VERSIONS:
        raise RoutingError(
            f"{path}: format version {shortened(info.get('format_version'))} is unknown, wanted "
            f"{' or '.join(map(str, VERSIONS))}."
        )
    weights = "weights_sha256" if info["format_version"] == 1 else "segments"
    missing = {"base", "routing", "experts", weights} - info.keys()
    if missing:
        raise RoutingError(f"{path} lacks {', '.join(sorted(missing))}.")
    return info


def quantised(kind: str, site: str, factor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stack of factors [E, r, ..] in int8, and the scales of its rows [E, r], as named."""
    numbers = factor.float()
    scale = numbers.abs().amax(dim=-1) / LARGEST
    whole = (numbers / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    yield f"{kind}.{site}", whole.clamp(-LARGEST, LARGEST).to(torch.int8)
    yield f"{kind}_scale.{site}", scale


def dequantised(file: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of this name: as it is stored, or in float32 if it was in int8."""
    tensor = file[name]
    if tensor.dtype != torch.int8:
        return tensor
    kind, _, site = name.partition(".")
    return tensor.float() * file[f"{kind}_scale.{site}"][..., None]
