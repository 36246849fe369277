"""PEFT's files and models, which LoRA and (IA)³ share; what is refused of PEFT's, and why."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..base import Base
from ..errors import ExpertError
from ..files import TensorFile, check_config, one_line, read_json_object, shortened
from ..passes import ActsOn
from ..sites import Site
from .kind import AdapterFiles

# PEFT's types that are routed as they are.
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config}

# Options of a config that make an adapter more than W u + s B A u, or more than (IA)³ vectors.
UNSUPPORTED: dict[str, str] = {
    "use_dora": "DoRA rescales the base weight; import it first ('phatgoose import')",
    "modules_to_save": "it replaces whole modules of the base; train again without it",
    "trainable_token_indices": "it changes token embeddings",
    "layer_replication": "it changes the base's layers",
    "target_parameters": "it adapts parameters that are no linear layers, such as the experts of a "
    "mixture; merge it into its base, or train again with target_modules",
    "arrow_config": "it is itself a router",
    "use_qalora": "QALoRA pools its inputs",
    "kasa_config": "KaSA adds a term of its own",
    "use_bdlora": "its factors are block-diagonal",
    "megatron_config": "it is for Megatron's layers, and PEFT would import a module that it names",
}

INVOCATION = "alora_invocation_tokens"  # of LoRAs; an empty list is none

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
    why = REASONS_BY_TYPE.get(kind, "its updates can't be routed") if kind else None
    raise ExpertError(
        f"{directory} holds a PEFT adapter of type {kind}; wanted {WANTED}"
        + (f" ({why})." if why else ".")
    )


def refuse_options(config: Mapping[str, Any], directory: Path) -> None:
    """Raise ExpertError, with the reason, when a LoRA or (IA)³ has options that make it more."""
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            raise ExpertError(f"{directory} uses {key}, which is not supported: {why}.")
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
    """The error for a tensor that no plain adapter has, with the reason if it is known."""
    reason = next((reason for part, reason in TENSORS.items() if part in name), None)
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if reason is None and owner in EMBEDDINGS:
        reason = "it holds a whole embedding or output layer, resized or trained"
    return ExpertError(
        f"{directory}: {file} holds {shortened(name, 200)}, which is no part of a plain adapter"
        + (f": {reason}." if reason else ".")
    )


# PEFT's two files, which LoRA and (IA)³ share: read and written without building a model.

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name for the one adapter of a model

PATTERNS = ("rank_pattern", "alpha_pattern")
LARGEST_ALPHA = 1e9


def read_config(directory: Path) -> dict[str, Any]:
    """The adapter's config in `directory`. Raises ExpertError if there is none."""
    path = directory / ADAPTER_CONFIG
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        empty = directory.is_dir() and not any(directory.iterdir())
        why = "it is empty" if empty else f"it has no {ADAPTER_CONFIG}"
        raise ExpertError(
            f"{directory} is no PEFT adapter: {why}. Wanted a folder with {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}."
        ) from error


class PeftFiles(AdapterFiles):
    """The files of a plain LoRA or (IA)³. Others, and pickled ones, are refused with the reason."""

    def read_config(self, directory: Path) -> dict[str, Any]:
        return self.checked(read_config(directory), directory)

    def checked(self, config: dict[str, Any], directory: Path) -> dict[str, Any]:
        """`config`, which `directory` holds; ExpertError where it is no plain LoRA or (IA)³."""
        refuse_kind(config, directory)
        refuse_options(config, directory)
        wrong = [] if _is_number(config.get("lora_alpha", 8)) else ["lora_alpha"]
        if config.get(INVOCATION):
            ActsOn.of({"invocation_tokens": config[INVOCATION]})  # refuses what is none
        for key in PATTERNS:
            value = config.get(key) or {}
            if not isinstance(value, dict) or not all(map(_is_number, value.values())):
                wrong.append(key)
        check_config(config, str(directory / ADAPTER_CONFIG))
        for key in wrong:
            raise ExpertError(
                f"{directory / ADAPTER_CONFIG}: {key} is {shortened(config[key])}, which PEFT "
                f"can't have written."
            )
        return config

    def read_weights(self, directory: Path) -> TensorFile:
        if not (directory / ADAPTER_WEIGHTS).is_file() and (directory / PICKLED_WEIGHTS).is_file():
            raise ExpertError(
                f"{directory} holds pickled weights ({PICKLED_WEIGHTS}), which are never read: "
                f"they could run code. Save the adapter again as safetensors."
            )
        return super().read_weights(directory)


PEFT_FILES = PeftFiles(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "base_model_name_or_path")


def site_of(key: str, endings: tuple[str, ...], directory: Path) -> str:
    """The site that tensor `key` of an adapter is for. Raises ExpertError for an unknown key."""
    for ending in endings:
        if key.startswith(PEFT_PREFIX) and key.endswith(ending):
            return key[len(PEFT_PREFIX) : -len(ending)]
    raise tensor_refusal(key, directory, ADAPTER_WEIGHTS)


def write_adapter(
    folder: Path, config: Mapping[str, Any], sites: Iterable[str], tensors: Mapping[str, Tensor]
) -> Path:
    """Write a PEFT adapter of `tensors`, by site and ending, into `folder`, and return that."""
    named = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_WEIGHTS)
    content = {**config, "inference_mode": True, "target_modules": sorted(sites)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST_ALPHA  # type: ignore[arg-type]


# A base under PEFT, in training.


def peft_options(base: Base, sites: dict[str, Site]) -> dict[str, Any]:
    """What the configs of all of PEFT's kinds say of a base and the sites to adapt."""
    first = base.model.get_submodule(next(iter(sites)))
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        "target_modules": list(sites),
        "fan_in_fan_out": isinstance(first, Conv1D),
        "revision": base.revision,
    }


@contextmanager
def under_peft(base: Base, config: PeftConfig) -> Iterator[PeftModel]:
    """The base with PEFT's layers of `config` in it, which are taken out again at the end."""
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; a user can't act on it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(base.model, config)
    try:
        yield model
    finally:
        model.unload()


def record_invocation(folder: Path, tokens: Iterable[int]) -> None:
    """Make the LoRA in `folder` one of PEFT's aLoRA, that acts from these tokens on."""
    config = read_json_object(folder / ADAPTER_CONFIG)
    text = json.dumps({**config, INVOCATION: list(tokens)}, indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def save_peft(model: PeftModel, base: Base, folder: Path) -> None:
    config: Any = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base.id
    config.target_modules = sorted(config.target_modules)  # PEFT writes a set in any order
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the expert has its own
