"""The examples of a task whose tokens are counted."""

from __future__ import annotations

import warnings

from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example
from phatgoose.training.plan_costs import pairs_of


def test_pairs_are_the_encoders_own_and_cut_targets_are_no_news(llama):
    encoder = Encoder.of(llama)
    examples = [Example("plums", "yes " * 600), Example("apples", "no")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = pairs_of(encoder, examples)
    assert pairs[1] == encoder.pair("apples", "no")
    assert len(pairs[0].target) < 600
