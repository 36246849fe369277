"""What LoRAs teach reader e5, as the package ships it: in float16, by the names of its layers.

    python research/ship_reader.py src/phatgoose/e5/taught.safetensors TAUGHT... [--rank 24]

Each TAUGHT is a checkpoint of teach_reader.py. Of several the mean of their updates is shipped,
of which singular values keep --rank directions a layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def updates_of(taught: Path) -> dict[str, Tensor]:
    """What the LoRA adds to each layer's weight, its scale included."""
    config = json.loads((taught / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(taught / "adapter_model.safetensors")
    updates = {}
    for name, first in weights.items():
        layer, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        if factor == "lora_A":
            second = weights[name.replace("lora_A", "lora_B")]
            updates[layer] = scale * second.float() @ first.float()
    return updates


def mean_of(runs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {layer: torch.stack([run[layer] for run in runs]).mean(dim=0) for layer in runs[0]}


def factors_of(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A [rank, in] and B [out, rank] of the nearest update of that rank."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("taught", type=Path, nargs="+")
    parser.add_argument("--rank", type=int, default=24)
    given = parser.parse_args()
    shipped = {}
    for layer, update in mean_of([updates_of(taught) for taught in given.taught]).items():
        first, second = factors_of(update, given.rank)
        shipped[f"{layer}.A"] = first.half().contiguous()
        shipped[f"{layer}.B"] = second.half().contiguous()
    save_file(shipped, given.out)


if __name__ == "__main__":
    main()
