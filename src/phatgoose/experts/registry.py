"""The registry: every kind of expert as one record, which says where its code is.

Reading the records loads no torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..config import IA3, Bottleneck, Dora, Lora, Peft
from ..errors import ConfigError
from ..files import add_entry_points

if TYPE_CHECKING:
    from .kind import NewModules, Part, SiteModule

GROUP = "phatgoose.kinds"  # of entry points, each of which is a Kind


@dataclass(frozen=True)
class Kind:
    """A kind of expert (docs/extending.md).

    `name` stands in recipes, files and on the command line; `label` is for people, and `title`
    begins the model card. `settings` are those of a new expert. `module` is its `SiteModule`,
    `training` its `NewModules` and `parts` its `Part`s, most often one: classes, or "module:Class",
    which is imported when it is used. `peft_type` is PEFT's name for a kind in PEFT's files.
    """

    name: str
    label: str
    title: str
    settings: type[Peft]
    module: str | type[Any]
    training: str | type[Any]
    parts: tuple[str | type[Any], ...]
    peft_type: str | None = None

    @property
    def site_module(self) -> type[SiteModule]:
        return _class(self.module)

    @property
    def new_modules(self) -> NewModules:
        made: NewModules = _class(self.training)()
        return made

    @property
    def holds_invocation(self) -> bool:
        """Whether its adapter's own file can say from which tokens on it acts, as an aLoRA's."""
        return self.peft_type == "LORA"

    @property
    def stacked(self) -> tuple[type[Part], ...]:
        return tuple(map(_class, self.parts))


def _class(place: str | type[Any]) -> type[Any]:
    found: type[Any] = pkgutil.resolve_name(place) if isinstance(place, str) else place
    return found


HERE = "phatgoose.experts"

KINDS: dict[str, Kind] = {
    "lora": Kind(
        *("lora", "LoRA", "A LoRA", Lora),
        *(f"{HERE}.lora:LoraFactors", f"{HERE}.lora:NewLoras", (f"{HERE}.lora:LoraStack",)),
        peft_type="LORA",
    ),
    "ia3": Kind(
        *("ia3", "(IA)³", "An (IA)³", IA3),
        *(f"{HERE}.ia3:ScalingVector", f"{HERE}.ia3:NewScalings"),
        (f"{HERE}.ia3:InputScalingStack", f"{HERE}.ia3:OutputScalingStack"),
        peft_type="IA3",
    ),
    "bottleneck": Kind(
        *("bottleneck", "bottleneck", "A bottleneck-adapter", Bottleneck),
        *(f"{HERE}.bottleneck:BottleneckLayers", f"{HERE}.bottleneck:NewBottlenecks"),
        (f"{HERE}.bottleneck:BottleneckStack",),
    ),
    "dora": Kind(
        *("dora", "DoRA", "A DoRA", Dora),
        *(f"{HERE}.dora:DoraFactors", f"{HERE}.dora:NewDoras", (f"{HERE}.dora:DoraStack",)),
    ),
}


def kinds() -> Mapping[str, Kind]:
    """Every kind by name: ours, those put into KINDS, those of other packages' entry points."""
    _add_others()
    return KINDS


@cache
def _add_others() -> None:
    add_entry_points(GROUP, KINDS, Kind)


def kind_for(settings: Peft) -> Kind:
    """The kind of a new expert with these settings. Raises ConfigError where they are none."""
    by_class: dict[Any, Kind] = {kind.settings: kind for kind in reversed(list(kinds().values()))}
    for each in type(settings).__mro__:  # settings may extend those of another kind
        if each in by_class:
            return by_class[each]
    raise ConfigError(f"peft is {settings!r:.60}, but must be settings of a kind of expert.")
