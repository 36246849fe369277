"""Experts, and pools of them: adapters on disk with their gates and statistics.

adapter_files.py  an adapter's two files, PEFT's or of a format of one's own
module.py         what one expert does at one site
alone.py          one expert on its base, trained or new
stack.py          many experts at one site; sums.py  over those that each token chose
lora.py (and DoRA), ia3.py, bottleneck.py  the kinds
expert.py         the expert directory, and its model card
statistics.py     what it shares of how a reader reads its prompts
importing.py      experts made of other people's adapters
hub.py            experts on the Hugging Face Hub
pool.py           many experts of one base

Here is every kind of expert as one record, which says where its code is. Reading these loads no
torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import IA3, Bottleneck, Dora, Lora, Peft
from ..entry_points import add_entry_points

if TYPE_CHECKING:
    from .alone import NewModules
    from .module import SiteModule
    from .stack import Part

Class = TypeVar("Class")
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
    module: str | type[SiteModule]
    training: str | type[NewModules[Any]]
    parts: tuple[str | type[Part], ...]
    peft_type: str | None = None

    @cached_property
    def site_module(self) -> type[SiteModule]:
        return _class(self.module)

    @property
    def new_modules(self) -> NewModules[Any]:
        return _class(self.training)()

    @cached_property
    def stacked(self) -> tuple[type[Part], ...]:
        return tuple(map(_class, self.parts))


def _class(place: str | type[Class]) -> type[Class]:
    if isinstance(place, str):
        named: type[Class] = pkgutil.resolve_name(place)
        return named
    return place


_OURS = (
    Kind(
        "lora",
        "LoRA",
        Lora,
        module="phatgoose.experts.lora:LoraFactors",
        training="phatgoose.experts.lora:NewLoras",
        parts=("phatgoose.experts.lora:LoraStack",),
        peft_type="LORA",
    ),
    Kind(
        "ia3",
        "(IA)³",
        IA3,
        module="phatgoose.experts.ia3:ScalingVector",
        training="phatgoose.experts.ia3:NewScalings",
        parts=("phatgoose.experts.ia3:InputScalingStack", "phatgoose.experts.ia3:ScalingStack"),
        peft_type="IA3",
    ),
    Kind(
        "bottleneck",
        "bottleneck",
        Bottleneck,
        module="phatgoose.experts.bottleneck:BottleneckLayers",
        training="phatgoose.experts.bottleneck:NewBottlenecks",
        parts=("phatgoose.experts.bottleneck:BottleneckStack",),
    ),
    Kind(
        "dora",
        "DoRA",
        Dora,
        module="phatgoose.experts.lora:DoraFactors",
        training="phatgoose.experts.lora:NewDoras",
        parts=("phatgoose.experts.lora:DoraStack",),
    ),
)
KINDS = {kind.name: kind for kind in _OURS}


@cache
def kinds() -> Mapping[str, Kind]:
    """Every kind by name: ours, those put into KINDS, those of other packages' entry points."""
    add_entry_points(GROUP, KINDS, Kind)
    return KINDS


def kind_for(settings: Peft) -> Kind:
    """The kind of a new expert with these settings."""
    by_class = {kind.settings: kind for kind in kinds().values()}
    return by_class[type(settings)]
