"""The audit: planted attackers are found, honest experts are not accused."""

from __future__ import annotations

import json
import math

import pytest

from mixed_experts import mixed_pool_for
from phatgoose.analysis import audit as neutral
from phatgoose.analysis.audit import LIMITS, audit
from phatgoose.experts.pool import Pool
from planted import ATTACKS, HARMLESS, attacked, honest


@pytest.fixture
def pool(pool_of) -> Pool:
    return honest(pool_of("llama", (4,) * 8))


def test_honest_experts_are_not_accused(pool, llama, monkeypatch):
    monkeypatch.setattr(neutral, "can_embed", lambda: False)
    assert audit(pool).findings == ()
    whole = audit(pool, llama)
    assert whole.findings == ()
    assert whole.summary == ""
    assert whole.notes == ()
    assert audit(Pool(pool.experts[:5])).findings == ()


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("name", [*ATTACKS, *HARMLESS])
def test_an_attacker_is_found_and_no_one_else(pool, name, strength):
    attack = {**ATTACKS, **HARMLESS}[name]
    for z in (0, 5):
        report = audit(attacked(pool, z, attack, seed=z, strength=strength))
        assert report.unusual == (pool.names[z],), report.findings
        assert pool.names[z] in report.summary
        for finding in report.findings:
            assert finding.kind in LIMITS
            assert f"--leave-out {pool.names[z]}" in finding.message


def test_a_longer_gate_is_said_to_be_harmless_to_phatgoose(pool):
    report = audit(attacked(pool, 1, HARMLESS["scaled gate"], 0, 1))
    (finding,) = report.findings
    assert "harmless with router phatgoose" in finding.message
    assert "1e+03 times" in finding.message or "times as long" in finding.message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_experts_are_not_compared_and_that_is_said(pool, count):
    few = Pool(pool.experts[:count])
    assert audit(few).findings == ()
    assert "too few to compare" in audit(few).notes[0]
    if count > 1:
        turned = attacked(few, 0, ATTACKS["gate equal to own mean"], 0, 1)
        assert audit(turned).unusual == ("e0",)
        copied = attacked(few, 0, ATTACKS["copied embeddings"], 0, 1)
        assert "e0" in audit(copied).unusual


def test_mixed_kinds_without_embeddings_are_audited_by_what_they_have(llama, tmp_path):
    report = audit(mixed_pool_for(llama, tmp_path))
    assert report.findings == ()
    assert any("too few to compare the sizes" in note for note in report.notes)
    assert any(note.startswith("No embeddings") for note in report.notes)


def test_the_json_has_numbers_limits_and_findings(pool, tmp_path):
    report = audit(attacked(pool, 3, ATTACKS["scaled update"], 0, 1))
    report.write_json(tmp_path / "audit.json")
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["experts"] == list(pool.names)
    assert content["signs"]["update_size"][3] > content["limits"]["update_size"]
    assert content["findings"][0]["experts"] == ["e3"]
    assert report.median("update_size") == pytest.approx(1, abs=0.2)


def test_numbers_that_json_lacks_are_null(pool):
    few = audit(Pool(pool.experts[:2]))
    assert few.signs["update_size"] == (None, None)
    assert few.median("update_size") is None
    assert all(math.isfinite(v) for row in few.signs.values() for v in row if v is not None)
