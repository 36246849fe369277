"""Adapters for the import matrix: options of PEFT on three kinds of base, saved by PEFT."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from tiny import make_model

KINDS = ("t5", "llama", "gpt2")
TARGETS = {  # attention and feed-forward layers that each kind has, by their short names
    "t5": ("q", "v", "wi_0", "wo"),
    "llama": ("q_proj", "v_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
NAMES = {
    "t5": {"FIRST": "q", "FFN": "wo", "BLOCKS": "block", "TABLE": "shared"},
    "llama": {"FIRST": "q_proj", "FFN": "down_proj", "BLOCKS": "layers", "TABLE": "embed_tokens"},
    "gpt2": {"FIRST": "c_attn", "FFN": "c_proj", "BLOCKS": "h", "TABLE": "wte"},
}


@dataclass(frozen=True)
class Case:
    """One row of the matrix: how the adapter is made, and what becomes of it.

    `options` are those of `config`; in their texts and lists FIRST, FFN, BLOCKS and the like stand
    for what a base calls its layers. `refused` are words of the refusal; None for what is imported.
    `only` are the bases that PEFT has it for.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: type[PeftConfig] = LoraConfig
    refused: str | None = None
    only: tuple[str, ...] = KINDS
    allow_loss: float | None = None


def named(value: Any, kind: str) -> Any:
    """An option's value with the names of this base in place of what stands for them."""
    if isinstance(value, dict):
        return {named(key, kind): named(each, kind) for key, each in value.items()}
    if isinstance(value, list):
        return [named(each, kind) for each in value]
    for word, name in NAMES[kind].items() if isinstance(value, str) else ():
        value = value.replace(word, name)
    return value


def write_case(case: Case, kind: str, base_folder: Path, folder: Path) -> Path:
    """The random adapter of `case` on the tiny base `kind` of this name, saved by PEFT."""
    base = make_model(kind)
    base.name_or_path = str(base_folder)
    options = {"task_type": "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"}
    if case.config is not peft.PromptTuningConfig:
        options["target_modules"] = list(TARGETS[kind])
    if case.config is LoraConfig:
        options |= {"r": 4, "lora_alpha": 8, "fan_in_fan_out": kind == "gpt2"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, case.config(**options | named(dict(case.options), kind)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, save_embedding_layers=case.name == "resized embeddings")
    return folder
