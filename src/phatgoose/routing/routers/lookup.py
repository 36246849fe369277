"""Lookups: which experts serve each whole input, shared by all sites of a model.

A `Lookup` holds the experts of the rows of the present batch, for each thread its own. Code that
runs known examples announces them (`composition.announcing`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import RoutingError
from ...experts.pool import Pool
from ...tasks.embeddings import PAPER_TEXT, PROMPT, TEXTS
from ...tasks.task import Example
from .mixtures import Mixtures

__all__ = ["Lookup", "SavedLookup"]


class _Turn(threading.local):
    """The present batch of one thread."""

    mixtures: Mixtures | None = None  # as `Lookup.mixtures`
    announced = False  # by somebody, rather than read
    prompt: Tensor | None = None  # read last
    length = 0  # of that prompt by now
    given: int | None = None  # columns of the prompt that `generate` was given, until it is read
    depth = 0  # of calls inside calls of the model
    encoded: Tensor | None = None  # what the encoder made of the prompts read last
    checked: Tensor | None = None  # encoder outputs found to be those


class Lookup:
    """Which experts serve each row of the present batch; all sites of a model share one.

    Every thread has a batch of its own. A copy, in memory or from a file, has none yet.
    """

    unknown = "Nothing has told the router yet what its inputs are."
    chooses = True  # False where its mixtures are scores of all experts, not a choice among them

    def __init__(self) -> None:
        self._turn = _Turn()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the threads' batches."""
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore what `__getstate__` gave, with no batch."""
        self.__dict__.update(state, _turn=_Turn())

    @property
    def mixtures(self) -> Mixtures | None:
        """The experts of the rows of this thread's batch; None while nothing is known.

        A single row serves batches of any size.
        """
        return self._turn.mixtures

    def of_each(self, u: Tensor, sees_all: bool = True) -> Mixtures:
        """The experts of each token of u [T, n], on its device: T / rows tokens in turn for a row.

        A row's beams and tokens stand together, so this holds for generation too. `sees_all` False
        says that u holds some of the rows' tokens only, nobody knows whose: all rows must then have
        the same experts. Raises RoutingError when no expert is known, when T is no multiple of the
        rows, or such rows differ.
        """
        known = self.mixtures
        if known is None:
            raise RoutingError(self.unknown)
        if not sees_all:
            known = _of_any(known)
        if len(u) % len(known):
            raise RoutingError(f"{len(u)} tokens can't be shared out to {len(known)} inputs.")
        here = Mixtures(known.experts.to(u.device), known.weights.to(u.device))
        return here.shared_out(len(u))

    def begin_task(self, name: str) -> None:
        """The examples to come belong to the task called `name`."""

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt, given by its tokens as the model reads them.

        `examples` are what the prompts were made of; None where only the prompts are known.
        """
        raise NotImplementedError

    def serve(self, mixtures: Mixtures | None) -> None:
        """Use `mixtures` for the rows of the next passes, until the next call."""
        self._turn.mixtures = mixtures

    def attach(self, model: PreTrainedModel) -> None:
        """Watch `model` for inputs that are not announced."""

    def detach(self) -> None:
        """Stop watching."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved with a model, by name (docs/format.md)."""
        return {}

    def info(self) -> dict[str, Any]:
        """What is saved beside the tensors, as JSON."""
        return {}

    def grown(self, pool: Pool, first: int) -> Lookup:
        """The lookup with the experts of `pool` too, which get indices from `first` on."""
        return self

    def shrunk(self, place: Tensor) -> Lookup:
        """The lookup of the experts whose new index `place` [E] gives; -1 for those that leave."""
        return self


def _of_any(known: Mixtures) -> Mixtures:
    """The one row that all rows are. Raises RoutingError where they differ."""
    if not all((part == part[0]).all() for part in (known.experts, known.weights)):
        raise RoutingError(
            "Inputs that choose different experts can't share a batch here: some of the layers are "
            "inside the base's own experts, which see some of the tokens only. Use a router for "
            "every token, such as phatgoose, or pass inputs one by one (token_budget=1 in Python)."
        )
    return known.of([0])


@dataclass(frozen=True)
class SavedLookup:
    """What a saved model holds of a lookup.

    `info` is what `Lookup.info` gave, `tensors` all tensors of the model by name; `experts` counts
    the pool and `inputs` gives n of every site.
    """

    info: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    experts: int
    inputs: Mapping[str, int]

    def embedder_for(self, router: str, form: str = PROMPT) -> str:
        """The embedder that made what is looked up.

        Raises RoutingError when none is named, or when it embedded another text than `form` says.
        """
        if "embedder" not in self.info:
            raise RoutingError(f"Router {router} needs lookup.embedder in routed.json.")
        found = self.info.get("embedding_form", PAPER_TEXT)
        if found != form:
            raise RoutingError(
                f"This model's embeddings are {TEXTS.get(found, found)}, but router {router} "
                f"compares {TEXTS[form]}. Measure its experts' embeddings again (phatgoose "
                f"measure), then compose and save the pool again."
            )
        return str(self.info["embedder"])
