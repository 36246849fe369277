"""PEFT LoRA adapters as plain factors per site, read from safetensors without building a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import ExpertError
from .sites import Site

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "LoraFactors",
    "check_fit",
    "read_adapter_config",
    "read_lora",
    "read_tensors",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# What a LoRA config may hold that makes it more than W u + s B A u, and why it can't be routed.
UNSUPPORTED: dict[str, str] = {
    "use_dora": "DoRA rescales the base weight, which a routed sum of updates can't express",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes token embeddings",
    "layer_replication": "it changes the base's layers",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "aLoRA acts on a part of the sequence only",
    "lora_bias": "its B factors carry biases",
    "arrow_config": "it is itself a router",
    "use_qalora": "QALoRA pools its inputs",
    "kasa_config": "KaSA adds a term of its own",
    "use_bdlora": "its factors are block-diagonal",
}
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFactors:
    """One site's LoRA: the update is `scale * B @ A @ u`."""

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration, known to be plain LoRA.

    Raises ExpertError, with the reason, when it is missing, broken or something else than LoRA.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpertError(
            f"{directory} is no PEFT adapter: {ADAPTER_CONFIG} can't be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise ExpertError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ExpertError(f"{directory} holds a PEFT adapter of type {kind}; wanted LORA.")
    for key, reason in UNSUPPORTED.items():
        if config.get(key):
            raise ExpertError(f"{directory} uses {key}, which is not supported: {reason}.")
    if config.get("bias", "none") != "none":
        raise ExpertError(f"{directory} trains the base's biases (bias={config['bias']!r}).")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise ExpertError(
            f"{directory} was initialised by {init}, which changes the base; convert it with "
            f"PEFT's path_initial_model_for_weight_conversion first."
        )
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, all finite.

    Raises ExpertError when the file is missing, truncated, or holds a NaN or an infinity.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise ExpertError(f"{path} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{path} is damaged or truncated: {error}.") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ExpertError(f"{path}: tensor {name} holds a value that is not finite.")
    return tensors


def read_lora(directory: Path) -> dict[str, LoraFactors]:
    """The LoRA factors of a PEFT adapter by site name.

    Rank and scale are each site's own (rank_pattern, alpha_pattern and rsLoRA are followed).
    Raises ExpertError when a file is missing or damaged, the adapter is not plain LoRA, a factor
    lacks its partner, or a tensor is left over.
    """
    config = read_adapter_config(directory)
    if not (directory / ADAPTER_WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise ExpertError(
            f"{directory} holds pickled weights (adapter_model.bin), which are never read: they "
            f"could run code. Save the adapter again as safetensors."
        )
    tensors = read_tensors(directory / ADAPTER_WEIGHTS)
    scale_of = _scale_rule(config)
    factors = {}
    for site in sorted({_site_of(key, directory) for key in tensors}):
        A, B = (tensors.get(f"{PEFT_PREFIX}{site}.lora_{side}.weight") for side in "AB")
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            got = [None if side is None else tuple(side.shape) for side in (A, B)]
            raise ExpertError(
                f"{directory}, site {site}: wanted A of shape (r, n) and B of (d, r), "
                f"got {got[0]} and {got[1]}."
            )
        factors[site] = LoraFactors(A, B, scale_of(site, A.shape[0]))
    if not factors:
        raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds no LoRA factors.")
    return factors


def check_fit(name: str, lora: Mapping[str, LoraFactors], sites: Mapping[str, Site]) -> None:
    """Raise ExpertError unless each of the factors of expert `name` fits a site of the base."""
    for site, factors in lora.items():
        if site not in sites:
            raise ExpertError(f"Expert {name!r} acts on {site}, which the base model lacks.")
        got = (factors.A.shape[1], factors.B.shape[0])
        wanted = (sites[site].in_features, sites[site].out_features)
        if got != wanted:
            raise ExpertError(
                f"Expert {name!r}, site {site}: maps {got[0]} to {got[1]} features, the base model "
                f"{wanted[0]} to {wanted[1]}; it was trained on another base."
            )


def _site_of(key: str, directory: Path) -> str:
    for ending in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(PEFT_PREFIX) and key.endswith(ending):
            return key[len(PEFT_PREFIX) : -len(ending)]
    raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds {key!r}, which is no LoRA factor.")


def _scale_rule(config: dict[str, Any]) -> Callable[[str, int], float]:
    """How PEFT scales the update at a site of a given rank: alpha / r, or alpha / sqrt(r)."""
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    root = bool(config.get("use_rslora"))
    default = float(config.get("lora_alpha", 8))

    def scale(site: str, rank: int) -> float:
        alpha = alphas.get(get_pattern_key(list(alphas), site), default) if alphas else default
        return float(alpha) / (math.sqrt(rank) if root else rank)

    return scale
