"""A model in place of a sentence embedder."""

from collections.abc import Sequence

import pytest
import torch

from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, EMBEDDERS

OTHERS = ("other", "them/theirs")


class ToyEmbedder:
    """Counts a text's bytes [texts, 64], and of its own name where it isn't the default one's."""

    max_seq_length = tokenizer = None

    def __init__(self, name: str = DEFAULT_EMBEDDER) -> None:
        self.name = name.removeprefix(DEFAULT_EMBEDDER)
        self.texts: list[str] = []  # that it has read

    def encode(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        self.texts.extend(texts)
        contents = [torch.tensor([*f"{text}{self.name}".encode()]) for text in texts]
        rows = [content.long().remainder(64).bincount(minlength=64) for content in contents]
        return torch.stack(rows).float()


def toy_embed(texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors of the default toy embedder."""
    return torch.nn.functional.normalize(ToyEmbedder().encode(texts), dim=-1)


def use_toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture `toy_embedder` does, for longer than a test."""
    for name in (DEFAULT_EMBEDDER, *OTHERS):
        monkeypatch.setitem(EMBEDDERS, name, ToyEmbedder(name))
