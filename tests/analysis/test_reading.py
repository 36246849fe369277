"""Examples passed through a model while its routing is watched."""

from __future__ import annotations

from analysed import tallied
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.watching import watches_over


def test_reading_stops_watching(llama, llama_pool):
    model = compose(llama_pool, llama)
    tallied(model, llama)
    assert all(
        not watches_over(layer, layer.site) for layer in composition_of(model).layers.values()
    )
