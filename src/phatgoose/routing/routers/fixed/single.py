"""Single: one expert, named by the user, for everything."""

from __future__ import annotations

from ....errors import PoolError
from ....experts.pool import Pool
from ..scores import Scores
from .merged import Merged

__all__ = ["Single"]


class Single(Merged):
    """Router single: the mean of a pool that is narrowed to one expert."""

    folds = False

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The pool of the expert alone. Raises PoolError when it isn't named or isn't there."""
        name = self.routing.expert
        if name is None and len(pool) > 1:
            raise PoolError(
                f"Router single needs the name of its expert: one of {', '.join(pool.names)}."
            )
        return pool.select([name or pool.names[0]])
