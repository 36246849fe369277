"""Pools of random experts of a real size, for measurements: the numbers in them mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from phatgoose.base import Base
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.kind import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from phatgoose.sites import find_sites


def random_pool(base: Base, folder: Path, experts: int, rank: int = 16) -> Pool:
    """A pool of `experts` LoRAs at all sites of `base`, in its dtype, with gates and means.

    Those that `folder` holds already are used again.
    """
    missing = [z for z in range(experts) if not (folder / f"e{z:04}" / LAYOUT.info).is_file()]
    for z in tqdm(missing, desc="random experts", disable=None):
        _write(base, folder / f"e{z:04}", rank, seed=z)
    return Pool.open([folder / f"e{z:04}" for z in range(experts)])


def _write(base: Base, place: Path, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(base.model)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {}
    for site in sites.values():
        prefix = f"base_model.model.{site.name}"
        tensors[f"{prefix}.lora_A.weight"] = normal(rank, site.in_features)
        tensors[f"{prefix}.lora_B.weight"] = 0.1 * normal(site.out_features, rank)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.reference.id,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in sites}),
        "bias": "none",
    }
    adapter = place.with_name(f".{place.name}.adapter")
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(
        {name: tensor.to(base.model.dtype) for name, tensor in tensors.items()},
        adapter / ADAPTER_WEIGHTS,
    )
    gates = {site.name: normal(site.in_features) for site in sites.values()}
    means = {site.name: normal(site.in_features) for site in sites.values()}
    Expert.from_peft(adapter, gates, base=base, name=place.name, means=means).save(place)
    for file in adapter.iterdir():
        file.unlink()
    adapter.rmdir()
