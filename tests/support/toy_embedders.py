"""Functions in place of a sentence embedder."""

from collections.abc import Sequence

import pytest
import torch

from phatgoose.routing.routers import retrieval
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER


def toy_embed(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> torch.Tensor:
    """Unit vectors of a text's bytes, counted [texts, 64]; other embedders count their names' too.

    In place of a sentence embedder.
    """
    name = embedder.removeprefix(DEFAULT_EMBEDDER)
    contents = [torch.tensor([*f"{text}{name}".encode()], dtype=torch.long) for text in texts]
    rows = [content.remainder(64).bincount(minlength=64) for content in contents]
    return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


def use_toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture `toy_embedder` does, for longer than a test."""
    monkeypatch.setattr(retrieval, "embed_texts", toy_embed)
    monkeypatch.setattr(retrieval, "load_embedder", lambda embedder: None)
