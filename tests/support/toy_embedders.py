"""Functions in place of a sentence embedder."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from phatgoose.routing.routers import retrieval
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER


def toy_embed(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> torch.Tensor:
    """Unit vectors of a text's bytes, counted [texts, 64]: in place of a sentence embedder."""
    rows = [
        torch.tensor(list(text.encode()), dtype=torch.long).remainder(64).bincount(minlength=64)
        for text in texts
    ]
    return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


def use_toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture `toy_embedder` does, for longer than a test."""
    monkeypatch.setattr(retrieval, "embed_texts", toy_embed)
    monkeypatch.setattr(retrieval, "load_embedder", lambda embedder: None)


def embed(texts: Sequence[str], embedder: str = "none") -> Tensor:
    """Unit vectors that tell texts and embedders apart, in place of a sentence embedder."""
    seeds = [sum(f"{embedder}{text}".encode()) for text in texts]
    rows = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
