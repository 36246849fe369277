"""PEFT LoRA adapters as plain factors per site, read from safetensors without building a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import ExpertError
from .files import read_json_object, shortened
from .mapped import FLOATS, TensorFile
from .patterns import check_patterns
from .refusals import refuse_kind, refuse_options, tensor_refusal
from .sites import Site

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "PEFT_PREFIX",
    "LoraFactors",
    "check_fit",
    "read_adapter_config",
    "read_config",
    "read_lora",
    "read_tensors",
    "read_weights",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_ALPHA = 1e9


@dataclass(frozen=True)
class LoraFactors:
    """One site's LoRA: the update is `scale * B @ A @ u`."""

    A: Tensor  # [r, n]
    B: Tensor  # [d, r]
    scale: float


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter of any kind.

    Raises ExpertError when it is missing or broken.
    """
    path = directory / ADAPTER_CONFIG
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise ExpertError(
            f"{directory} is no PEFT adapter: {ADAPTER_CONFIG} can't be read ({error.strerror})."
        ) from error


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration, known to be plain LoRA.

    Raises ExpertError, with the reason, when it is missing, broken or something else than LoRA.
    """
    config = read_config(directory)
    refuse_kind(config, directory)
    refuse_options(config, directory)
    wrong = [] if _is_number(config.get("lora_alpha", 8)) else ["lora_alpha"]
    for key in PATTERNS:
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            wrong.append(key)
        else:
            check_patterns(value, f"{directory / ADAPTER_CONFIG}: {key}")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if key == "layers_pattern" or isinstance(value, str):  # others are names when listed
            listed = value if isinstance(value, list) else [value]
            texts = [text for text in listed if isinstance(text, str)]
            check_patterns(texts, f"{directory / ADAPTER_CONFIG}: {key}")
    for key in wrong:
        raise ExpertError(
            f"{directory / ADAPTER_CONFIG}: {key} is {shortened(config[key])}, which PEFT can't "
            f"have written."
        )
    return config


def read_tensors(path: Path) -> TensorFile:
    """Every tensor of a safetensors file, all finite, as views of the mapped file.

    Raises ExpertError when the file is missing, no regular file of its folder, truncated, or holds
    a NaN or an infinity.
    """
    tensors = TensorFile(path)
    tensors.check_finite()
    return tensors


def read_weights(directory: Path) -> TensorFile:
    """Every tensor of the adapter in `directory`. Raises ExpertError; pickled ones are refused."""
    pickled = directory / "adapter_model.bin"
    if not (directory / ADAPTER_WEIGHTS).is_file() and pickled.is_file():
        raise ExpertError(
            f"{directory} holds pickled weights (adapter_model.bin), which are never read: they "
            f"could run code. Save the adapter again as safetensors."
        )
    return read_tensors(directory / ADAPTER_WEIGHTS)


def read_lora(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, LoraFactors]:
    """The LoRA factors of a PEFT adapter by site name.

    `tensors` are its weights where they have been read already. Rank and scale are each site's own
    (rank_pattern, alpha_pattern and rsLoRA are followed).
    Raises ExpertError when a file is missing or damaged, the adapter is not plain LoRA, a factor
    lacks its partner, or a tensor is left over.
    """
    config = read_adapter_config(directory)
    tensors = read_weights(directory) if tensors is None else tensors
    scale_of = _scale_rule(config)
    factors = {}
    for site in sorted({_site_of(key, directory) for key in tensors}):
        A, B = (tensors.get(f"{PEFT_PREFIX}{site}.lora_{side}.weight") for side in "AB")
        if A is None or B is None or not _are_factors(A, B):
            got = [None if side is None else tuple(side.shape) for side in (A, B)]
            raise ExpertError(
                f"{directory}, site {site}: wanted A of shape (r, n) and B of (d, r), in floating "
                f"point, got {got[0]} and {got[1]}."
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


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]


def _are_factors(A: Tensor, B: Tensor) -> bool:
    """True when B A can be computed: matrices of one rank, of floating point numbers."""
    matrices = A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1] > 0
    return matrices and A.dtype in FLOATS and B.dtype in FLOATS


def _site_of(key: str, directory: Path) -> str:
    for ending in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(PEFT_PREFIX) and key.endswith(ending):
            return key[len(PEFT_PREFIX) : -len(ending)]
    raise tensor_refusal(key, directory, ADAPTER_WEIGHTS)


def _scale_rule(config: dict[str, Any]) -> Callable[[str, int], float]:
    """How PEFT scales the update at a site of a given rank: alpha / r, or alpha / sqrt(r).

    Of several patterns the first that matches counts (peft.utils.other.get_pattern_key).
    """
    alphas = [
        (re.compile(rf"(.*\.)?({pattern})$"), float(alpha))
        for pattern, alpha in (config.get("alpha_pattern") or {}).items()
    ]
    root = bool(config.get("use_rslora"))
    default = float(config.get("lora_alpha", 8))

    def scale(site: str, rank: int) -> float:
        alpha = next((alpha for pattern, alpha in alphas if pattern.match(site)), default)
        return alpha / (math.sqrt(rank) if root else rank)

    return scale
