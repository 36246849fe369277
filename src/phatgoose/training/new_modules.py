"""New modules: a base with untrained modules at the sites of an expert, by kind.

An expert about to be trained: a base with new modules at the expert's sites.

All start as the identity. Only parameters of the expert (and of its gates, in joint training) want
gradients. They are float32 master copies that are cast in the forward pass, so that nothing of the
base path is upcast. (PEFT's default casts every activation up; docs/design.md has the speeds.)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.ia3 import Linear as PeftScaling
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as IA3_FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.loading import Base
from ..base.sites import Site, WrappedLinear, find_sites
from ..config import IA3, Bottleneck, Lora, Peft
from ..errors import ConfigError
from ..experts.adapter import kind_for, replaced
from ..experts.kinds.bottleneck import BottleneckLayers, write_bottleneck
from ..experts.kinds.ia3 import ScalingVector
from ..experts.kinds.lora import plus_product
from ..experts.kinds.peft import ADAPTER
from .gates import new_gate, openness


@dataclass(frozen=True)
class FreshExpert:
    """An expert in training: `model` is trained, then `save` writes its files to a folder.

    `parts` are the modules by site that hold joint gates, which have to be taken before saving.
    """

    model: nn.Module
    parts: Mapping[str, nn.Module]
    save: Callable[[Path], None]


@dataclass(frozen=True)
class NewModules:
    """How new modules of one kind are made.

    `default_sites` is the pattern of sites of a model for settings that name none, None for all
    sites; `count` the number of trained parameters at some sites, without gates; `create` a context
    in which a base holds the modules. `dtype` is the type they are stored in, None for the base's.
    """

    default_sites: Callable[[PreTrainedModel, Any], str | None]
    count: Callable[[PreTrainedModel, Any, Iterable[Site]], int]
    create: Callable[..., AbstractContextManager[FreshExpert]]
    dtype: torch.dtype | None = None


def peft_options(base: Base, sites: dict[str, Site]) -> dict[str, Any]:
    """What the configurations of all of PEFT's adapters say of the base and these sites of it."""
    first = base.model.get_submodule(next(iter(sites)))
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        "target_modules": list(sites),
        "fan_in_fan_out": isinstance(first, Conv1D),
        "revision": base.revision,
    }


@contextmanager
def under_peft(base: Base, config: PeftConfig) -> Iterator[PeftModel]:
    """The base as PEFT's model with a fresh adapter of this `config`, while the context is open."""
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; a user can't act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()


def save_peft(model: PeftModel, base: Base, folder: Path, dtype: torch.dtype) -> None:
    """Write PEFT's files of the adapter in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.peft_config[ADAPTER].base_model_name_or_path = base.id
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the expert has its own


# -------------------------------------------------------------------------------------------------
# New LoRAs, as PEFT makes them, at every site (paper section 3).
#
# They are saved in the base's dtype: exactly the numbers that were validated.
# -------------------------------------------------------------------------------------------------


def count_lora(model: PreTrainedModel, lora: Lora, sites: Iterable[Site]) -> int:
    """The number of trained parameters at `sites`: those of A and B."""
    return sum(lora.rank * (site.in_features + site.out_features) for site in sites)


@contextmanager
def new_lora(
    base: Base, lora: Lora, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    """`base` with new LoRAs at `sites` while the context is open."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        **peft_options(base, sites),
    )
    with under_peft(base, config) as model:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _use_master_copies(layer, lora.init_std, joint=joint)
        parts = {site: base.model.get_submodule(site).lora_A[ADAPTER] for site in sites}
        yield FreshExpert(
            model, parts, lambda folder: save_peft(model, base, folder, base.model.dtype)
        )


class _MasterLinear(nn.Linear):
    """A linear layer whose float32 weight is cast to the dtype of its input."""

    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))


class _JointlyGatedLinear(_MasterLinear):
    """A LoRA's A whose output passes the module's joint gate.

    PEFT then computes `W u + scale * B A u * sigmoid(v . u)`, since the sigmoid is one number a
    token: B (A u * sigmoid) is B A u * sigmoid.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.gate = new_gate(in_features, device)

    def forward(self, u: Tensor) -> Tensor:
        return openness(u, self.gate) * super().forward(u)


class _AddedInOneCall(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """PEFT's LoRA, whose update is scaled where it is small and added by the product itself.

    PEFT's own sum goes three more times over the output, and as often again in the backward pass.
    """

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """`result` [.., d] of the base plus scale * B A x, for x [.., n]."""
        h = module.scaling[active_adapter] * module.lora_A[active_adapter](x)
        return plus_product(result, h, module.lora_B[active_adapter].weight.to(x.dtype))


def _use_master_copies(layer: LoraLayer, init_std: float, *, joint: bool) -> None:
    """Float32 A ~ N(0, init_std^2) and B = 0 that are cast in the forward pass, not the input."""
    layer.cast_input_dtype_enabled = False
    layer.lora_variant[ADAPTER] = _AddedInOneCall
    for factors in (layer.lora_A, layer.lora_B):
        plain = factors[ADAPTER]
        shape, device = (plain.in_features, plain.out_features), plain.weight.device
        master = (
            _JointlyGatedLinear(*shape, device)
            if joint and factors is layer.lora_A
            else _MasterLinear(*shape, bias=False, device="meta")
        )
        master.weight = nn.Parameter(plain.weight.detach().float())
        factors[ADAPTER] = master
    nn.init.normal_(layer.lora_A[ADAPTER].weight, std=init_std)
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


# -------------------------------------------------------------------------------------------------
# New (IA)³ vectors, as PEFT makes them, where it puts them in models of the base's type.
#
# By default these are keys, values, and the input of the feed-forward network's last linear layer
# (Liu et al. 2022). Vectors stay float32, in use and on disk: bfloat16 has steps of 1/128 around
# 1.
# -------------------------------------------------------------------------------------------------


def ia3_sites(model: PreTrainedModel, ia3: IA3) -> str:
    """A pattern for the sites that PEFT adapts in models of this type.

    Raises ConfigError when PEFT doesn't know the type.
    """
    return _endings(_known(IA3_MODULES, model))


def scales_input(model: PreTrainedModel, ia3: IA3, sites: Iterable[str]) -> set[str]:
    """Those of `sites` whose input is scaled; the others' output is.

    Raises ConfigError when `ia3.feedforward` is no regular expression, or None and PEFT doesn't
    know the model's type.
    """
    pattern = ia3.feedforward
    if pattern is None:
        pattern = _endings(_known(IA3_FEEDFORWARD, model))
    try:
        matches = re.compile(pattern).search
    except re.error as error:
        raise ConfigError(
            f"feedforward is {pattern!r}, not a regular expression: {error}."
        ) from error
    return {site for site in sites if matches(site)}


def count_ia3(model: PreTrainedModel, ia3: IA3, sites: Iterable[Site]) -> int:
    """The number of trained parameters at `sites`: those of one vector each."""
    sites = list(sites)
    inputs = scales_input(model, ia3, [site.name for site in sites])
    return sum(s.in_features if s.name in inputs else s.out_features for s in sites)


@contextmanager
def new_ia3(base: Base, ia3: IA3, sites: dict[str, Site], *, joint: bool) -> Iterator[FreshExpert]:
    """`base` with new (IA)³ vectors at `sites` while the context is open."""
    inputs = sorted(scales_input(base.model, ia3, sites))
    config = IA3Config(feedforward_modules=inputs, **peft_options(base, sites))
    with under_peft(base, config) as model:
        layers = {site: base.model.get_submodule(site) for site in sites}
        for site, layer in layers.items() if joint else ():
            layer.__class__ = _JointlyGatedScaling
            layer.gate = new_gate(sites[site].in_features, layer.weight.device)
        # PEFT shortens long lists of targets, but then misses the feed-forward's among them; and
        # it writes sets in any order.
        model.peft_config[ADAPTER].target_modules = sorted(sites)
        model.peft_config[ADAPTER].feedforward_modules = inputs
        yield FreshExpert(
            model, layers, lambda folder: save_peft(model, base, folder, torch.float32)
        )


class _JointlyGatedScaling(PeftScaling):  # type: ignore[misc]  # peft is untyped
    """PEFT's (IA)³ layer whose distance from 1 passes the module's joint gate."""

    gate: nn.Parameter

    def forward(self, u: Tensor) -> Tensor:
        module = ScalingVector(self.ia3_l[ADAPTER].flatten(), self.is_feedforward)
        return module.apply(self.base_layer, u, openness(u, self.gate))


def _known(mapping: dict[str, list[str]], model: PreTrainedModel) -> list[str]:
    """PEFT's names of layers for models of this type. Raises ConfigError when it has none."""
    kind = model.config.model_type
    if kind not in mapping:
        raise ConfigError(
            f"Where an (IA)³ belongs in a model of type {kind} isn't known to PEFT; name the "
            f"layers with sites and feedforward."
        )
    return mapping[kind]


def _endings(names: list[str]) -> str:
    """A pattern for sites that end in one of `names`; for no site when there are none."""
    return rf"(^|\.)({'|'.join(map(re.escape, names))})$" if names else r"(?!)"


# -------------------------------------------------------------------------------------------------
# New bottleneck adapters, layers of our own, before the residual is added.
#
# They stand on the output of attention's and of the feed-forward network's last linear layer
# (Houlsby et al. 2019), or of the latter alone (Pfeiffer et al. 2021). They are saved in the
# base's dtype: exactly the numbers that were validated.
# -------------------------------------------------------------------------------------------------

# The last linear layers of attention and of feed-forward networks, by their names in transformers.
ATTENTION_OUTPUT = r"(?i:[^.]*att[^.]*)\.(o|o_proj|out_proj|c_proj|dense)$"
FEEDFORWARD_OUTPUT = r"\.(wo|down_proj|fc2|fc_out|dense_4h_to_h|w2)$|\bmlp\.c_proj$"
OUTPUTS = {  # patterns of sites by placement
    "houlsby": f"{ATTENTION_OUTPUT}|{FEEDFORWARD_OUTPUT}",
    "pfeiffer": FEEDFORWARD_OUTPUT,
}


def count_bottleneck(model: PreTrainedModel, bottleneck: Bottleneck, sites: Iterable[Site]) -> int:
    """The number of trained parameters at `sites`: those of two layers with biases each."""
    size = bottleneck.size
    return sum((2 * size + 1) * site.out_features + size for site in sites)


@contextmanager
def new_bottleneck(
    base: Base, bottleneck: Bottleneck, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    """`base` with new bottleneck adapters at `sites` while the context is open."""
    base.model.requires_grad_(False)
    layers = {
        name: _BottleneckLinear(base.model.get_submodule(name), site, bottleneck, joint=joint)
        for name, site in sites.items()
    }

    def save(folder: Path) -> None:
        trained = {site: layer.layers(base.model.dtype) for site, layer in layers.items()}
        write_bottleneck(folder, trained, {"base": base.id})

    with replaced(base.model, layers):
        yield FreshExpert(base.model, layers, save)


class _BottleneckLinear(WrappedLinear):
    """A linear layer with a bottleneck adapter in training, behind a joint gate if `joint`."""

    def __init__(self, base: nn.Module, site: Site, shape: Bottleneck, *, joint: bool) -> None:
        super().__init__(base, site.in_features, site.out_features)
        self.activation, self.scale = shape.activation, shape.scale
        d, m, device = site.out_features, shape.size, self.weight.device
        down = torch.zeros(m, d)
        nn.init.normal_(down, std=shape.init_std)  # drawn on the CPU: the same on every device
        self.down = nn.Parameter(down.to(device))
        self.down_bias = nn.Parameter(torch.zeros(m, device=device))
        self.up = nn.Parameter(torch.zeros(d, m, device=device))
        self.up_bias = nn.Parameter(torch.zeros(d, device=device))
        self.gate = new_gate(site.in_features, device) if joint else None

    def layers(self, dtype: torch.dtype) -> BottleneckLayers:
        """The adapter as it is now, in `dtype`."""
        down, down_bias = self.down.to(dtype), self.down_bias.to(dtype)
        up, up_bias = self.up.to(dtype), self.up_bias.to(dtype)
        return BottleneckLayers(down, down_bias, up, up_bias, self.activation, self.scale)

    def forward(self, u: Tensor) -> Tensor:
        strength = 1.0 if self.gate is None else openness(u, self.gate)
        return self.layers(u.dtype).apply(self.base, u, self.scale * strength)


# -------------------------------------------------------------------------------------------------
# New experts of every kind: the sites and the number of their modules, and the modules.
# -------------------------------------------------------------------------------------------------

# By the names of `experts.adapter.KINDS`; a new kind is added here.
NEW_MODULES: dict[str, NewModules] = {
    "lora": NewModules(lambda model, lora: None, count_lora, new_lora),
    "ia3": NewModules(ia3_sites, count_ia3, new_ia3, torch.float32),
    "bottleneck": NewModules(
        lambda model, shape: OUTPUTS[shape.placement], count_bottleneck, new_bottleneck
    ),
}


def modules_for(peft: Peft) -> NewModules:
    """How new modules with these settings are made."""
    return NEW_MODULES[kind_for(peft).name]


def placed_sites(model: PreTrainedModel, peft: Peft) -> dict[str, Site]:
    """The sites of `model` at which a new expert with these settings acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None.
    """
    pattern = peft.sites
    if pattern is not None:
        return find_sites(model, pattern)
    pattern = modules_for(peft).default_sites(model, peft)
    try:
        return find_sites(model, pattern)
    except ConfigError as error:
        if pattern is None:
            raise
        raise ConfigError(
            f"Where to place it in {type(model).__name__} isn't known; name the layers with sites."
        ) from error


def parameters_at(model: PreTrainedModel, peft: Peft) -> int:
    """The number of trained parameters of a new expert on `model`, without gates.

    Raises ConfigError as `placed_sites` does.
    """
    return modules_for(peft).count(model, peft, placed_sites(model, peft).values())


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open.

    `joint` puts a gate before each module. Raises ConfigError as `placed_sites` does.
    """
    return modules_for(peft).create(base, peft, placed_sites(base.model, peft), joint=joint)
