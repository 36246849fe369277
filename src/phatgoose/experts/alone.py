"""One expert alone on its base, trained or new: a layer with its module at each site.

New modules start as the identity. Only parameters of the expert (and of its gates, in joint
training) have gradients. They are float32 master copies, cast in the forward pass, so that nothing
of the base path is upcast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..base.identity import Base
from ..config import Peft
from ..sites import Sites, Tensors, WrappedLinear, dtype_at, find_sites, replaced
from ..tasks.batching import where_active
from .module import Modules, SiteModule, check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings = TypeVar("Settings", bound=Peft)


def new_gate(layer: WrappedLinear) -> nn.Parameter:
    return nn.Parameter(torch.zeros(layer.in_features, device=layer.weight.device))


def strength_at(u: Tensor, v: Tensor | None) -> Tensor | float:
    """The strength σ at each token of u [.., n]: how far its gate v [n], if any, is open.

    That is `sigmoid(v . u)`, [.., 1]; 0 at tokens that the expert doesn't act on.
    """
    if v is None:
        return where_active(1.0, u)
    opened = (u @ v.to(u.dtype)).float().sigmoid().to(u.dtype)
    return where_active(opened.unsqueeze(-1), u)


class ModifiedLinear(WrappedLinear):
    """A linear layer with one expert's module, behind a gate v that starts at zeros if `gated`.

    A LoRA's output is then `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid
    (paper section 3). A module of another kind acts at the strength of the sigmoid.
    """

    gate: nn.Parameter  # None unless `gated`

    def __init__(
        self, base: nn.Module, module: SiteModule, dtype: torch.dtype, *, gated: bool
    ) -> None:
        super().__init__(base)
        self.module = module.at(torch.empty(0, dtype=dtype, device=self.weight.device))
        self.register_parameter("gate", new_gate(self) if gated else None)

    def forward(self, u: Tensor) -> Tensor:
        return self.module.apply(self.base, u, strength_at(u, self.gate))


@contextmanager
def applied(
    model: PreTrainedModel, modules: Modules, *, gated: bool = False
) -> Iterator[dict[str, ModifiedLinear]]:
    """`model` with an expert's modules by site, `gated` or not; ExpertError if one doesn't fit."""
    check_fit("adapter", modules, find_sites(model))
    layers = {}
    for site, module in modules.items():
        layer = model.get_submodule(site)
        layers[site] = ModifiedLinear(layer, module, dtype_at(layer, model), gated=gated)
    with replaced(model, layers):
        yield layers


@dataclass(frozen=True)
class FreshExpert:
    """An expert in training: `model` is trained, then `save` writes its files to a folder.

    `parts` are what is trained, by site: a module's parameters by name, float32, and as attribute
    `gate` its joint gate or None.
    """

    model: nn.Module
    parts: Mapping[str, nn.ParameterDict]
    save: Callable[[Path], None]


class NewModules(ABC, Generic[Settings]):
    """How new modules of one kind are made and trained.

    They are stored in the type of each one's layer (`dtype_at`), but for the parameters that are
    named as `exact`, which stay float32. In training their strength passes `where_active`, so that
    an expert can act from its prompts' end on. `on_packed` says that they can be trained on
    quantised weights.
    """

    exact: ClassVar[tuple[str, ...]] = ()
    on_packed: ClassVar[bool] = True

    def default_sites(self, model: PreTrainedModel, settings: Settings) -> str | None:
        """The pattern of sites for settings that name none; None for all sites."""
        return None

    @abstractmethod
    def initial(
        self, model: PreTrainedModel, settings: Settings, sites: Sites
    ) -> Mapping[str, Tensors]:
        """The parameters at the start by site and name, float32, drawn on the CPU if at random."""

    @abstractmethod
    def module(self, settings: Settings, parameters: Tensors, layer: nn.Module) -> SiteModule:
        """The module that these parameters make on the base's linear `layer`."""

    def count(self, model: PreTrainedModel, settings: Settings, sites: Sites) -> int:
        """The number of trained parameters at `sites`, without gates."""
        with torch.device("meta"):
            initial = self.initial(model, settings, sites)
        count = 0
        for parameters in initial.values():
            count += sum(tensor.numel() for tensor in parameters.values())
        return count

    @contextmanager
    def create(
        self, base: Base, settings: Settings, sites: Sites, *, joint: bool
    ) -> Iterator[FreshExpert]:
        """A context in which `base` has new modules at `sites`, behind gates if `joint`."""
        model = base.model.requires_grad_(False)
        layers = {}
        trained = {}
        for site, parameters in self.initial(model, settings, sites).items():
            layer = _NewLayer(model.get_submodule(site), self, settings, parameters, joint=joint)
            layers[site] = layer
            trained[site] = layer.trained

        def save(folder: Path) -> None:
            modules = {}
            for site, layer in layers.items():
                modules[site] = layer.module(dtype_at(layer.base, model))
            site, first = next(iter(modules.items()))
            first.write(folder, modules, first.files.about(base, layers[site].base))

        with replaced(model, layers):
            yield FreshExpert(model, trained, save)


class _NewLayer(WrappedLinear):
    """A linear layer with a module in training, behind a joint gate if `joint`."""

    def __init__(
        self,
        base: nn.Module,
        new: NewModules[Any],
        settings: Peft,
        parameters: Tensors,
        *,
        joint: bool,
    ) -> None:
        super().__init__(base)
        self.new = new
        self.settings = settings
        self.trained = nn.ParameterDict()
        for name, tensor in parameters.items():  # by item: it would sort a dictionary
            self.trained[name] = nn.Parameter(tensor.to(self.weight.device))
        self.trained.register_parameter("gate", new_gate(self) if joint else None)

    def module(self, dtype: torch.dtype) -> SiteModule:
        parameters = {}
        for name, parameter in self.trained.items():
            parameters[name] = parameter if name in self.new.exact else parameter.to(dtype)
        return self.new.module(self.settings, parameters, self.base)

    def forward(self, u: Tensor) -> Tensor:
        module = self.module(u.dtype).at(u)
        return module.apply(self.base, u, strength_at(u, self.trained.gate))  # type: ignore[arg-type]
