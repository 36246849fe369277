"""Adapters for the import matrix: each option of PEFT on each kind of base, saved by PEFT."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tiny import copied_model, make_ids, make_tokenizer

KINDS = ("t5", "llama", "gpt2", "qwen2")
TARGETS = {  # attention and feed-forward layers that each kind has, by their short names
    "t5": ("q", "v", "wi_0", "wo"),
    "llama": ("q_proj", "v_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "qwen2": ("q_proj", "v_proj", "up_proj", "down_proj"),
}
FEEDFORWARD = {"t5": "wo", "llama": "down_proj", "gpt2": "c_proj", "qwen2": "down_proj"}
BLOCKS = {"t5": "block", "llama": "layers", "gpt2": "h", "qwen2": "layers"}
EMBEDDING = {"t5": "shared", "llama": "embed_tokens", "gpt2": "wte", "qwen2": "embed_tokens"}
NORM = {"t5": "final_layer_norm", "llama": "norm", "gpt2": "ln_f", "qwen2": "norm"}
INVOCATION = make_ids(2)[0, 3:5].tolist()  # one of two rows of the tests' tokens has it
OptionsOf = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """One row of the matrix: how the adapter is made, and how it is imported.

    `options` are those of `config` for a kind of base. `spoil` are keys set in the written config,
    and `change` is done to the folder, for what PEFT can't make here (a quantised base, an older or
    newer version, a damaged file).
    """

    name: str
    config: type[PeftConfig] = LoraConfig
    options: OptionsOf = lambda kind: {}
    allow_loss: float | None = None
    spoil: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Path], None] = lambda folder: None


class NotInPeftError(Exception):
    """PEFT itself can't make such an adapter on such a base."""


def write_case(case: Case, kind: str, base_folder: Path, folder: Path) -> Path:
    """The random adapter of `case` on the tiny base `kind`, saved by PEFT in `folder`.

    `base_folder` is the base's name in it.

    Raises NotInPeftError where PEFT has no such thing.
    """
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
        try:
            model = get_peft_model(base, case.config(**options | dict(case.options(kind))))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise NotInPeftError(str(error)) from error
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, save_embedding_layers=case.name == "resized embeddings")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | dict(case.spoil)))
    case.change(folder)
    return folder


def _pickled(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")


def _one_missing(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def _one_layer_missing(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    first = min(tensors).rpartition(".lora_")[0]
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(first)}
    save_file(kept, folder / ADAPTER_WEIGHTS)


def _one_too_many(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors["base_model.model.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


def _adapterhub(folder: Path) -> None:
    content = {"model_class": "T5ForConditionalGeneration", "config": {"r": 4}, "hidden_size": 32}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))


def _same(options: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return options


def _first(kind: str) -> str:
    return TARGETS[kind][0]


LOSSY = {
    "LoHa": (peft.LoHaConfig, {"r": 2}),
    "LoKr": (peft.LoKrConfig, {"r": 2}),
    "VeRA": (peft.VeraConfig, {"r": 4}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 20}),
    "RandLoRA": (peft.RandLoraConfig, {"r": 4}),
    "C3A": (peft.C3AConfig, {"block_size": 4}),
    "WaveFT": (peft.WaveFTConfig, {"n_frequency": 20}),
    "DeLoRA": (peft.DeloraConfig, {"r": 4}),
    "GraLoRA": (peft.GraloraConfig, {"r": 4, "gralora_k": 2}),
}

CASES = (
    Case("LoRA"),
    Case("rsLoRA", options=lambda kind: {"use_rslora": True}),
    Case("rank_pattern", options=lambda kind: {"rank_pattern": {_first(kind): 2}}),
    Case("alpha_pattern", options=lambda kind: {"alpha_pattern": {_first(kind): 3}}),
    Case(
        "rank_pattern, alpha_pattern and rsLoRA by regular expressions",
        options=lambda kind: {
            "use_rslora": True,
            "rank_pattern": {rf"{BLOCKS[kind]}\.0\..*": 2},
            "alpha_pattern": {rf".*{BLOCKS[kind]}\.1\..*": 7},
        },
    ),
    Case("one kind of module only", options=lambda kind: {"target_modules": [_first(kind)]}),
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
    Case("init_lora_weights=gaussian", options=lambda kind: {"init_lora_weights": "gaussian"}),
    Case("init_lora_weights=orthogonal", options=lambda kind: {"init_lora_weights": "orthogonal"}),
    Case("bias=all", options=lambda kind: {"bias": "all"}),
    Case("bias=lora_only", options=lambda kind: {"bias": "lora_only"}),
    Case("lora_bias", options=lambda kind: {"lora_bias": True}),
    Case("DoRA", options=lambda kind: {"use_dora": True}),
    Case("aLoRA", options=lambda kind: {"alora_invocation_tokens": INVOCATION}),
    Case("PiSSA", options=lambda kind: {"init_lora_weights": "pissa"}),
    Case("OLoRA", options=lambda kind: {"init_lora_weights": "olora"}),
    Case("CorDA", spoil={"init_lora_weights": "corda"}),
    Case("LoftQ", spoil={"init_lora_weights": "loftq"}),
    Case("LoRA-GA", spoil={"init_lora_weights": "lora_ga"}),
    Case("modules_to_save", options=lambda kind: {"modules_to_save": [NORM[kind]]}),
    Case(
        "trainable_token_indices",
        options=lambda kind: {"trainable_token_indices": {EMBEDDING[kind]: [4, 5]}},
    ),
    Case(
        "embeddings among the targets",
        options=lambda kind: {"target_modules": [_first(kind), EMBEDDING[kind]]},
    ),
    Case(
        "the output layer among the targets",
        options=lambda kind: {"target_modules": [_first(kind), "lm_head"]},
    ),
    Case("resized embeddings"),
    Case("layer_replication", spoil={"layer_replication": [[0, 2], [1, 2]]}),
    Case("target_parameters", spoil={"target_parameters": ["mlp.experts.gate_up_proj"]}),
    Case("an option of a newer PEFT", spoil={"use_something_new": True}),
    Case("pickled weights", change=_pickled),
    Case("a factor missing", change=_one_missing),
    Case("a targeted layer missing", change=_one_layer_missing),
    Case("a tensor too many", change=_one_too_many),
    Case("AdapterHub's format", change=_adapterhub),
    Case("prompt tuning", peft.PromptTuningConfig, lambda kind: {"num_virtual_tokens": 4}),
    Case("prefix tuning", spoil={"peft_type": "PREFIX_TUNING"}),
    Case("(IA)³ on outputs", peft.IA3Config, lambda kind: {"feedforward_modules": []}),
    Case(
        "(IA)³ on an input",
        peft.IA3Config,
        lambda kind: {"feedforward_modules": [FEEDFORWARD[kind]]},
    ),
    Case("(IA)³ by default", peft.IA3Config, lambda kind: {"target_modules": None}),
    Case(
        "(IA)³ with modules_to_save",
        peft.IA3Config,
        lambda kind: {"target_modules": None, "modules_to_save": [NORM[kind]]},
    ),
    Case("OFT", peft.OFTConfig, lambda kind: {"oft_block_size": 4}),
    Case("LoHa without --allow-loss", peft.LoHaConfig, lambda kind: {"r": 2}),
    *(
        Case(f"{name} with --allow-loss 0", config, partial(_same, options), allow_loss=0.0)
        for name, (config, options) in LOSSY.items()
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
