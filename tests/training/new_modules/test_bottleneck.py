"""New bottleneck adapters."""

from __future__ import annotations

import pytest

from phatgoose.config import Bottleneck
from phatgoose.training.new_modules import count_bottleneck, new_bottleneck, placed_sites


@pytest.mark.parametrize("joint", [False, True])
def test_as_many_parameters_are_trained_as_are_counted(llama, joint):
    bottleneck = Bottleneck(size=3)
    sites = placed_sites(llama.model, bottleneck)
    with new_bottleneck(llama, bottleneck, sites, joint=joint) as fresh:
        trained = sum(p.numel() for p in fresh.model.parameters() if p.requires_grad)
    gates = sum(site.in_features for site in sites.values()) if joint else 0
    assert trained == count_bottleneck(llama.model, bottleneck, sites.values()) + gates
