"""An adapter's two files, a configuration and its tensors: how they are read and written."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, create_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.identity import Base
from ..errors import ExpertError
from ..files import JsonObject, TensorFile, one_line, read_json
from ..sites import FLOATS, Tensors

ByField = Mapping[str, str]  # letters for a tensor's sizes, or how its name ends


@dataclass(frozen=True)
class AdapterFiles(ABC):
    """The two files of an adapter by name; the configuration names the base under `base_key`.

    `settings` and `version_key` are those of `OwnFiles`.
    """

    config: str
    weights: str
    base_key: str = "base"
    settings: Mapping[str, object] = field(default_factory=dict, hash=False, kw_only=True)
    version_key: str = field(default="version", kw_only=True)
    prefix: ClassVar[str] = ""  # of tensors' names
    hint: ClassVar[str] = ""  # if there are no weights

    @abstractmethod
    def read_config(self, directory: Path) -> JsonObject:
        """What the configuration says, checked; ExpertError for what it can't say."""

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        """What the configuration of a new adapter says of its base; `layer` is one of its sites."""
        return {self.base_key: base.id}

    def read_weights(self, directory: Path) -> TensorFile:
        return read_tensors(directory / self.weights, self.hint)

    def write(self, folder: Path, config: Mapping[str, object], tensors: Tensors) -> Path:
        """`folder`, with both in it; `tensors` are by site and ending."""
        prefixed = {}
        for name, tensor in tensors.items():
            prefixed[self.prefix + name] = tensor.detach().cpu().contiguous()
        save_file(prefixed, folder / self.weights)
        (folder / self.config).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return folder

    def by_site(
        self,
        directory: Path,
        tensors: Tensors,
        forms: ByField,
        endings: ByField,
    ) -> dict[str, dict[str, Tensor]]:
        """The weights by site and field, told by their names' endings, of these `forms`."""
        by_site: dict[str, dict[str, Tensor]] = {}
        ends = {endings.get(name, f".{name}"): name for name in {**forms, **endings}}
        for key in sorted(tensors):
            end = next(filter(key.endswith, ends), "")
            site = key.removeprefix(self.prefix).removesuffix(end)
            name = ends.get(end, key) if key.startswith(self.prefix) else key
            by_site.setdefault(site, {})[name] = tensors[key]
        for site, parts in (by_site or {"": {}}).items():
            check_parts(f"{directory}, site {site}", forms, parts)
        return by_site


@dataclass(frozen=True)
class OwnFiles(AdapterFiles):
    """A format of one's own: a JSON file and a safetensors file.

    The configuration has a version, the base's id, and each of `settings`, which are types as
    pydantic reads them; all modules of an expert share them.
    """

    def read_config(self, directory: Path) -> JsonObject:
        return dict(read_json(directory / self.config, self.content))

    @cached_property
    def content(self) -> type[BaseModel]:
        types = {self.version_key: Literal[1], self.base_key: str, **self.settings}
        required: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
        return create_model("Config", __config__={"extra": "forbid"}, **required)


# What is wrong with tensors.


def read_tensors(path: Path, hint: str = "") -> TensorFile:
    """Every tensor of a safetensors file, mapped, all finite; else ExpertError."""
    tensors = TensorFile(path, hint)
    tensors.check_finite()
    return tensors


def check_parts(
    where: str,
    forms: Mapping[str, Sequence[str | int]],
    tensors: Tensors,
    types: tuple[torch.dtype, ...] = FLOATS,
    others: Mapping[str, tuple[torch.dtype, ...]] | None = None,
) -> dict[str | int, int]:
    """The sizes by letter of `tensors`; ExpertError unless they are those of `forms` and fit.

    A form has a letter for each size, or the size itself. `types` are allowed, but for `others`.
    """
    sizes: dict[str | int, int] = {}
    for name in dict.fromkeys((*tensors, *forms)):
        tensor = tensors.get(name)
        form = forms.get(name, ())
        allowed = (others or {}).get(name, types)
        got = "missing"
        shape = dtype = None
        if tensor is not None:
            shape = tuple(tensor.shape)
            dtype = tensor.dtype
            got = f"{shape} {dtype}"
            for letter, size in zip(form, shape, strict=False):
                if not isinstance(letter, int):
                    sizes.setdefault(letter, size)
        expected = tuple(sizes.get(letter, letter) for letter in form)
        is_allowed = name in forms and dtype in allowed
        if not is_allowed or shape != expected or 0 in expected:
            want = "no such tensor"
            if form:
                want = f"({', '.join(map(str, expected))}) {' or '.join(map(str, allowed))}"
            raise ExpertError(f"{where}: {one_line(name, 200)} is {got}; wanted {want}.")
    return sizes
