"""The examples of a task whose tokens are counted for a plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ...tasks.encoding import Encoder, TokenPair
from ...tasks.task import Example

__all__ = ["SAMPLE", "pairs_of"]

SAMPLE = 200  # examples


def pairs_of(encoder: Encoder, examples: Sequence[Example]) -> list[TokenPair]:
    """Their tokens, without a word about targets that are cut: training will warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(encoder.pairs(examples))
