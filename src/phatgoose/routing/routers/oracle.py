"""Oracle: for every task the expert with the best score on it (Muqeeth et al. 2024, section 4.2).

It knows the tasks' answers beforehand: not zero-shot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import RoutingError
from ...experts.pool import Pool
from ...files.strict import one_line
from ..context import Choice
from .prompt_router import ByPrompt, Prompt, PromptRouter, Tables
from .router import Scores, best_expert_by_task, given_scores


class Oracle(ByPrompt):
    """Router oracle."""

    unserved = "Router oracle goes by the task's name, which evaluate and compare tell it."

    def tables(
        self, pool: Pool, scores: Scores | None = None, embedder: str | None = None
    ) -> Tables:
        """The best expert of each task in `scores`. Raises ConfigError without them."""
        best = best_expert_by_task(given_scores(scores, self.routing), pool.names)
        chosen = {task: pool.names.index(expert) for task, expert in best.items()}
        return Tables(pool.names, info={"experts_by_task": chosen})

    def chooser(self, tables: Tables) -> PromptRouter:
        """One expert for each task. Raises RoutingError when a saved model has none."""
        if "experts_by_task" not in tables.info:
            raise RoutingError("Router oracle needs lookup.experts_by_task in routed.json.")
        return ByTask(tables)


class ByTask(PromptRouter):
    """One expert for each task, whatever the prompt."""

    name = "oracle"

    def choose(
        self, prompts: Sequence[Prompt], base: PreTrainedModel | None = None, **known: Any
    ) -> Choice:
        """The expert of the `task`, for each of `prompts`. Raises RoutingError when it has none."""
        task, best = known.get("task"), dict[str, int](self.tables.info["experts_by_task"])
        if task is None:
            raise RoutingError(str(self.unserved))
        if task not in best:
            tasks = one_line(", ".join(sorted(best)))
            raise RoutingError(
                f"Router oracle has no scores for task {task!r}; it has them for {tasks}."
            )
        return Choice.alone(torch.full((len(prompts),), best[task]))
