"""PEFT's files of an adapter, and what they may say: no more than can be routed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from peft import IA3Config, LoraConfig, PeftConfig
from pydantic import BaseModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.identity import Base
from ..errors import ExpertError
from ..files import JsonObject, check_config, read_json, shortened
from .adapter_files import AdapterFiles

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

# PEFT's types that are routed as they are.
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config}

# PEFT's types that update linear layers, so that its convert_to_lora can approximate them.
CONVERTIBLE = (
    "LOHA",
    "LOKR",
    "VERA",
    "FOURIERFT",
    "RANDLORA",
    "C3A",
    "WAVEFT",
    "DELORA",
    "GRALORA",
)

# The options that decide where an adapter acts and how strongly.
ACTING = (
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "fan_in_fan_out",
    "task_type",
    "layers_to_transform",
    "layers_pattern",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
)
# Others that change nothing of a trained adapter. Whatever else is set makes it more than
# W u + s B A u or (IA)³ vectors, or may do so in a newer PEFT.
HARMLESS = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "lora_dropout",
    "init_lora_weights",
    "init_ia3_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "megatron_core",
)
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")

Number = Annotated[float, Ge(-1e9), Le(1e9)]


class AdapterConfig(BaseModel, extra="allow"):
    """What is read of an adapter_config.json, beside what PEFT itself reads."""

    peft_type: str | None = None
    revision: str | None = None
    lora_alpha: Number = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Number] | None = None


class PeftFiles(AdapterFiles):
    """PEFT's files of a plain LoRA or (IA)³. Others, and pickled ones, are refused."""

    prefix = PEFT_PREFIX
    hint = (
        f" Pickled weights ({PICKLED_WEIGHTS}) are never read, since they could run code: save the "
        f"adapter again as safetensors."
    )

    def read_config(self, directory: Path) -> JsonObject:
        return self.checked(self.read_any_config(directory), directory)

    def read_any_config(self, directory: Path) -> JsonObject:
        """The config of an adapter of any of PEFT's types, unchecked."""
        hint = f" Wanted a PEFT adapter, a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}."
        config = read_json(directory / ADAPTER_CONFIG, AdapterConfig, hint=hint)
        return config.model_dump(exclude_unset=True)

    def about(self, base: Base, layer: nn.Module) -> dict[str, object]:
        return {
            **super().about(base, layer),
            "revision": base.revision,
            "task_type": "SEQ_2_SEQ_LM" if base.is_encoder_decoder else "CAUSAL_LM",
            "fan_in_fan_out": isinstance(layer, Conv1D),
        }

    def checked(self, config: JsonObject, directory: Path) -> JsonObject:
        """`config`, which `directory` holds; ExpertError where it is no plain LoRA or (IA)³."""
        kind = config.get("peft_type")
        if kind not in CONFIGS:
            lossy = ""
            if kind in CONVERTIBLE:
                lossy = ", or 'phatgoose import --allow-loss' approximates it by a LoRA"
            raise ExpertError(
                f"{directory} holds a PEFT adapter of type {shortened(kind, 40)}; wanted LORA or "
                f"IA3{lossy}."
            )
        usual = vars(CONFIGS[kind]())
        for key, value in config.items():
            is_set = value and value != usual.get(key)
            if is_set and key not in (*ACTING, *HARMLESS):
                raise ExpertError(
                    f"{directory} uses {shortened(key)}, which can't be routed: only updates of "
                    f"linear layers at all tokens can (docs/imports.md)."
                )
        init = str(config.get("init_lora_weights", True)).lower()
        if init not in PLAIN_INITS:
            raise ExpertError(
                f"{directory} was initialised by {shortened(init, 40)}, which may have changed the "
                f"base; convert it with PEFT's path_initial_model_for_weight_conversion first."
            )
        check_config(config, str(directory / ADAPTER_CONFIG))
        return config


PEFT_FILES = PeftFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path")
