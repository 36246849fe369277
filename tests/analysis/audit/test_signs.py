"""Signs of experts, against what they mean, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from phatgoose.analysis.audit_signs import over_sites, ratios, signs_of
from phatgoose.errors import ExpertError
from phatgoose.experts.pool import Pool
from planted import honest


@pytest.fixture
def pool(pool_of) -> Pool:
    return honest(pool_of("llama", (4,) * 6))


def changed(pool: Pool, z: int, **parts: object) -> Pool:
    return Pool((*pool.experts[:z], replace(pool.experts[z], **parts), *pool.experts[z + 1 :]))


def test_ratios_are_to_the_median_and_need_four_numbers():
    assert ratios(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [0.25, 0.5, 1, 2, 4]
    assert ratios(torch.tensor([1.0, math.nan, 2.0, 4.0, math.nan])).isnan().all()
    found = ratios(torch.tensor([0.0, 1.0, 1.0, 1.0, math.nan, math.inf]))
    assert found[1:4].tolist() == [1, 1, 1]
    assert found[0] < 1e-20
    assert found[4].isnan()
    assert found[5] == math.inf


def test_over_sites_are_the_median_and_what_stands_out():
    size, spread = over_sites(torch.tensor([[2.0, 2.0, 8.0], [math.nan, 3.0, 3.0]]).double())
    assert (size.tolist(), spread.tolist()) == ([2, 3], [4, 1])


def test_the_size_of_an_update_is_that_of_its_product(pool):
    found = signs_of(pool)
    norms = torch.tensor(
        [
            [float((m.scale * m.B @ m.A).norm()) for m in expert.lora.values()]
            for expert in pool.experts
        ]
    )
    relative = norms / norms.quantile(0.5, dim=0)
    wanted = relative.quantile(0.5, dim=1)
    torch.testing.assert_close(found["update_size"].float(), wanted, rtol=1e-4, atol=1e-4)
    spread = relative.amax(dim=1) / wanted
    torch.testing.assert_close(found["update_spread"].float(), spread, rtol=1e-4, atol=1e-4)


def test_gates_are_compared_with_means(pool):
    own = changed(pool, 2, gates=pool.experts[2].means)
    before, after = signs_of(pool)["gate_own_mean"], signs_of(own)["gate_own_mean"]
    assert before.abs().max() < 0.5
    assert after[2] == pytest.approx(1)
    assert signs_of(own)["gate_wins"][2] > 0.9
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(after[others], before[others])


def test_copies_are_put_down_to_who_shares_with_most(pool):
    rows = torch.cat([pool.experts[z].embeddings for z in (1, 2, 3)])
    found = signs_of(changed(pool, 0, embeddings=rows))
    assert found["embedding_copies"].tolist() == [1, 0, 0, 0, 0, 0]
    assert found["embedding_wins"][0] == pytest.approx(3 / 5)
    assert found["embedding_count"].tolist() == [3, 1, 1, 1, 1, 1]
    twins = signs_of(changed(pool, 0, embeddings=pool.experts[1].embeddings))
    assert twins["embedding_copies"].tolist() == [1, 1, 0, 0, 0, 0]  # who copied can't be said


def test_experts_have_the_signs_of_what_they_have(pool):
    bare = changed(pool, 1, gates={}, means={}, readings={}, embeddings=None)
    found = signs_of(bare)
    for name, values in found.items():
        assert bool(values[1].isnan()) != name.startswith("update"), name
        assert not values[[0, 2, 3, 4, 5]].isnan().any(), name


def test_numbers_whose_squares_overflow_float32_are_large_and_not_nan(pool):
    readings = {
        name: 1e30 * part if name.endswith("mean") else part
        for name, part in pool.experts[0].readings.items()
    }
    means = {site: 1e30 * mean for site, mean in pool.experts[0].means.items()}
    found = signs_of(changed(pool, 0, readings=readings, means=means))
    assert found["reading_distance"][0] > 1e20
    assert found["mean_distance"][0] > 1e20
    assert not torch.stack(list(found.values())).isnan().any()


def test_embeddings_of_several_embedders_are_not_compared(pool):
    info = replace(pool.experts[0].info, embedder="another")
    assert "embedding_copies" not in signs_of(changed(pool, 0, info=info))


def test_experts_of_other_sizes_are_refused_and_odd_readings_left_out(llama_pool):
    pool = honest(llama_pool)
    odd = {name: part[:, :1] for name, part in pool.experts[0].readings.items()}
    mixed = Pool((replace(pool.experts[0], readings=odd), *pool.experts[1:]))
    found = signs_of(mixed)
    assert found["gate_size"].isfinite().all()
    assert found.get("reading_distance", torch.full((1,), torch.nan))[0].isnan()
    site = pool.sites[0]
    gates = {**pool.experts[0].gates, site: pool.experts[0].gates[site][:-1]}
    with pytest.raises(ExpertError, match="47 numbers for 48 inputs"):
        signs_of(Pool((replace(pool.experts[0], gates=gates), *pool.experts[1:])))


def test_nothing_is_compared_with_a_median_of_zero():
    assert ratios(torch.tensor([0.0, 0, 0, 1, 2])).isnan().all()
