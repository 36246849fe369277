"""PEFT's two files, which LoRA and (IA)³ share: read and written without building a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...errors import ExpertError
from ...files.quoting import reason, shortened
from ...files.regex_guard import check_config
from ...files.strict_json import read_json_object
from ...files.tensor_file import TensorFile
from .kind import AdapterFiles, read_tensors
from .refusals import refuse_kind, refuse_options, tensor_refusal

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "PEFT_FILES",
    "PEFT_PREFIX",
    "PICKLED_WEIGHTS",
    "read_adapter_config",
    "read_config",
    "read_weights",
    "site_of",
    "write_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the one adapter of a model

PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_ALPHA = 1e9


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter of any type.

    Raises ExpertError when it is missing or broken.
    """
    path = directory / ADAPTER_CONFIG
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise ExpertError(
            f"{directory} is no PEFT adapter: {ADAPTER_CONFIG} can't be read ({reason(error)})."
        ) from error


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The configuration of a plain LoRA or (IA)³.

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


def read_weights(directory: Path) -> TensorFile:
    """Every tensor of the adapter in `directory`. Raises ExpertError; pickled ones are refused."""
    if not (directory / ADAPTER_WEIGHTS).is_file() and (directory / PICKLED_WEIGHTS).is_file():
        raise ExpertError(
            f"{directory} holds pickled weights ({PICKLED_WEIGHTS}), which are never read: they "
            f"could run code. Save the adapter again as safetensors."
        )
    return read_tensors(directory / ADAPTER_WEIGHTS)


PEFT_FILES = AdapterFiles(
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path", read_adapter_config, read_weights
)


def site_of(key: str, endings: tuple[str, ...], directory: Path) -> str:
    """The site whose tensor `key` is, by one of these `endings`. Raises ExpertError for others."""
    for ending in endings:
        if key.startswith(PEFT_PREFIX) and key.endswith(ending):
            return key[len(PEFT_PREFIX) : -len(ending)]
    raise tensor_refusal(key, directory, ADAPTER_WEIGHTS)


def write_adapter(
    folder: Path, config: Mapping[str, Any], sites: Iterable[str], tensors: Mapping[str, Tensor]
) -> Path:
    """`folder`, with an adapter's `config` and `tensors` (by site and ending) in PEFT's files."""
    named = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS)
    content = {**config, "inference_mode": True, "target_modules": sorted(sites)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]
