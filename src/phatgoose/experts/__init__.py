"""Experts, and pools of them: adapters on disk with their gates and statistics.

kind.py        what each kind has: modules at sites, files, new modules, a stack of many
lora.py (and DoRA), ia3.py, bottleneck.py
expert.py      the expert directory, and its model card
statistics.py  what it shares of how the base reads its prompts
importing.py   experts made of other people's adapters
hub.py         experts on the Hugging Face Hub
pool.py        many experts of one base

Here is every kind of expert as one record, which says where its code is. Reading these loads no
torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from ..config import IA3, Bottleneck, Dora, Lora, Peft
from ..files import add_entry_points

if TYPE_CHECKING:
    from .kind import NewModules, Part, SiteModule

GROUP = "phatgoose.kinds"  # of entry points, each of which is a Kind


@dataclass(frozen=True)
class Kind:
    """A kind of expert (docs/extending.md).

    `name` stands in recipes, files and on the command line; `label` is for people. `settings` are
    those of a new expert. `module` is its `SiteModule`, `training` its `NewModules` and `parts` its
    `Part`s, most often one: classes, or "module:Class", which is imported when it is used.
    `peft_type` is PEFT's name for a kind in PEFT's files.
    """

    name: str
    label: str
    settings: type[Peft]
    module: str | type[Any]
    training: str | type[Any]
    parts: tuple[str | type[Any], ...]
    peft_type: str | None = None

    @cached_property
    def site_module(self) -> type[SiteModule]:
        return _class(self.module)

    @property
    def new_modules(self) -> NewModules:
        modules: NewModules = _class(self.training)()
        return modules

    @cached_property
    def stacked(self) -> tuple[type[Part], ...]:
        return tuple(map(_class, self.parts))


def _class(place: str | type[Any]) -> type[Any]:
    named: type[Any] = pkgutil.resolve_name(place) if isinstance(place, str) else place
    return named


def _of_ours(settings: type[Peft], label: str, places: str, peft_type: str | None = None) -> Kind:
    file, *classes = places.split()
    module, training, *parts = (f"{__name__}.{file}:{each}" for each in classes)
    return Kind(
        settings.__name__.lower(), label, settings, module, training, tuple(parts), peft_type
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _of_ours(Lora, "LoRA", "lora LoraFactors NewLoras LoraStack", "LORA"),
        _of_ours(
            IA3, "(IA)³", "ia3 ScalingVector NewScalings InputScalingStack ScalingStack", "IA3"
        ),
        _of_ours(
            Bottleneck, "bottleneck", "bottleneck BottleneckLayers NewBottlenecks BottleneckStack"
        ),
        _of_ours(Dora, "DoRA", "lora DoraFactors NewDoras DoraStack"),
    )
}


@cache
def kinds() -> Mapping[str, Kind]:
    """Every kind by name: ours, those put into KINDS, those of other packages' entry points."""
    add_entry_points(GROUP, KINDS, Kind)
    return KINDS


def kind_for(settings: Peft) -> Kind:
    """The kind of a new expert with these settings."""
    by_class: dict[type[Peft], Kind] = {kind.settings: kind for kind in kinds().values()}
    return by_class[type(settings)]
