"""Experts about to be trained: a base with new modules at its sites, of any of the three kinds.

LoRA and (IA)³ are PEFT's, bottleneck adapters our own layers. All start as the identity. The only
parameters that want gradients are the expert's (and its gates', in joint training), float32 master
copies that are cast in the forward pass, so that nothing of the base path is upcast (PEFT's default
casts every activation up; docs/design.md has the speeds). LoRAs and bottleneck adapters are saved
in the base's dtype: exactly the numbers that were validated. (IA)³ vectors stay float32, in use and
on disk: bfloat16 has steps of 1/128 around 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.ia3 import Linear as PeftScaling
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...base.loading import Base
from ...base.sites import Site, WrappedLinear, replace_module
from ...config import IA3, Bottleneck, Lora, Peft
from ...experts.kinds.bottleneck import BottleneckLayers, write_bottleneck
from ...experts.kinds.ia3 import ScalingVector
from ..gates import openness
from .placement import placed_sites, scales_input

__all__ = ["FreshExpert", "fresh_expert"]

ADAPTER = "default"


@dataclass(frozen=True)
class FreshExpert:
    """An expert in the making: `model` is trained, then its files are written.

    `take_gates` gives jointly trained gates by site and takes them out of the model; `save`, which
    comes last, writes the adapter's files to a folder.
    """

    model: nn.Module
    take_gates: Callable[[], dict[str, Tensor]]
    save: Callable[[Path], None]


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a fresh expert of the shape `peft` on it while the context is open.

    `joint` puts a gate, zeros at the start, before each module. Raises ConfigError when no site
    matches.
    """
    sites = placed_sites(base.model, peft)
    if isinstance(peft, Lora):
        return _fresh_lora(base, peft, sites, joint=joint)
    if isinstance(peft, IA3):
        return _fresh_ia3(base, peft, sites, joint=joint)
    return _fresh_bottleneck(base, peft, sites, joint=joint)


class _MasterLinear(nn.Linear):
    """A linear layer whose float32 weight is cast to the dtype of its input."""

    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))


class _GatedMasterLinear(_MasterLinear):
    """A LoRA's A whose output passes the module's gate v, zeros at the start (joint training).

    PEFT then computes `W u + scale * B A u * sigmoid(v . u)`, since the sigmoid is one number a
    token: B (A u * sigmoid) is B A u * sigmoid.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.gate = nn.Parameter(torch.zeros(in_features, device=device))

    def forward(self, u: Tensor) -> Tensor:
        return openness(u, self.gate) * super().forward(u)


class _GatedScaling(PeftScaling):  # type: ignore[misc]  # peft is untyped
    """PEFT's (IA)³ layer whose distance from 1 passes the module's gate (joint training)."""

    gate: nn.Parameter

    def forward(self, u: Tensor) -> Tensor:
        module = ScalingVector(self.ia3_l[ADAPTER].flatten(), self.is_feedforward)
        return module.apply(self.base_layer, u, openness(u, self.gate))


class _BottleneckLinear(WrappedLinear):
    """A linear layer with a bottleneck adapter in training, behind a gate if `joint`."""

    def __init__(self, base: nn.Module, site: Site, shape: Bottleneck, *, joint: bool) -> None:
        super().__init__(base, site.in_features, site.out_features)
        self.activation, self.scale = shape.activation, shape.scale
        d, m = site.out_features, shape.size
        self.down = nn.Parameter(torch.zeros(m, d))
        self.down_bias = nn.Parameter(torch.zeros(m))
        self.up = nn.Parameter(torch.zeros(d, m))
        self.up_bias = nn.Parameter(torch.zeros(d))
        nn.init.normal_(self.down, std=shape.init_std)
        if joint:
            self.gate = nn.Parameter(torch.zeros(site.in_features))
        self.joint = joint
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter.to(self.weight.device)))

    def layers(self, dtype: torch.dtype) -> BottleneckLayers:
        """The adapter as it is now, in `dtype`."""
        down, down_bias = self.down.to(dtype), self.down_bias.to(dtype)
        up, up_bias = self.up.to(dtype), self.up_bias.to(dtype)
        return BottleneckLayers(down, down_bias, up, up_bias, self.activation, self.scale)

    def forward(self, u: Tensor) -> Tensor:
        strength = openness(u, self.gate) if self.joint else 1.0
        return self.layers(u.dtype).apply(self.base, u, self.scale * strength)


@contextmanager
def _fresh_lora(
    base: Base, lora: Lora, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    config = LoraConfig(
        task_type=_task_type(base),
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        target_modules=list(sites),
        fan_in_fan_out=_is_conv(base, sites),
        revision=base.revision,
    )
    with _under_peft(base, config) as model:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _use_master_copies(layer, lora.init_std, joint=joint)

        def take_gates() -> dict[str, Tensor]:
            owners = {site: base.model.get_submodule(site).lora_A[ADAPTER] for site in sites}
            return _take_gates(owners)

        yield FreshExpert(model, take_gates, lambda folder: _save(model, base, folder))


@contextmanager
def _fresh_ia3(
    base: Base, ia3: IA3, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    inputs = scales_input(base.model, ia3, sites)
    config = IA3Config(
        task_type=_task_type(base),
        target_modules=list(sites),
        feedforward_modules=sorted(inputs),
        fan_in_fan_out=_is_conv(base, sites),
        revision=base.revision,
    )
    with _under_peft(base, config) as model:
        layers = {site: base.model.get_submodule(site) for site in sites}
        for site, layer in layers.items():
            if joint:
                layer.__class__ = _GatedScaling
                zeros = torch.zeros(sites[site].in_features, device=layer.weight.device)
                layer.gate = nn.Parameter(zeros)
        # PEFT shortens long lists of targets, but then misses the feed-forward's among them; and
        # it writes sets in any order.
        model.peft_config[ADAPTER].target_modules = sorted(sites)
        model.peft_config[ADAPTER].feedforward_modules = sorted(inputs)
        yield FreshExpert(
            model,
            lambda: _take_gates(layers),
            lambda folder: _save(model, base, folder, dtype=torch.float32),
        )


@contextmanager
def _fresh_bottleneck(
    base: Base, shape: Bottleneck, sites: dict[str, Site], *, joint: bool
) -> Iterator[FreshExpert]:
    originals = {site: base.model.get_submodule(site) for site in sites}
    base.model.requires_grad_(False)
    layers = {
        site: _BottleneckLinear(originals[site], sites[site], shape, joint=joint) for site in sites
    }

    def save(folder: Path) -> None:
        dtype = base.model.dtype
        trained = {site: layer.layers(dtype) for site, layer in layers.items()}
        write_bottleneck(folder, trained, {"base": base.id})

    try:
        for site, layer in layers.items():
            replace_module(base.model, site, layer)
        yield FreshExpert(base.model, lambda: _take_gates(layers), save)
    finally:
        for site, original in originals.items():
            replace_module(base.model, site, original)


@contextmanager
def _under_peft(base: Base, config: PeftConfig) -> Iterator[PeftModel]:
    """The base as PEFT's model with a fresh adapter of this `config`, while the context is open."""
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()


def _use_master_copies(layer: LoraLayer, init_std: float, *, joint: bool) -> None:
    """Float32 A ~ N(0, init_std^2) and B = 0 that are cast in the forward pass, not the input."""
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        plain = factors[ADAPTER]
        shape, device = (plain.in_features, plain.out_features), plain.weight.device
        master = (
            _GatedMasterLinear(*shape, device)
            if joint and factors is layer.lora_A
            else _MasterLinear(*shape, bias=False, device="meta")
        )
        master.weight = nn.Parameter(plain.weight.detach().float())
        factors[ADAPTER] = master
    nn.init.normal_(layer.lora_A[ADAPTER].weight, std=init_std)
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


def _take_gates(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The gates of the layers in `owners`, by site; PEFT would save those that stayed."""
    gates = {}
    for site, owner in owners.items():
        gate: Tensor = owner.gate  # type: ignore[assignment]
        gates[site] = gate.detach().cpu()
        del owner.gate
    return gates


def _save(model: PeftModel, base: Base, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """PEFT's files of the adapter, in the base's dtype unless another is said."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype or base.model.dtype)
    model.peft_config[ADAPTER].base_model_name_or_path = base.id
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the expert has its own


def _task_type(base: Base) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM


def _is_conv(base: Base, sites: dict[str, Site]) -> bool:
    return isinstance(base.model.get_submodule(next(iter(sites))), Conv1D)
