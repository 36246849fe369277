"""The demo's tasks: original English text, five tasks to train on and five to be tested on.

Each held-out task asks for the skill of one training task in another domain, with other prompts
and other answer words, so its score says whether routing carries a skill over.
"""

from __future__ import annotations

import random

from . import arithmetic, category, entailment, ordering, sentiment
from .drawing import Composer, Row, draw_rows

__all__ = ["Row", "held_out_rows", "training_rows"]

TRAINING_ROWS_PER_TASK = 400
HELD_OUT_ROWS_PER_TASK = 100

TRAINING: dict[str, Composer] = {
    "sentiment": sentiment.review,
    "entailment": entailment.premise_and_hypothesis,
    "arithmetic": arithmetic.calculation,
    "ordering": ordering.comparison,
    "category": category.classification,
}
HELD_OUT: dict[str, Composer] = {
    "hotel_feedback": sentiment.hotel_comment,
    "true_or_false": entailment.passage_and_statement,
    "word_problems": arithmetic.word_problem,
    "which_first": ordering.which_first,
    "odd_one_out": category.odd_one_out,
}


def training_rows(seed: int = 0) -> dict[str, list[Row]]:
    """The five training tasks by name: 400 distinct rows each, the same ones for the same seed."""
    return _rows(TRAINING, TRAINING_ROWS_PER_TASK, seed)


def held_out_rows(seed: int = 1) -> dict[str, list[Row]]:
    """The five held-out tasks by name: 100 distinct rows each, the same ones for the same seed."""
    return _rows(HELD_OUT, HELD_OUT_ROWS_PER_TASK, seed)


def _rows(composers: dict[str, Composer], count: int, seed: int) -> dict[str, list[Row]]:
    # A generator per task, so that a change to one task leaves the others' rows as they are.
    return {
        name: draw_rows(compose, count, random.Random(f"{seed}/{name}"))
        for name, compose in composers.items()
    }
