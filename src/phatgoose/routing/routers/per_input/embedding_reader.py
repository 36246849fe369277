"""The frame of lookups that compare a prompt's embedding with those of training inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import PoolError, RoutingError
from ....experts.expert import Expert
from ....experts.pool import Pool
from ....tasks.embeddings import PAPER_TEXT, PROMPT, TEXTS, embed_texts, load_embedder, prompt_texts
from ....tasks.task import Example
from ..mixtures import Mixtures
from .prompt_reader import PromptReader

__all__ = ["EmbeddingReader", "Embeddings", "PromptEmbedder", "embeddings_of"]


MOST_CHARACTERS = 1 << 20  # a model of 100,000 tokens of context is given fewer


class PromptEmbedder:
    """Embeds prompts as the training inputs of experts were."""

    def __init__(self, name: str, columns: int) -> None:
        """The embedder's `name`, and how many `columns` the experts' embeddings have.

        Loads it, so that composing a model waits for that, and not the first prompt. Raises
        ConfigError.
        """
        load_embedder(name)
        self.name, self.columns = name, columns

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [texts, columns].

        Raises RoutingError for a text of more than MOST_CHARACTERS, which only a tokenizer that
        means harm makes of a prompt's tokens, where vectors have another number of columns, and as
        `embed_texts` does.
        """
        longest = max(map(len, texts), default=0)
        if longest > MOST_CHARACTERS:
            raise RoutingError(
                f"The base's tokenizer makes {longest} characters of a prompt's tokens, more than "
                f"the {MOST_CHARACTERS} that are embedded; use a router without an embedder."
            )
        found = embed_texts(texts, self.name)
        if found.shape[1] != self.columns:
            raise RoutingError(
                f"The experts' embeddings have {self.columns} columns, those of {self.name} "
                f"{found.shape[1]}; they are another embedder's."
            )
        return found


class EmbeddingReader(PromptReader):
    """A lookup that goes by the embedding of each prompt; subclasses say how, in `nearest_to`."""

    def __init__(
        self,
        embedder: str,
        columns: int,
        tokenizer: PreTrainedTokenizerBase,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        """`embedder` made what prompts are compared with, which has so many `columns`.

        All else is as `PromptReader` takes it. Raises as `PromptEmbedder` does.
        """
        super().__init__(tokenizer, k, temperature)
        self.prompts = PromptEmbedder(embedder, columns)

    @property
    def embedder(self) -> str:
        """The embedder's name."""
        return self.prompts.name

    def nearest_to(self, queries: Tensor) -> Mixtures:
        """The experts for inputs with these embeddings, unit vectors [texts, columns]."""
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """The embedder's name, and what it embedded."""
        return {"embedder": self.embedder, "embedding_form": PROMPT}

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt."""
        return self.nearest_to(self.prompts.vectors(prompt_texts(self.tokenizer, prompts)))


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of training inputs, `rows` [M, dims], by `embedder`, and their experts [M]."""

    rows: Tensor
    owners: Tensor
    embedder: str


def embeddings_of(pool: Pool, embedder: str | None = None, form: str = PROMPT) -> Embeddings:
    """Those of all experts of `pool`; `owners` are indices in it.

    Raises PoolError when an expert has none or has those of other texts than `form` says, or when
    they come from several embedders, or from another than `embedder`.
    """
    rows = [_embeddings(expert, form) for expert in pool.experts]
    kinds = {
        (str(expert.info.embedder), row.shape[1])
        for expert, row in zip(pool.experts, rows, strict=True)
    }
    if len(kinds) > 1:
        raise PoolError(
            f"The experts' embeddings come from several embedders and can't be compared: {kinds}."
        )
    found = kinds.pop()[0]
    if embedder not in (None, found):
        raise PoolError(f"The experts' embeddings come from {found}, those there from {embedder}.")
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    unit = torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)
    return Embeddings(unit, owners, found)


def _embeddings(expert: Expert, form: str) -> Tensor:
    if expert.embeddings is None or expert.info.embedder is None:
        lacks = "embeddings" if expert.embeddings is None else "record of its embedder"
        raise PoolError(
            f"Expert {expert.name!r} has no {lacks}; run 'phatgoose measure' on it, with "
            f"--task its data, or leave it out."
        )
    found = expert.info.embedding_form or PAPER_TEXT  # before it was recorded
    if found != form:
        flag = "" if form == PROMPT else f" --embedding-form {form}"
        raise PoolError(
            f"Expert {expert.name!r} has embeddings of {TEXTS.get(found, found)}, but this router "
            f"compares {TEXTS[form]}; measure them again: phatgoose measure {expert.directory} "
            f"--task ITS-DATA --embeddings --no-means --no-readings{flag}"
        )
    return expert.embeddings
