"""Oracle: for every task the expert with the best score on it (Muqeeth et al. 2024, section 4.2).

It knows the tasks' answers beforehand: not zero-shot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import RoutingError
from ...experts.pool import Pool
from ...files.strict import one_line
from ...tasks.task import Example
from .prompt_router import LookedUp
from .router import Lookup, Mixtures, SavedLookup, Scores, best_expert_by_task, given_scores


class Oracle(LookedUp):
    """Router oracle."""

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup:
        """The best expert of each task in `scores`. Raises ConfigError without them."""
        best = best_expert_by_task(given_scores(scores, self.routing), pool.names)
        return TaskTable({task: pool.names.index(expert) for task, expert in best.items()})

    def saved_lookup(self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None) -> Lookup:
        """The same, read from a saved model. Raises RoutingError when it isn't there."""
        if "experts_by_task" not in saved.info:
            raise RoutingError("Router oracle needs lookup.experts_by_task in routed.json.")
        return TaskTable(saved.info["experts_by_task"])


class TaskTable(Lookup):
    """One expert for each task."""

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
        self.serve(Mixtures.alone(torch.tensor([self.experts[name]])))

    def info(self) -> dict[str, Any]:
        """The experts of the tasks."""
        return {"experts_by_task": self.experts}

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The expert of the present task, for each of `prompts`."""
        if self.mixtures is None:
            raise RoutingError(self.unknown)
        return self.mixtures.shared_out(len(prompts))
