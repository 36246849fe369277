"""Best Individual: the expert with the best mean score over all tasks, for everything.

Muqeeth et al. 2024, section 4.2. It knows the tasks' answers beforehand: not zero-shot.
"""

from __future__ import annotations

from ....experts.pool import Pool
from ..scores import Scores, best_expert, given_scores
from .merged import Merged

__all__ = ["BestIndividual"]


class BestIndividual(Merged):
    """Router best-individual: the mean of a pool that is narrowed to one expert."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The pool of the best expert alone. Raises ConfigError without `scores`."""
        return pool.select([best_expert(given_scores(scores, self.routing), pool.names)])
