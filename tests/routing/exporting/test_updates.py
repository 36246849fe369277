"""Updates at constant shares: cuts, widening, and layers that hold them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phatgoose.errors import RoutingError
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.export.updates import (
    AddedUpdate,
    Update,
    cut,
    fixed_update,
    merged_layer,
    widened_to,
)
from tiny import random

UPDATE = Update(random(6, 9, seed=1), random(7, 6, seed=2))


@pytest.mark.parametrize("rank", [None, 1, 4, 6, 8])
def test_a_cut_is_the_nearest_update_of_its_rank(rank):
    found, loss = cut(UPDATE, rank)
    exact = UPDATE.B.double() @ UPDATE.A.double()
    kept = min(rank or 6, 6)
    lost = float(torch.linalg.svdvals(exact)[kept:].norm())
    assert (loss.rank, loss.of, found.rank) == (kept, 6, kept)
    assert loss.lost == pytest.approx(lost, abs=1e-9)
    assert loss.norm == pytest.approx(float(exact.norm()))
    assert float((exact - found.B.double() @ found.A.double()).norm()) == pytest.approx(
        lost, abs=1e-5
    )
    assert found is UPDATE or kept < 6


def test_more_ranks_than_the_layer_has_are_brought_down():
    update = Update(random(12, 5, seed=1), random(7, 12, seed=2))
    found, loss = cut(update)
    assert (loss.rank, loss.of) == (5, 12)
    assert loss.lost < 1e-10 * loss.norm
    torch.testing.assert_close(found.B @ found.A, update.B @ update.A, rtol=1e-4, atol=1e-4)
    wide = widened_to(found, 8)
    assert (wide.A.shape, wide.B.shape) == ((8, 5), (7, 8))
    torch.testing.assert_close(wide.B @ wide.A, found.B @ found.A)


def test_no_update_has_no_rank():
    nothing = Update(torch.zeros(0, 5), torch.zeros(7, 0))
    assert nothing.is_nothing
    assert cut(nothing)[1].norm == 0


def test_layers_hold_an_update_beside_or_inside_their_weight(llama, llama_pool):
    parts = composition_of(compose(llama_pool, llama, k=2))
    layer = next(iter(parts.layers.values()))
    u, site = random(3, layer.in_features), layer.site.name
    shares = torch.tensor([0.5, 0.0, 1.5, 0.0], dtype=torch.float64)
    update = fixed_update(layer, shares, parts)
    assert update.rank == 8
    wanted = layer.base(u)
    for share, expert in zip(shares.tolist(), llama_pool.experts, strict=True):
        lora = expert.lora[site]
        wanted = wanted + share * lora.scale * u @ lora.A.T @ lora.B.T
    before = layer.base.weight.clone()
    torch.testing.assert_close(AddedUpdate(layer.base, update)(u), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged_layer(layer, update)(u), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.base.weight, before)
    assert type(merged_layer(layer, update)) is nn.Linear
    alone = fixed_update(layer, torch.tensor([0.0, 1.0, 0.0, 0.0]), parts)
    assert torch.equal(alone.A, llama_pool.experts[1].lora[site].A)
    assert fixed_update(layer, torch.zeros(4), parts).is_nothing
    layer.base.weight = nn.Parameter(before.to("meta"), requires_grad=False)
    with pytest.raises(RoutingError, match="quantised or kept elsewhere"):
        merged_layer(layer, update)
