"""Random experts, and tiny bases, for measurements: the numbers in them mean nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from phatgoose.base.identity import Base
from phatgoose.base.loading import load_base
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.sites import find_sites
from tiny import make_model, make_tokenizer, write_expert


def random_experts(base: Base, folder: Path, count: int, rank: int) -> list[Path]:
    """The folders of `count` LoRAs at all sites of `base`, in its dtype, with gates and means.

    Those that `folder` holds already are used again.
    """
    places = [folder / f"e{z:04}" for z in range(count)]
    missing = [z for z, place in enumerate(places) if not (place / LAYOUT.info).is_file()]
    for z in tqdm(missing, desc="random experts", disable=None):
        _write(base, places[z], rank, seed=z)
    return places


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
    shutil.rmtree(adapter)


def tiny_base(folder: Path) -> str:
    """A tiny base with random weights, in `folder`."""
    make_model("llama").save_pretrained(folder)
    make_tokenizer(final_eos=False).save_pretrained(folder)
    return str(folder)


def tiny_pool(folder: Path) -> str:
    """A pool of eight random experts on a tiny base, in `folder`."""
    base = load_base(tiny_base(folder / "base"), dtype="float32")
    for z in range(8):
        write_expert(base, folder, f"e{z}", seed=z)
    return str(folder / "experts")
