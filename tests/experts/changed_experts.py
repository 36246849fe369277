"""Adapters and experts on disk, made and changed."""

import json
from pathlib import Path
from typing import Any

import torch

from odd_files import rewrite
from phatgoose.experts.adapter_files import ADAPTER_CONFIG
from phatgoose.experts.expert import Expert
from tiny import TINY_BASE

SITE = "model.layers.0.self_attn.q_proj"
QUERY, DOWN = SITE, "model.layers.0.mlp.down_proj"  # of the golden experts


def vectors_for(adapter: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((adapter / "adapter_config.json").read_text())
    sizes = {site: 48 if site.endswith("down_proj") else 32 for site in config["target_modules"]}
    return {site: torch.randn(n, generator=generator) for site, n in sorted(sizes.items())}


def make(adapter: Path, **options: Any) -> Expert:
    return Expert.from_peft(
        adapter, **{"gates": vectors_for(adapter, 1), "base": TINY_BASE, **options}
    )


def set_config(adapter: Path, **values: object) -> None:
    rewrite(adapter / ADAPTER_CONFIG, **values)
