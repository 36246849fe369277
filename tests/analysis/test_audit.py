"""The audit: signs mean what they say, attackers are found, honest experts are not accused."""

import json
import math
from dataclasses import replace

import pytest
import torch

from attackers import ATTACKS, HARMLESS, attacked, honest
from mixed_experts import mixed_pool_for
from phatgoose.analysis.audit import (
    SIGNS,
    audit,
    ratios,
    signs_of,
)
from phatgoose.errors import ExpertError
from phatgoose.experts.pool import Pool


@pytest.fixture
def pool(pool_of) -> Pool:
    return honest(pool_of("llama", (4,) * 8))


def test_honest_experts_are_not_accused(pool):
    whole = audit(pool)
    assert whole.findings == ()
    assert whole.summary == ""
    assert whole.notes == ()
    assert audit(Pool(pool.experts[:5])).findings == ()


@pytest.mark.parametrize("strength", [0, 1])
@pytest.mark.parametrize("name", [*ATTACKS, *HARMLESS])
def test_an_attacker_is_found_and_no_one_else(pool, name, strength):
    attack = {**ATTACKS, **HARMLESS}[name]
    for z in (0, 5):
        report = audit(attacked(pool, z, attack, seed=z, strength=strength))
        assert report.unusual == (pool.names[z],), report.findings
        assert pool.names[z] in report.summary
        for finding in report.findings:
            assert finding.kind in {sign.name for sign in SIGNS}
            assert f"--leave-out {pool.names[z]}" in finding.message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_experts_are_not_compared_and_that_is_said(pool, count):
    few = Pool(pool.experts[:count])
    assert audit(few).findings == ()
    assert "too few to compare" in audit(few).notes[0]
    if count > 1:
        turned = attacked(few, 0, ATTACKS["gate equal to own mean"], 0, 0)
        assert audit(turned).unusual == ("e0",)
        copied = attacked(few, 0, ATTACKS["copied embeddings"], 0, 0)
        assert "e0" in audit(copied).unusual


def test_mixed_kinds_without_embeddings_are_audited_by_what_they_have(llama, tmp_path):
    report = audit(mixed_pool_for(llama, tmp_path))
    assert report.findings == ()
    assert any("too few to compare the sizes" in note for note in report.notes)
    assert any(note.startswith("No embeddings") for note in report.notes)


def test_the_json_has_numbers_limits_and_findings(pool):
    report = audit(attacked(pool, 3, ATTACKS["scaled update"], 0, 0))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["experts"] == list(pool.names)
    assert content["signs"]["update_size"][3] > content["limits"]["update_size"]
    assert content["findings"][0]["experts"] == ["e3"]
    assert report.median("update_size") == pytest.approx(1, abs=0.2)


@pytest.fixture
def six(pool_of) -> Pool:
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


def test_the_size_of_an_update_is_that_of_its_product(six):
    found = signs_of(six)
    norms = torch.tensor(
        [
            [float((m.scale * m.B @ m.A).norm()) for m in expert.lora.values()]
            for expert in six.experts
        ]
    )
    relative = norms / norms.quantile(0.5, dim=0)
    wanted = relative.quantile(0.5, dim=1)
    torch.testing.assert_close(found["update_size"].float(), wanted, rtol=1e-4, atol=1e-4)
    spread = relative.amax(dim=1) / wanted
    torch.testing.assert_close(found["update_spread"].float(), spread, rtol=1e-4, atol=1e-4)


def test_copies_are_put_down_to_who_shares_with_most(six):
    rows = torch.cat([six.experts[z].embeddings for z in (1, 2, 3)])
    found = signs_of(changed(six, 0, embeddings=rows))
    assert found["embedding_copies"].tolist() == [1, 0, 0, 0, 0, 0]
    assert found["embedding_wins"][0] == pytest.approx(3 / 5)
    assert found["embedding_count"].tolist() == [3, 1, 1, 1, 1, 1]
    twins = signs_of(changed(six, 0, embeddings=six.experts[1].embeddings))
    assert twins["embedding_copies"].tolist() == [1, 1, 0, 0, 0, 0]  # who copied can't be said


def test_experts_have_the_signs_of_what_they_have(six):
    bare = changed(six, 1, gates={}, means={}, readings={}, embeddings=None)
    found = signs_of(bare)
    for name, values in found.items():
        assert bool(values[1].isnan()) != name.startswith("update"), name
        assert not values[[0, 2, 3, 4, 5]].isnan().any(), name


def test_numbers_whose_squares_overflow_float32_are_large_and_not_nan(six):
    readings = {
        name: 1e30 * part if name.endswith("mean") else part
        for name, part in six.experts[0].readings.items()
    }
    means = {site: 1e30 * mean for site, mean in six.experts[0].means.items()}
    found = signs_of(changed(six, 0, readings=readings, means=means))
    assert found["reading_distance"][0] > 1e20
    assert found["mean_distance"][0] > 1e20
    assert not torch.stack(list(found.values())).isnan().any()


def test_experts_of_other_sizes_are_refused_and_odd_readings_left_out(llama_pool):
    pool = honest(llama_pool)
    odd = {name: part[:, :1] for name, part in pool.experts[0].readings.items()}
    mixed = Pool((replace(pool.experts[0], readings=odd), *pool.experts[1:]))
    found = signs_of(mixed)
    assert found["gate_size"].isfinite().all()
    assert found.get("reading_distance", torch.full((1,), torch.nan))[0].isnan()
    site = pool.sites[0]
    gates = {**pool.experts[0].gates, site: pool.experts[0].gates[site][:-1]}
    with pytest.raises(ExpertError, match=r"layers of 4[78] and 4[78] features"):
        signs_of(Pool((replace(pool.experts[0], gates=gates), *pool.experts[1:])))
