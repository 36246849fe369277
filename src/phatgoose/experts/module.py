"""What one expert does at one site, whatever its kind.

Glossary, here and in `stack.py`: u input of a site's linear layer [.., n], y its output [.., d], W
and b its weight and bias, σ the strength at which a module acts (1, or [.., 1] for each token): at
1 as it was trained, at 0 not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor, nn

from ..errors import ExpertError
from ..files import JsonObject
from ..sites import Sites, Tensors
from .adapter_files import AdapterFiles, ByField

VERSION = 1  # of the formats of one's own


class SiteModule(ABC):
    """What an expert does at one site. Each kind has a frozen dataclass of this base.

    Its fields are tensors, then settings. `parts` has a letter for each size of a tensor, which
    stands for one number at a site: {"down": "md"}. In `files` a tensor is called SITE.FIELD,
    unless `endings` has another ending. For a kind with files of its own (`OwnFiles`) everything
    but `at` and `apply` follows.
    """

    kind: ClassVar[str]
    files: ClassVar[AdapterFiles]
    parts: ClassVar[ByField]
    endings: ClassVar[ByField] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """What the letters of `parts` stand for."""
        sizes: dict[str, int] = {}
        for name, letters in self.parts.items():
            tensor = getattr(self, name)
            if tensor is not None:
                sizes.update(zip(letters, tensor.shape, strict=True))
        return sizes

    @property
    def size(self) -> int | None:
        """The rank, or the size of the bottleneck; None for a kind that has neither."""
        return next((size for letter, size in self.sizes.items() if letter not in "nd"), None)

    @property
    def settings(self) -> tuple[object, ...]:
        """Its fields that are no tensors."""
        return tuple(value for value in vars(self).values() if not isinstance(value, Tensor | None))

    @abstractmethod
    def at(self, weight: Tensor) -> SiteModule:
        """The same module on the device of `weight`, ready for `apply`."""

    @abstractmethod
    def apply(self, base: nn.Module, u: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The output [.., d] of the layer `base` for u under this module, which came from `at`."""

    @classmethod
    def read(cls, directory: Path, config: JsonObject, tensors: Tensors) -> Modules:
        """The modules by site of an adapter whose `files` were read; `directory` is for messages.

        Raises ExpertError when a tensor is missing or left over, or shapes don't fit each other.
        """
        settings = {name: config[name] for name in cls.files.settings}
        by_site = cls.files.by_site(directory, tensors, cls.parts, cls.endings)
        return {site: cls(**parts, **settings) for site, parts in by_site.items()}

    @classmethod
    def write(cls, folder: Path, modules: Mapping[str, Self], about: Mapping[str, object]) -> Path:
        """`folder`, with these modules by site in its `files`; `about` goes into the config.

        Settings are those of the first module: all modules of an expert share them.
        """
        tensors = {}
        for site, module in modules.items():
            for name in cls.parts:
                tensors[site + cls.endings.get(name, f".{name}")] = getattr(module, name)
        first = next(iter(modules.values()))
        settings = {name: getattr(first, name) for name in cls.files.settings}
        config = {cls.files.version_key: VERSION, **about, **settings}
        return cls.files.write(folder, config, tensors)


Modules = Mapping[str, SiteModule]  # by site


def check_fit(
    name: str,
    modules: Modules,
    sites: Sites,
    *vectors: Tensors,
) -> None:
    """Raise ExpertError unless expert `name` fits a base with these `sites`.

    `vectors` are its gates and means, if any: only the base knows how long those are whose module
    doesn't see the site's input.
    """
    for site, module in modules.items():
        at = sites.get(site)
        n = d = 0
        base = "has no such layer"
        if at:
            n = at.in_features
            d = at.out_features
            base = f"{n} to {d}"
        inputs = module.sizes.get("n", n)
        outputs = module.sizes.get("d", d)
        lengths = {len(by_site[site]) for by_site in vectors if site in by_site}
        fits = at and (inputs, outputs) == (n, d) and lengths <= {n}
        if not fits:
            more = f", with gates or means of {sorted(lengths)} numbers" if lengths else ""
            raise ExpertError(
                f"Expert {name!r}, site {site}: maps {inputs} to {outputs} features{more}, the "
                f"base model {base}; it was trained on another base."
            )
