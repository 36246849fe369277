"""Writes the expert directories of tests/golden, which every later version must still read.

There is one of each kind: expert (a LoRA), ia3, bottleneck and dora. Run it only when the format
version is raised, and keep the old directories beside the new ones:
    python tests/golden/make.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from phatgoose.base import BaseReference
from phatgoose.experts.expert import Expert

HERE = Path(__file__).parent
SITES = {"model.layers.0.self_attn.q_proj": (4, 3), "model.layers.0.mlp.down_proj": (6, 4)}
RANK = 2


def ramp(*shape: int, start: float) -> torch.Tensor:
    """start, start + 0.25, start + 0.5, … in the given shape: exact in every float type here."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float32) * 0.25 + start).reshape(shape)


def write_adapter(folder: Path) -> None:
    """A PEFT LoRA adapter, as PEFT 0.18 and later write it, with a pattern for rank and alpha."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example/base",
        "r": RANK,
        "lora_alpha": 3,
        "alpha_pattern": {"mlp.down_proj": 8},
        "use_rslora": False,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for place, (site, (n, d)) in enumerate(SITES.items()):
        prefix = f"base_model.model.{site}"
        tensors[f"{prefix}.lora_A.weight"] = ramp(RANK, n, start=place - 1.0)
        tensors[f"{prefix}.lora_B.weight"] = ramp(d, RANK, start=place + 0.5)
    save_file(tensors, folder / "adapter_model.safetensors")


def write_ia3(folder: Path) -> None:
    """A PEFT (IA)³ adapter, which scales queries and the input of the feed-forward's last layer."""
    query, down = SITES
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example/base",
        "target_modules": ["q_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        f"base_model.model.{query}.ia3_l": ramp(SITES[query][1], 1, start=0.5),
        f"base_model.model.{down}.ia3_l": ramp(1, SITES[down][0], start=-0.5),
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def write_bottleneck(folder: Path) -> None:
    """A bottleneck adapter of size 2."""
    config = {"bottleneck_version": 1, "base": "example/base", "activation": "gelu", "scale": 0.5}
    (folder / "bottleneck_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for place, (site, (_, d)) in enumerate(SITES.items()):
        tensors[f"{site}.down.weight"] = ramp(RANK, d, start=place - 1.0)
        tensors[f"{site}.down.bias"] = ramp(RANK, start=place - 2.0)
        tensors[f"{site}.up.weight"] = ramp(d, RANK, start=place + 0.5)
        tensors[f"{site}.up.bias"] = ramp(d, start=place + 1.5)
    save_file(tensors, folder / "bottleneck.safetensors")


def write_dora(folder: Path) -> None:
    """A DoRA as an import writes it."""
    config = {"dora_version": 1, "base": "example/base"}
    (folder / "dora_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for place, (site, (n, d)) in enumerate(SITES.items()):
        tensors[f"{site}.lora_A"] = ramp(RANK, n, start=place - 1.0)
        tensors[f"{site}.lora_B"] = ramp(d, RANK, start=place + 0.5)
        tensors[f"{site}.bias"] = ramp(d, start=-0.5)
        tensors[f"{site}.output_scale"] = ramp(d, start=0.5)
    save_file(tensors, folder / "dora.safetensors")


def main() -> None:
    """Write the directories anew."""
    make("expert", write_adapter)
    make("ia3", write_ia3)
    make("bottleneck", write_bottleneck)
    make("dora", write_dora)


def make(name: str, write: Callable[[Path], None]) -> None:
    """Write the directory `name` of the adapter that `write` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        expert = Expert.from_peft(
            folder,
            {
                site: ramp(n, start=2.0 * place)
                for place, (site, (n, _)) in enumerate(SITES.items())
            },
            means={site: ramp(n, start=-0.5) for site, (n, _) in SITES.items()},
            embeddings=torch.tensor([[0.6, 0.8], [1.0, 0.0]]),
            embedder="example/embedder",
            name="golden",
            base=BaseReference("example/base", "main", "sha256:0123"),
            task={"name": "golden", "source": "golden.jsonl", "train_examples": 2},
            hyperparameters={"rank": RANK, "learning_rate": 0.005},
            metrics={"expert_validation_loss": 0.125},
        )
        expert.save(HERE / name, overwrite=True)


if __name__ == "__main__":
    main()
