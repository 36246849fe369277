"""From folders of experts to a routed model: time beside that of reading the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import phatgoose as pg
from bench import Bench
from findings import Finding, row
from measuring import side_by_side
from phatgoose.base.identity import twin
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT

PACKED = "packed"


@row("reading", "reading and stacking a pool")
def measure_reading(bench: Bench) -> Iterator[Finding]:
    """`Pool.open` and `compose`, and `load` of what `save` wrote, the base being loaded.

    The files were read before: this is about the work, not about the disk.
    """
    sizes = bench.sizes
    count = sizes.pools[-1]
    folders, packed = bench.experts(count), bench.pools / f"{sizes.stem}-{PACKED}"
    base = twin(bench.base)

    def compose() -> None:
        pg.detach(pg.compose(pg.Pool.open(folders), base, k=sizes.k, router="phatgoose"))

    def load() -> None:
        pg.detach(pg.load(packed, base))

    model = pg.compose(pg.Pool.open(folders), base, k=sizes.k, router="phatgoose")
    pg.save(model, packed, overwrite=True)
    pg.detach(model)
    files = [folder / name for folder in folders for name in (ADAPTER_WEIGHTS, LAYOUT.vectors)]
    contenders = {"bytes": lambda: read_bytes(files), "compose": compose, "load": load}
    timings = side_by_side(contenders, sizes.rounds)
    what = f"{sizes.base}, E = {count}, r = {sizes.rank}"
    size = sum(file.stat().st_size for file in files) / 1e9
    note = f"{size:.2f} GB in {timings['bytes'].median:.2f} s"
    case = f"{what}: open and compose / read the bytes"
    yield Finding.of(case, timings, "compose", "bytes", note)
    loads = timings["load"]
    spread = min(loads.seconds), max(loads.seconds)
    yield Finding(f"{what}: load of the packed form", loads.median, spread, unit=" s")


def read_bytes(files: Sequence[Path]) -> Tensor:
    """The content of all files, one after the other, in fresh memory."""
    content = torch.empty(sum(file.stat().st_size for file in files), dtype=torch.uint8)
    place = memoryview(content.numpy())
    for path in files:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(place):
                place = place[read:]
    return content
