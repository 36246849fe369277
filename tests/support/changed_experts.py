"""Experts on disk, changed, and the one problem that is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from odd_files import rewrite
from phatgoose.base import BaseReference
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import LAYOUT, Expert, check_expert
from phatgoose.files import sha256_of

SITE = "model.layers.0.self_attn.q_proj"


REFERENCE = BaseReference("tiny", None, "sha256:ab")


def vectors_for(adapter: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = json.loads((adapter / "adapter_config.json").read_text())
    sizes = {site: 48 if site.endswith("down_proj") else 32 for site in config["target_modules"]}
    return {site: torch.randn(n, generator=generator) for site, n in sorted(sizes.items())}


def make(adapter: Path, **options: Any) -> Expert:
    return Expert.from_peft(
        adapter, **{"gates": vectors_for(adapter, 1), "base": REFERENCE, **options}
    )


def set_info(directory: Path, **values: object) -> None:
    rewrite(directory / LAYOUT.info, **values)


def change_tensors(
    directory: Path, file: str, key: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    """Change tensors and record their new hash, so that the hash is not what gets noticed."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)
    set_info(directory, **{key: sha256_of(directory / file)})


def change_vectors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    change_tensors(directory, LAYOUT.vectors, "vectors_sha256", change)


def problem_of(directory: Path) -> str:
    """The one problem that `check_expert` names, which `load` raises as well."""
    problems = check_expert(directory)
    assert len(problems) == 1, problems
    with pytest.raises(ExpertError) as caught:
        Expert.load(directory)
    assert str(caught.value) == problems[0]
    assert "\n" not in problems[0]
    return problems[0]
