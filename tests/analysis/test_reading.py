"""Examples passed through a model while its routing is watched."""

from __future__ import annotations

import numpy as np
import torch

from analysed import encoder_of, new_tally, tallied
from phatgoose.analysis.routing_distribution import pass_through
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.recording import record
from phatgoose.routing.watching import watches_over
from phatgoose.tasks.encoding import TokenPair


def test_reading_stops_watching(llama, llama_pool):
    model = compose(llama_pool, llama)
    tallied(model, llama)
    assert all(
        not watches_over(layer, layer.site) for layer in composition_of(model).layers.values()
    )


def test_reading_changes_no_decision(llama, llama_pool):
    model = compose(llama_pool, llama)
    pair = TokenPair([5, 6, 7], [8, 9, 1])
    with record(model) as recording, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]))
    tally = new_tally(model)
    pass_through(model, encoder_of(llama), [pair], [tally])
    for site, mean in recording.usage().items():
        np.testing.assert_allclose(tally.distribution.by_site()[site], mean, atol=1e-6)
