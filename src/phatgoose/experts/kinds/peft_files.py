"""PEFT adapters as plain tensors per site, read from safetensors without building a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ExpertError
from ...files.quoting import shortened
from ...files.regex_guard import check_config, value_at
from ...files.strict_json import read_json_object
from ...files.tensor_file import FLOATS, TensorFile
from ..importing.refusals import refuse_kind, refuse_options, tensor_refusal
from .modules import LoraFactors, ScalingVector

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "IA3_ENDING",
    "LORA_ENDINGS",
    "PEFT_PREFIX",
    "are_floats",
    "read_adapter_config",
    "read_config",
    "read_ia3",
    "read_lora",
    "read_tensors",
    "read_weights",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
IA3_ENDING = ".ia3_l"

PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_ALPHA = 1e9


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
    """The adapter's configuration, known to be plain LoRA or (IA)³.

    Raises ExpertError, with the reason, when it is missing, broken or something else.
    """
    config = read_config(directory)
    refuse_kind(config, directory)
    refuse_options(config, directory)
    wrong = [] if _is_number(config.get("lora_alpha", 8)) else ["lora_alpha"]
    for key in PATTERNS:
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            wrong.append(key)
    check_config(config, str(directory / ADAPTER_CONFIG))
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
    scale_of, has_biases = _scale_rule(config), bool(config.get("lora_bias"))
    factors = {}
    for site in sorted({_site_of(key, directory) for key in tensors}):
        A, B, bias = (tensors.get(f"{PEFT_PREFIX}{site}{ending}") for ending in LORA_ENDINGS)
        if A is None or B is None or not _are_factors(A, B):
            got = [None if side is None else tuple(side.shape) for side in (A, B)]
            raise ExpertError(
                f"{directory}, site {site}: wanted A of shape (r, n) and B of (d, r), in floating "
                f"point, got {got[0]} and {got[1]}."
            )
        if (bias is None) == has_biases or (bias is not None and not _is_bias(bias, B)):
            raise ExpertError(
                f"{directory}, site {site}: its config says lora_bias {has_biases}, but the bias "
                f"of B is {None if bias is None else tuple(bias.shape)}."
            )
        factors[site] = LoraFactors(A, B, scale_of(site, A.shape[0]), bias)
    if not factors:
        raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds no LoRA factors.")
    return factors


def read_ia3(
    directory: Path, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, ScalingVector]:
    """The (IA)³ vectors of a PEFT adapter by site name; `tensors` are its weights, if read already.

    PEFT stores those of outputs as [d, 1] and those of inputs as [1, n], which tells them apart.
    Raises ExpertError when a file is missing or damaged or a tensor is none of both.
    """
    read_adapter_config(directory)
    tensors = read_weights(directory) if tensors is None else tensors
    vectors = {}
    for key, tensor in sorted(tensors.items()):
        if not (key.startswith(PEFT_PREFIX) and key.endswith(IA3_ENDING)):
            raise tensor_refusal(key, directory, ADAPTER_WEIGHTS)
        site = key[len(PEFT_PREFIX) : -len(IA3_ENDING)]
        if tensor.dim() != 2 or sorted(tensor.shape)[0] != 1 or not are_floats(tensor):
            raise ExpertError(
                f"{directory}, site {site}: wanted a vector of shape (d, 1) or (1, n), in floating "
                f"point, got {tuple(tensor.shape)} of {tensor.dtype}."
            )
        vectors[site] = ScalingVector(tensor.flatten(), on_input=tensor.shape[0] == 1)
    if not vectors:
        raise ExpertError(f"{directory}: {ADAPTER_WEIGHTS} holds no (IA)³ vectors.")
    return vectors


def are_floats(*tensors: Tensor) -> bool:
    """True when all are of a floating-point type that experts may be stored in."""
    return all(tensor.dtype in FLOATS for tensor in tensors)


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]


def _are_factors(A: Tensor, B: Tensor) -> bool:
    """True when B A can be computed: matrices of one rank, of floating point numbers."""
    matrices = A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1] > 0
    return matrices and are_floats(A, B)


def _is_bias(bias: Tensor, B: Tensor) -> bool:
    return bias.shape == B.shape[:1] and are_floats(bias)


def _site_of(key: str, directory: Path) -> str:
    for ending in LORA_ENDINGS:
        if key.startswith(PEFT_PREFIX) and key.endswith(ending):
            return key[len(PEFT_PREFIX) : -len(ending)]
    raise tensor_refusal(key, directory, ADAPTER_WEIGHTS)


def _scale_rule(config: dict[str, Any]) -> Callable[[str, int], float]:
    """How PEFT scales the update at a site of a given rank: alpha / r, or alpha / sqrt(r).

    Of several patterns the first that matches counts (peft.utils.other.get_pattern_key).
    """
    alphas = config.get("alpha_pattern") or {}
    root = bool(config.get("use_rslora"))
    default = float(config.get("lora_alpha", 8))

    def scale(site: str, rank: int) -> float:
        alpha = value_at(alphas, site)
        alpha = default if alpha is None else float(alpha)
        return alpha / (math.sqrt(rank) if root else rank)

    return scale
