"""PEFT adapters that can't be routed: types, options and tensors, each with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig

from ...errors import ExpertError
from ...files.quoting import one_line, shortened

__all__ = [
    "CONFIGS",
    "CONVERTIBLE",
    "UNSUPPORTED",
    "refuse_kind",
    "refuse_options",
    "tensor_refusal",
]

# PEFT's types that are routed as they are.
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config}

# Options of a config that make an adapter more than W u + s B A u, or more than (IA)³ vectors.
UNSUPPORTED: dict[str, str] = {
    "use_dora": "DoRA rescales the base weight, which a routed sum of updates can't express",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes token embeddings",
    "layer_replication": "it changes the base's layers",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "aLoRA acts on a part of the sequence only",
    "arrow_config": "it is itself a router",
    "use_qalora": "QALoRA pools its inputs",
    "kasa_config": "KaSA adds a term of its own",
    "use_bdlora": "its factors are block-diagonal",
    "megatron_config": "it is for Megatron's layers, and PEFT would import a module that it names",
}

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")

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

PROMPTS = "it adds learned tokens or keys to the input; nothing of it acts at a linear layer"
ROTATIONS = "it multiplies the base weight, which a routed sum of updates can't express"
REASONS_BY_TYPE: dict[str, str] = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "ADAPTION_PROMPT": PROMPTS,
    "OFT": ROTATIONS,
    "BOFT": ROTATIONS,
    "HRA": ROTATIONS,
    "ROAD": ROTATIONS,
    "LN_TUNING": "it trains the base's layer norms",
    "TRAINABLE_TOKENS": "it changes token embeddings",
    "XLORA": "it is itself a router",
    "POLY": "it is itself a router",
}
WANTED = " or ".join(CONFIGS)
# Keys that the adapters library (AdapterHub) writes into a file of the same name.
ADAPTERHUB_KEYS = {"model_class", "config_id", "hidden_size", "model_type", "config"}

TENSORS: dict[str, str] = {
    "lora_magnitude_vector": "DoRA's magnitudes rescale the base weight",
    "lora_embedding_": "an embedding is no site",
    "modules_to_save": "it replaces a whole module of the base",
    "token_adapter": "it changes token embeddings",
    "prompt_embeddings": PROMPTS,
    ".bias": "it trains a bias of the base where it has no LoRA, and nothing is routed there",
}
EMBEDDINGS = ("embed_tokens", "shared", "wte", "wpe", "lm_head", "embed_out", "word_embeddings")


def refuse_kind(config: Mapping[str, Any], directory: Path) -> None:
    """Raise ExpertError, with the reason, unless the adapter is a LoRA or (IA)³."""
    kind = config.get("peft_type")
    kind = kind if kind is None else one_line(kind, 40)
    if kind in CONFIGS:
        return
    if kind is None and ADAPTERHUB_KEYS & config.keys():
        raise ExpertError(
            f"{directory} holds an adapter of the adapters library (AdapterHub), not of PEFT; "
            f"wanted a PEFT adapter of type {WANTED}."
        )
    if kind in CONVERTIBLE:
        raise ExpertError(
            f"{directory} holds a PEFT adapter of type {kind}; wanted {WANTED}. PEFT can "
            f"approximate it by a LoRA: 'phatgoose import --allow-loss' with the share that may be "
            f"lost."
        )
    reason = REASONS_BY_TYPE.get(kind, "its updates can't be routed") if kind else None
    raise ExpertError(
        f"{directory} holds a PEFT adapter of type {kind}; wanted {WANTED}"
        + (f" ({reason})." if reason else ".")
    )


def refuse_options(config: Mapping[str, Any], directory: Path) -> None:
    """Raise ExpertError, with the reason, when a LoRA or (IA)³ has options that make it more."""
    for key, reason in UNSUPPORTED.items():
        if config.get(key):
            raise ExpertError(f"{directory} uses {key}, which is not supported: {reason}.")
    known = {field.name for field in dataclasses.fields(CONFIGS[config["peft_type"]])}
    known |= {"peft_version"}
    for key in sorted(config.keys() - known):
        if config[key]:
            raise ExpertError(
                f"{directory} uses {shortened(key)}, which the installed PEFT doesn't know; what "
                f"it does to the adapter is unknown."
            )
    init = str(config.get("init_lora_weights", True)).lower()
    named = one_line(config.get("init_lora_weights"), 40)
    if init.startswith(BASE_CHANGING_INITS):
        raise ExpertError(
            f"{directory} was initialised by {named}, which changes the base; convert it with "
            f"PEFT's path_initial_model_for_weight_conversion first."
        )
    if init not in PLAIN_INITS and config["init_lora_weights"] is not None:
        raise ExpertError(
            f"{directory} was initialised by {named!r}, which is unknown and may have changed the "
            f"base."
        )


def tensor_refusal(name: str, directory: Path, file: str) -> ExpertError:
    """The error for tensor `name` of `file`, which no plain adapter has."""
    reason = next((reason for part, reason in TENSORS.items() if part in name), None)
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if reason is None and owner in EMBEDDINGS:
        reason = "it holds a whole embedding or output layer, resized or trained"
    return ExpertError(
        f"{directory}: {file} holds {shortened(name, 200)}, which is no part of a plain adapter"
        + (f": {reason}." if reason else ".")
    )
