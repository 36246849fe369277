"""The statistics of the base's classes of texts, by reader.

Those of reader e5 come with the package, so that nothing is read at start; another reader reads the
texts once a process. A shipped file doesn't know the texts that it was made of. So when these or
e5 change, make it again: `python -m phatgoose.routing.routers.base_classes e5`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...experts.statistics import PARTS, RANK, moments_of
from ...reader import Reader, open_reader
from ..conversation import base_texts

SHIPPED = "base_classes"  # the folder beside this file


@cache
def moments_of_base(reader: Reader, rank: int = RANK) -> Mapping[str, Tensor]:
    """Mean and covariance of each class, float32 [classes, blocks, ..] by part of `statistics`."""
    place = Path(__file__).parent / SHIPPED / f"{reader.reference.id}.safetensors"
    if rank == RANK and place.is_file():
        with safe_open(place, "pt") as file:
            if file.metadata() == marks_of(reader):
                return {part: file.get_tensor(part) for part in PARTS}
    return moments_read(reader, rank)


def marks_of(reader: Reader) -> dict[str, str]:
    """What moments belong to."""
    return {"reader": str(reader.reference), "fingerprint": str(reader.reference.fingerprint)}


def moments_read(reader: Reader, rank: int = RANK) -> Mapping[str, Tensor]:
    """The same, of the texts as `reader` reads them now."""
    classes = base_texts().values()
    texts = [text for of_class in classes for text in of_class]
    states = torch.split(reader.states(texts), list(map(len, classes)))
    moments = [moments_of(of_class, rank) for of_class in states]
    return {part: torch.stack([each[part] for each in moments]) for part in PARTS}


def main() -> None:
    for name in sys.argv[1:]:
        reader = open_reader(name)
        place = Path(__file__).parent / SHIPPED / f"{name}.safetensors"
        save_file(dict(moments_read(reader)), place, marks_of(reader))


if __name__ == "__main__":
    main()
