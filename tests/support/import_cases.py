"""Adapters for the import matrix: options of PEFT on three kinds of base, saved by PEFT."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from phatgoose.experts.kind import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tiny import copied_model, make_tokenizer

KINDS = ("t5", "llama", "gpt2")
TARGETS = {  # attention and feed-forward layers that each kind has, by their short names
    "t5": ("q", "v", "wi_0", "wo"),
    "llama": ("q_proj", "v_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
FEEDFORWARD = {"t5": "wo", "llama": "down_proj", "gpt2": "c_proj"}
BLOCKS = {"t5": "block", "llama": "layers", "gpt2": "h"}
EMBEDDING = {"t5": "shared", "llama": "embed_tokens", "gpt2": "wte"}


@dataclass(frozen=True)
class Case:
    """One row of the matrix: how the adapter is made, and what becomes of it.

    `options` are those of `config` for a kind of base. `spoil` are keys set in the written config,
    and `change` is done to its tensors, for what PEFT can't make here. `refused` are words of the
    refusal; None for what is imported. `only` are the bases that PEFT has it for.
    """

    name: str
    config: type[PeftConfig] = LoraConfig
    options: Callable[[str], Mapping[str, Any]] = lambda kind: {}
    allow_loss: float | None = None
    spoil: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], object] | None = None
    refused: str | None = None
    only: tuple[str, ...] = KINDS


def write_case(case: Case, kind: str, base_folder: Path, folder: Path) -> Path:
    """The random adapter of `case` on the tiny base `kind` of this name, saved by PEFT."""
    base = copied_model(kind)
    base.name_or_path = str(base_folder)
    options = {"task_type": "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"}
    if case.config is not peft.PromptTuningConfig:
        options["target_modules"] = list(TARGETS[kind])
    if case.config is LoraConfig:
        options |= {"r": 4, "lora_alpha": 8, "fan_in_fan_out": kind == "gpt2"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, case.config(**options | dict(case.options(kind))))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, save_embedding_layers=case.name == "resized embeddings")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | dict(case.spoil)))
    if case.change is not None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        case.change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def _first(kind: str) -> str:
    return TARGETS[kind][0]


LOSSY = {
    "LoHa": (peft.LoHaConfig, {"r": 2}, ("t5", "llama")),
    "LoKr": (peft.LoKrConfig, {"r": 2}, ("t5", "llama")),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 20}, ("llama",)),
    "C3A": (peft.C3AConfig, {"block_size": 4}, ("llama",)),
    "DeLoRA": (peft.DeloraConfig, {"r": 4}, ("llama", "t5")),
}

CASES = (
    Case("LoRA"),
    Case("rsLoRA", options=lambda kind: {"use_rslora": True}),
    Case(
        "rank_pattern, alpha_pattern and rsLoRA by regular expressions",
        options=lambda kind: {
            "use_rslora": True,
            "rank_pattern": {rf"{BLOCKS[kind]}\.0\..*": 2},
            "alpha_pattern": {rf".*{BLOCKS[kind]}\.1\..*": 7},
        },
    ),
    Case(
        "target_modules as a regular expression",
        options=lambda kind: {
            "target_modules": rf".*\.{BLOCKS[kind]}\.1\..*\.({'|'.join(TARGETS[kind])})"
        },
    ),
    Case("target_modules=all-linear", options=lambda kind: {"target_modules": "all-linear"}),
    Case("exclude_modules", options=lambda kind: {"exclude_modules": rf".*{BLOCKS[kind]}\.0\..*"}),
    Case(
        "layers_to_transform",
        options=lambda kind: {"layers_to_transform": [1], "layers_pattern": BLOCKS[kind]},
    ),
    Case("lora_bias", options=lambda kind: {"lora_bias": True}),
    Case("DoRA", options=lambda kind: {"use_dora": True}),
    Case(
        "aLoRA",
        spoil={"alora_invocation_tokens": [3]},
        refused="uses 'alora_invocation_tokens', which can't be routed",
        only=("llama",),
    ),
    Case("(IA)³ on outputs", peft.IA3Config, lambda kind: {"feedforward_modules": []}),
    Case(
        "(IA)³ on an input",
        peft.IA3Config,
        lambda kind: {"feedforward_modules": [FEEDFORWARD[kind]]},
    ),
    Case("(IA)³ by default", peft.IA3Config, lambda kind: {"target_modules": None}),
    *(
        Case(f"{name} with --allow-loss 0", config, lambda _, o=options: o, 0.0, only=bases)
        for name, (config, options, bases) in LOSSY.items()
    ),
    # What is refused; tests/experts/test_damage.py has the options that can't be routed.
    Case(
        "embeddings among the targets",
        options=lambda kind: {"target_modules": [_first(kind), EMBEDDING[kind]]},
        refused="embeddings and output layers are none",
    ),
    Case(
        "the output layer among the targets",
        options=lambda kind: {"target_modules": [_first(kind), "lm_head"]},
        refused="lm_head",
        only=("llama", "gpt2"),
    ),
    Case("resized embeddings", refused="wanted no such tensor"),
    Case("a factor missing", change=lambda t: t.pop(min(t)), refused="is missing; wanted"),
    Case(
        "a tensor too many",
        change=lambda t: t.update({"base_model.model.extra.weight": torch.zeros(2)}),
        refused="extra.weight is (2,) torch.float32; wanted no such tensor",
    ),
    Case(
        "prompt tuning",
        peft.PromptTuningConfig,
        lambda kind: {"num_virtual_tokens": 4},
        refused="of type 'PROMPT_TUNING'",
    ),
    Case(
        "OFT",
        peft.OFTConfig,
        lambda kind: {"oft_block_size": 4},
        refused="of type 'OFT'",
        only=("llama",),
    ),
)


def make_tiny(kind: str, folder: Path) -> Path:
    """A tiny base of an architecture whose layers transformers 5 has renamed or fused."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        num_local_experts=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(final_eos=False).save_pretrained(folder)
    return folder
