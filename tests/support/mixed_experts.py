"""Random experts of every kind for the tiny bases, and their mixture written out naively."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from phatgoose.base.identity import Base
from phatgoose.config import IA3, Bottleneck
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS, PEFT_FILES
from phatgoose.experts.bottleneck import BottleneckLayers
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import ScalingVector, scales_input
from phatgoose.experts.lora import DoraFactors, Factors
from phatgoose.experts.pool import Pool
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import placed_sites
from tiny import make_adapter, write_expert

ACTIVATE = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


def make_ia3(base: Base, folder: Path, *, seed: int = 0) -> Path:
    """An (IA)³ adapter of random vectors around 1, where PEFT would put them."""
    generator, sites = torch.Generator().manual_seed(seed), placed_sites(base.model, IA3())
    inputs, vectors = scales_input(base.model, sites), {}
    for name, site in sites.items():
        size = site.in_features if name in inputs else site.out_features
        vector = 1 + torch.randn(size, generator=generator) * 0.5
        vectors[name] = ScalingVector(vector, on_input=name in inputs)
    folder.mkdir(parents=True)
    about = PEFT_FILES.about(base, base.model.get_submodule(next(iter(sites))))
    return ScalingVector.write(folder, vectors, about)


def make_bottleneck(
    base: Base, folder: Path, *, seed: int = 0, size: int = 5, scale: float = 1.5, **options: str
) -> Path:
    shape = Bottleneck(size=size, scale=scale, **options)
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator) * 0.3

    layers = {}
    for name, site in placed_sites(base.model, shape).items():
        d = site.out_features
        parts = (normal(size, d), normal(size), normal(d, size), normal(d))
        layers[name] = BottleneckLayers(*parts, shape.activation, shape.scale)
    folder.mkdir(parents=True)
    return BottleneckLayers.write(folder, layers, {"base": base.id})


def make_biased_lora(base: Base, folder: Path, *, seed: int = 0) -> Path:
    """A PEFT LoRA whose B factors have random biases (lora_bias)."""
    make_adapter(base, folder, seed=seed, lora_bias=True)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def make_dora(base: Base, folder: Path, *, seed: int = 0, rank: int = 3) -> Path:
    """A DoRA of random factors whose scales are around 1, at every site."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator) * 0.2

    modules = {
        name: DoraFactors(
            normal(rank, site.in_features),
            normal(site.out_features, rank),
            scale=1.0,
            bias=normal(site.out_features),
            output_scale=1 + normal(site.out_features),
        )
        for name, site in find_sites(base.model).items()
    }
    folder.mkdir(parents=True)
    return DoraFactors.write(folder, modules, {"base": base.id})


MAKERS = {
    "lora": make_adapter,
    "dora": make_dora,
    "biased": make_biased_lora,
    "ia3": make_ia3,
    "bottleneck": make_bottleneck,
}


def make_kind(kind: str, base: Base, folder: Path, *, seed: int = 0, **options: object) -> Expert:
    """A random expert of one of MAKERS with all statistics but embeddings, below `folder`."""
    return write_expert(base, folder, f"{kind}{seed}", seed=seed, make=MAKERS[kind], **options)


def mixed_pool_for(base: Base, folder: Path) -> Pool:
    """Eight experts of all kinds, sizes, placements and activations."""
    return Pool(
        (
            make_kind("lora", base, folder, seed=0, rank=2),
            make_kind("biased", base, folder, seed=1),
            make_kind("ia3", base, folder, seed=2),
            make_kind("bottleneck", base, folder, seed=3),
            make_kind("bottleneck", base, folder, seed=4, size=3, activation="gelu"),
            make_kind("bottleneck", base, folder, seed=5, placement="pfeiffer", scale=0.7),
            make_kind("ia3", base, folder, seed=6),
            make_kind("lora", base, folder, seed=7, rank=6),
        )
    )


def linear(layer: nn.Module, u: Tensor) -> Tensor:
    """What the plain linear layer makes of one token u [n], float64."""
    weight = layer.weight.double()
    weight = weight if isinstance(layer, Conv1D) else weight.T
    return u @ weight + (0 if layer.bias is None else layer.bias.double())


def mixed_output(
    layer: nn.Module, u: Tensor, experts: Sequence[Expert], weights: dict[int, float], site: str
) -> Tensor:
    """One token's output [d] under weighted experts of any kinds, one after the other, float64."""
    u = u.double()
    chosen = [(w, experts[z].modules[site]) for z, w in weights.items()]
    scaled = u.clone()
    for w, module in chosen:
        if isinstance(module, ScalingVector) and module.on_input:
            scaled += w * (module.vector.double() - 1) * u
    first = linear(layer, scaled)
    y = first.clone()
    for w, module in chosen:
        if isinstance(module, ScalingVector) and not module.on_input:
            y += w * (module.vector.double() - 1) * first
        elif isinstance(module, Factors):
            bias = 0 if module.bias is None else module.bias.double()
            y += w * module.scale * (module.B.double() @ (module.A.double() @ u) + bias)
        elif isinstance(module, BottleneckLayers):
            inner = module.down.double() @ first + module.down_bias.double()
            inner = ACTIVATE[module.activation](inner)
            y += w * module.scale * (module.up.double() @ inner + module.up_bias.double())
        elif module.kind == "shift":
            y += w * module.b.double()
    return y


def ordered(pool: Pool, names: list[str]) -> Pool:
    experts = {expert.name: expert for expert in pool.experts}
    return Pool(tuple(experts[name] for name in names))


PRECISE, CPU = {"rtol": 1e-5, "atol": 1e-5}, torch.device("cpu")
