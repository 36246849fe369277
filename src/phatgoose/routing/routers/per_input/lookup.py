"""Routers that look the expert of a whole input up: by its nearest neighbour, or by its task.

All sites share one `Lookup`, which holds the experts of the rows of the batch at hand, for each
thread its own. Whoever scores examples says whose turn it is with `serve`; otherwise a retriever
reads the prompts that pass through the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ....base.token_masks import cached_tokens, callable_parts, given_arguments, real_tokens
from ....config import Formatting
from ....errors import RoutingError
from ....files.quoting import one_line
from ....tasks.embeddings import embed_texts, load_embedder, retrieval_text
from ....tasks.task import Example
from ..decision import RoutingDecision

__all__ = ["NOBODY", "LookedUpRouter", "Lookup", "PromptReader", "Retriever", "TaskTable"]

NOBODY = -1  # stands in rows for no expert: the base's own output


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook`, which torch.compile leaves alone."""
    reason = "Routers that read prompts look at tokens; use fullgraph=False."
    left_alone: Callable[..., None] = torch.compiler.disable(hook, reason=reason)  # type: ignore[no-untyped-call]
    return left_alone


class _Turn(threading.local):
    """What a lookup knows of the inputs that the thread at hand has passed."""

    rows: Tensor | None = None  # as `Lookup.rows`
    announced = False  # by somebody, rather than read
    prompt: Tensor | None = None  # read last
    length = 0  # of that prompt by now
    depth = 0  # of calls inside calls of the model


class Lookup:
    """Which expert serves each row of the batch at hand.

    A copy, in memory or from a file, knows nothing yet of any batch.
    """

    unknown = "Nothing has told the router yet what its inputs are."

    def __init__(self) -> None:
        self._turn = _Turn()

    def __getstate__(self) -> dict[str, Any]:
        """All but what threads are at."""
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """What `__getstate__` gave."""
        self.__dict__.update(state, _turn=_Turn())

    @property
    def rows(self) -> Tensor | None:
        """Indices in the pool [rows] for this thread's batch; None while nothing is known.

        A single row serves batches of any size.
        """
        return self._turn.rows

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
        self._turn.rows = experts

    def attach(self, model: PreTrainedModel) -> None:
        """Watch `model` for inputs that nobody announces."""

    def detach(self) -> None:
        """Stop watching."""


class TaskTable(Lookup):
    """One expert per task: Oracle (METHOD section 5)."""

    unknown = "Router oracle goes by the task's name, which evaluate and compare tell it."

    def __init__(self, experts: Mapping[str, int]) -> None:
        """`experts` maps a task's name to an index in the pool."""
        super().__init__()
        self.experts = dict(experts)

    def begin_task(self, name: str) -> None:
        """Serve the expert of the task `name`. Raises RoutingError when it has none."""
        if name not in self.experts:
            known = one_line(", ".join(sorted(self.experts)))
            raise RoutingError(
                f"Router oracle has no scores for task {name!r}; it has them for {known}."
            )
        self.serve(torch.tensor([self.experts[name]]))

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
        super().__init__()
        self.tokenizer = tokenizer
        self._model: PreTrainedModel | None = None
        self._handles: list[Any] = []

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, int64 [texts]."""
        raise NotImplementedError

    def of_tokens(self, prompts: Sequence[list[int]]) -> Tensor:
        """The same of prompts given by their tokens; special ones are no part of the text."""
        return self.of_prompts(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))

    def serve(self, experts: Tensor | None) -> None:
        """Use `experts` for the rows to come; None goes back to reading prompts."""
        self._turn.rows, self._turn.announced = experts, experts is not None

    def attach(self, model: PreTrainedModel) -> None:
        """Look experts up for every new prompt that `model` is given."""
        self._model = model
        parts = (model.get_encoder(),) if model.config.is_encoder_decoder else callable_parts(model)
        for part in parts:
            self._handles += [
                part.register_forward_pre_hook(self._begin, with_kwargs=True),
                part.register_forward_hook(self._end, always_call=True),
            ]

    def detach(self) -> None:
        """Stop reading prompts."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @_uncompiled
    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        turn = self._turn
        turn.depth = 1 if part is self._model else turn.depth + 1  # whatever broke off before
        if turn.depth == 1 and not turn.announced:
            self._read(given_arguments(part, args, kwargs))

    @_uncompiled
    def _end(self, *_: Any) -> None:
        self._turn.depth = max(0, self._turn.depth - 1)

    def _read(self, given: Mapping[str, Any]) -> None:
        """Find the experts of the prompts in a call's arguments, unless it goes on with others."""
        ids, turn = given.get("input_ids"), self._turn
        if (cached_tokens(given) or 0) > 0:
            return
        if given.get("cu_seq_lens_q") is not None:
            raise RoutingError(
                f"Router {self.name} reads whole inputs, but several share a row here (continuous "
                f"batching); use generate with a padded batch."
            )
        if ids is None:
            raise RoutingError(f"Router {self.name} reads the input's tokens; pass input_ids.")
        if not self._grew(ids):
            real = real_tokens(given)
            kept = zip(ids, torch.ones_like(ids).bool() if real is None else real, strict=True)
            turn.rows = self.of_tokens([row[keep].tolist() for row, keep in kept])
            turn.prompt = ids.cpu()
        turn.length = ids.shape[1]

    def _grew(self, ids: Tensor) -> bool:
        """True for the prompt read last, a token longer: a step of generation without a cache."""
        prompt = self._turn.prompt
        if prompt is None or ids.shape != (len(prompt), self._turn.length + 1):
            return False
        return torch.equal(ids[:, : prompt.shape[1]].cpu(), prompt)


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

        `tokenizer` is as `PromptReader` takes it. The embedder is loaded now, so that whoever
        composes a model waits for it or is told, and not who asks it first. Raises ConfigError.
        """
        super().__init__(tokenizer)
        load_embedder(embedder)
        self.embeddings, self.owners, self.embedder = embeddings, owners, embedder

    def nearest(self, texts: Sequence[str], formatting: Formatting | None = None) -> Tensor:
        """The expert that owns the nearest embedding of each text, int64 [texts].

        Texts too long for the embedder are cut as `formatting` has it.
        """
        truncation = (formatting or Formatting()).truncation
        queries = embed_texts(texts, self.embedder, truncation)
        if queries.shape[1] != self.embeddings.shape[1]:
            raise RoutingError(
                f"The experts' embeddings have {self.embeddings.shape[1]} columns, those of "
                f"{self.embedder} {queries.shape[1]}; they are another embedder's."
            )
        return self.owners[(queries @ self.embeddings.T).argmax(dim=-1)]

    def of_prompts(self, texts: Sequence[str]) -> Tensor:
        """The expert of each prompt, whose answer choices nobody knows, int64 [texts]."""
        return self.nearest([retrieval_text(text, ()) for text in texts])

    def find(self, examples: Sequence[Example], formatting: Formatting | None = None) -> Tensor:
        """The expert of each example; its answer choices are a part of the query."""
        texts = [retrieval_text(example.input, example.choices) for example in examples]
        return self.nearest(texts, formatting)


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
