"""Layers and kinds of sites, read off their names."""

from __future__ import annotations

import pytest

from phatgoose.analysis.routing_distribution import site_label


@pytest.mark.parametrize(
    ("site", "stack", "layer", "kind"),
    [
        ("model.layers.7.self_attn.q_proj", "", 7, "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc", "", 11, "mlp.c_fc"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder", 3, "SelfAttention.q"),
        ("decoder.block.2.layer.1.EncDecAttention.k", "decoder", 2, "EncDecAttention.k"),
        ("odd.name", "", -1, "odd.name"),
    ],
)
def test_places_are_read_off_names(site, stack, layer, kind):
    place = site_label(site)
    assert (place.stack, place.layer, place.kind) == (stack, layer, kind)
