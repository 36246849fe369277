"""Routers that look the expert of a whole input up: by its nearest neighbour, or by its task.

All sites share one `Lookup`, which holds the experts of the rows of the batch at hand. Whoever
scores examples says whose turn it is with `serve`; otherwise a retriever reads the prompts that
pass through the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Formatting
from ..embeddings import embed_texts, retrieval_text
from ..errors import RoutingError
from ..tasks import Example
from .decision import RoutingDecision

__all__ = ["NOBODY", "LookedUpRouter", "Lookup", "PromptReader", "Retriever", "TaskTable"]

NOBODY = -1  # stands in rows for no expert: the base's own output


class Lookup:
    """Which expert serves each row of the batch at hand.

    `rows` are indices in the pool, [rows]; None while nothing is known. A single row serves
    batches of any size.
    """

    rows: Tensor | None = None
    unknown = "Nothing has told the router yet what its inputs are."

    def begin_task(self, name: str) -> None:
        """The examples to come belong to the task called `name`."""

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Tensor:
        """The expert of each of `examples`, indices in the pool, int64 [examples].

        `formatting` is how the model is given them (None: the default), for lookups that read
        tokens.
        """
        raise NotImplementedError

    def serve(self, experts: Tensor | None) -> None:
        """Use `experts` for the rows of the passes to come, until told otherwise."""
        self.rows = experts

    def attach(self, model: PreTrainedModel) -> None:
        """Watch `model` for inputs that nobody announces."""

    def detach(self) -> None:
        """Stop watching."""


class TaskTable(Lookup):
    """One expert per task: Oracle (METHOD section 5)."""

    unknown = "Router oracle goes by the task's name, which evaluate and compare tell it."

    def __init__(self, experts: Mapping[str, int]) -> None:
        """`experts` maps a task's name to an index in the pool."""
        self.experts = dict(experts)

    def begin_task(self, name: str) -> None:
        """Serve the expert of the task `name`. Raises RoutingError when it has none."""
        if name not in self.experts:
            known = ", ".join(sorted(self.experts))
            raise RoutingError(
                f"Router oracle has no scores for task {name!r}; it has them for {known}."
            )
        self.rows = torch.tensor([self.experts[name]])

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Tensor:
        """The expert of the present task, for each of `examples`."""
        if self.rows is None:
            raise RoutingError(self.unknown)
        return self.rows.expand(len(examples))


class PromptReader(Lookup):
    """A lookup that goes by prompts and, where nobody announces them, reads those that pass."""

    name = "this router"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` turns the prompts that pass through the model back into text."""
        self.tokenizer = tokenizer
        self._announced = False
        self._prompt, self._length = torch.empty(0, 0), 0  # read last, and its length by now
        self._handles: list[Any] = []

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, int64 [texts]."""
        raise NotImplementedError

    def of_tokens(self, prompts: Sequence[list[int]]) -> Tensor:
        """The same of prompts given by their tokens; special ones are no part of the text."""
        return self.of_prompts(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))

    def serve(self, experts: Tensor | None) -> None:
        """Use `experts` for the rows to come; None goes back to reading prompts."""
        self.rows, self._announced = experts, experts is not None

    def attach(self, model: PreTrainedModel) -> None:
        """Look experts up for every new prompt that `model` is given."""
        stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            if self._announced or _continues(kwargs):
                return
            if ids is None:
                raise RoutingError(f"Router {self.name} reads the input's tokens; pass input_ids.")
            if not self._grew(ids):
                self.rows = self.of_tokens(_real_tokens(ids, kwargs.get("attention_mask")))
                self._prompt = ids.cpu()
            self._length = ids.shape[1]

        self._handles.append(stack.register_forward_pre_hook(read, with_kwargs=True))

    def detach(self) -> None:
        """Stop reading prompts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _grew(self, ids: Tensor) -> bool:
        """True for the prompt read last, a token longer: a step of generation without a cache."""
        prompt = self._prompt
        grew = self.rows is not None and ids.shape == (len(prompt), self._length + 1)
        return grew and torch.equal(ids[:, : prompt.shape[1]].cpu(), prompt)


class Retriever(PromptReader):
    """The expert of the nearest stored training input, by cosine (METHOD section 5, Retrieval)."""

    name = "retrieval"

    def __init__(
        self,
        embeddings: Tensor,
        owners: Tensor,
        embedder: str,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`embeddings` [M, dims] are unit vectors made by `embedder`, `owners` [M] their experts.

        `tokenizer` is as `PromptReader` takes it.
        """
        super().__init__(tokenizer)
        self.embeddings, self.owners, self.embedder = embeddings, owners, embedder

    def nearest(self, texts: Sequence[str]) -> Tensor:
        """The expert that owns the nearest embedding of each text, int64 [texts]."""
        queries = embed_texts(texts, self.embedder)
        return self.owners[(queries @ self.embeddings.T).argmax(dim=-1)]

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, whose answer choices nobody knows, int64 [texts]."""
        return self.nearest([retrieval_text(text, ()) for text in texts])

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Tensor:
        """The expert of each example; its answer choices are a part of the query."""
        return self.nearest(
            [retrieval_text(example.input, example.choices) for example in examples]
        )


def _real_tokens(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row of `ids` without its padding."""
    real = torch.ones_like(ids).bool() if mask is None or mask.dim() != 2 else mask.bool()
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def _continues(arguments: Mapping[str, Any]) -> bool:
    """True in a pass that goes on with an input whose first tokens are cached."""
    cache = arguments.get("past_key_values", arguments.get("cache"))
    return cache is not None and cache.get_seq_length() > 0


class LookedUpRouter(nn.Module):
    """At one site: the expert that the shared `Lookup` holds for each row, alone."""

    position: Tensor

    def __init__(self, experts: Tensor, pool_size: int, lookup: Lookup) -> None:
        """`experts` [E] are the pool's indices of the experts that act at the site."""
        super().__init__()
        position = torch.full((pool_size + 1,), -1)  # the last one is NOBODY's
        position[experts.cpu()] = torch.arange(len(experts))
        self.register_buffer("position", position, persistent=False)
        self.lookup = lookup
        self.experts = len(experts)

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for u [T, n]: T / rows tokens in turn for each row; k is 1.

        A row's beams and tokens stand together, so this holds for generation too. The weight is 0
        where the row's expert does not act at this site, and for NOBODY. Raises RoutingError when
        no expert is known, or T is no multiple of the rows.
        """
        rows = self.lookup.rows
        if rows is None:
            raise RoutingError(self.lookup.unknown)
        if len(u) % len(rows):
            raise RoutingError(f"{len(u)} tokens can't be shared out to {len(rows)} inputs.")
        experts = self.position[rows.to(u.device)].repeat_interleave(len(u) // len(rows))
        return RoutingDecision(experts.clamp(min=0)[:, None], (experts >= 0).float()[:, None])

    def distribution(self, u: Tensor) -> Tensor:
        """1 for the row's expert, else 0, [T, E]; all 0 where it does not act at this site."""
        decision = self(u)
        zeros = torch.zeros(len(u), self.experts, device=u.device)
        return zeros.scatter(1, decision.experts, decision.weights)
