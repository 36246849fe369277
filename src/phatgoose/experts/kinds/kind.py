"""What every kind of expert has: modules at its sites, two files, and a record.

Glossary: u input of a site's linear layer [.., n], y its output [.., d], W and b its weight and
bias, σ the strength at which a module acts (1, or [.., 1] for each token): at 1 as it was trained,
at 0 not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...config import Peft
from ...files.tensor_file import FLOATS, TensorFile


class SiteModule(ABC):
    """What an expert does at one site. Each kind has a frozen dataclass of this base."""

    kind: ClassVar[str]

    def __repr__(self) -> str:
        """Its fields; of tensors the shape."""
        held = ((name, value) for name, value in vars(self).items() if value is not None)
        shown = (f"{n}={list(v.shape) if isinstance(v, Tensor) else repr(v)}" for n, v in held)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def in_features(self) -> int | None:
        """The size n of the site's input, None for a module that never sees it."""
        return None

    @property
    def out_features(self) -> int | None:
        """The size d of the site's output, None for a module that never sees it."""
        return None

    @property
    def size(self) -> int | None:
        """The rank, or the size of the bottleneck; None for a kind that has neither."""
        return None

    @property
    def settings(self) -> object:
        """Its fields that are no tensors: one value, or a tuple of several."""
        held = tuple(v for v in vars(self).values() if v is not None and not isinstance(v, Tensor))
        return held if len(held) > 1 else held[0]

    @abstractmethod
    def at(self, weight: Tensor) -> SiteModule:
        """The same module on the device of `weight`, ready for `apply`."""

    @abstractmethod
    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output [.., d] of the layer `base` for u under this module, which came from `at`."""


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter: their names, and their readers, which raise ExpertError.

    `base_key` is where the configuration names the base.
    """

    config: str
    weights: str
    base_key: str
    read_config: Callable[[Path], dict[str, Any]]
    read_weights: Callable[[Path], TensorFile]


@dataclass(frozen=True)
class Kind:
    """A kind of expert.

    `config` holds the settings of a new expert. `read` makes modules by site of an adapter's
    directory (for messages), configuration and tensors, or raises ExpertError; `write` puts modules
    by site, and further entries of the configuration, into a folder. `title` begins the model card.
    `peft_type` is PEFT's name for a kind in its files, None for one in files of its own.
    """

    module: type[SiteModule]
    config: type[Peft]
    files: AdapterFiles
    read: Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], Mapping[str, SiteModule]]
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Path]
    title: str
    peft_type: str | None = None

    @property
    def name(self) -> str:
        """The name in recipes and on the command line, a key of `config.PEFT_KINDS`."""
        return self.module.kind


def read_tensors(path: Path) -> TensorFile:
    """Every tensor of a safetensors file, all finite, as views of the mapped file.

    Raises ExpertError when the file is missing, no regular file of its folder, truncated, or holds
    a NaN or an infinity.
    """
    tensors = TensorFile(path)
    tensors.check_finite()
    return tensors


def are_floats(*tensors: Tensor) -> bool:
    """True when all are of a floating-point type that experts may be stored in."""
    return all(tensor.dtype in FLOATS for tensor in tensors)
