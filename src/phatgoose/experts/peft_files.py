"""PEFT's files and models, which LoRA and (IA)³ share; what is refused of PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import IA3Config, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import Base
from ..errors import ExpertError
from ..files import check_config, read_json, shortened
from .kind import AdapterFiles

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the one adapter of a model

# PEFT's types that are routed as they are.
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config}

# PEFT's types that update linear layers, so that its convert_to_lora can approximate them.
CONVERTIBLE = (
    *("LOHA", "LOKR", "VERA", "FOURIERFT", "RANDLORA", "C3A", "WAVEFT", "DELORA", "GRALORA"),
)

# The options that decide where an adapter acts and how strongly.
ACTING = (
    *("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "task_type"),
    *("layers_to_transform", "layers_pattern", "r", "lora_alpha", "use_rslora", "lora_bias"),
    *("rank_pattern", "alpha_pattern"),
)
# Others that change nothing of a trained adapter. Whatever else is set makes it more than
# W u + s B A u or (IA)³ vectors, or may do so in a newer PEFT.
HARMLESS = (
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "lora_dropout", "init_lora_weights", "init_ia3_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "megatron_core",
)
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")

PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_ALPHA = 1e9


class PeftFiles(AdapterFiles):
    """The files of a plain LoRA or (IA)³. Others, and pickled ones, are refused."""

    prefix: ClassVar[str] = PEFT_PREFIX
    hint: ClassVar[str] = (
        f" Pickled weights ({PICKLED_WEIGHTS}) are never read, since they could run code: save the "
        f"adapter again as safetensors."
    )

    def read_config(self, directory: Path) -> dict[str, Any]:
        return self.checked(self.read_any_config(directory), directory)

    def read_any_config(self, directory: Path) -> dict[str, Any]:
        """The config of an adapter of any of PEFT's types, unchecked."""
        hint = f" Wanted a PEFT adapter, a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        return read_json(directory / ADAPTER_CONFIG, hint=hint)

    def about(self, base: Base, layer: nn.Module) -> dict[str, Any]:
        return {
            **super().about(base, layer),
            "revision": base.revision,
            "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            "fan_in_fan_out": isinstance(layer, Conv1D),
        }

    def checked(self, config: dict[str, Any], directory: Path) -> dict[str, Any]:
        """`config`, which `directory` holds; ExpertError where it is no plain LoRA or (IA)³."""
        if problem := _problem(config):
            raise ExpertError(f"{directory} {problem}.")
        check_config(config, str(directory / ADAPTER_CONFIG))
        return config


def _problem(config: Mapping[str, Any]) -> str | None:
    """What keeps a PEFT config from being that of a plain LoRA or (IA)³; None for nothing."""
    kind, init = config.get("peft_type"), str(config.get("init_lora_weights", True)).lower()
    if kind not in tuple(CONFIGS):  # it may be a list
        lossy = ", or 'phatgoose import --allow-loss' approximates it by a LoRA"
        wanted = f"wanted LORA or IA3{lossy if kind in CONVERTIBLE else ''}"
        return f"holds a PEFT adapter of type {shortened(kind, 40)}; {wanted}"
    defaults = vars(CONFIGS[kind]())
    for key, value in config.items():
        if value and key not in (*ACTING, *HARMLESS) and value != defaults.get(key):
            return (
                f"uses {shortened(key)}, which can't be routed: only updates of linear layers at "
                f"all tokens can (docs/imports.md)"
            )
    if init not in PLAIN_INITS:
        return (
            f"was initialised by {shortened(init, 40)}, which may have changed the base; convert "
            f"it with PEFT's path_initial_model_for_weight_conversion first"
        )
    tables = [config.get(key) or {} for key in PATTERNS]
    sizes = [number for table in tables if isinstance(table, dict) for number in table.values()]
    are_numbers = (
        type(each) in (int, float) and abs(each) <= LARGEST_ALPHA
        for each in (config.get("lora_alpha", 8), *sizes)
    )
    if not all(are_numbers) or not all(isinstance(table, dict) for table in tables):
        return f"has lora_alpha or {' or '.join(PATTERNS)} that PEFT can't have written"
    return None


PEFT_FILES = PeftFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path")


def write_adapter(
    folder: Path, config: Mapping[str, Any], sites: Iterable[str], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a PEFT adapter of `tensors`, by site and ending, into `folder`, and return that."""
    named = {PEFT_PREFIX + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS)
    content = {**config, "inference_mode": True, "target_modules": sorted(sites)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder
