"""Signs over neutral text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixed_experts import mixed_pool_for
from phatgoose.analysis import audit as neutral
from phatgoose.analysis.audit import neutral_signs, read_neutral_text
from phatgoose.base.sites import find_sites
from phatgoose.experts.kinds.lora.module import LoraFactors
from phatgoose.experts.pool import Pool
from planted import DIMS, honest


@pytest.fixture
def text(llama, monkeypatch):
    def embed(examples):
        rows = torch.randn(len(examples), DIMS, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.normalize(rows, dim=-1)

    monkeypatch.setattr(neutral, "can_embed", lambda: True)
    monkeypatch.setattr(neutral, "embed_texts", embed)
    return read_neutral_text(llama, list(find_sites(llama.model)))


def test_shares_are_of_everything_and_effects_relative(llama, pool_of, text):
    pool = honest(pool_of("llama", (4,) * 6))
    found = neutral_signs(pool, llama, text)
    for name in ("gate_neutral", "retrieval_neutral", "centroid_neutral"):
        assert found[name].sum() == pytest.approx(1), name
    assert float(found["update_effect"].quantile(0.5)) == pytest.approx(1, rel=0.5)


def test_a_larger_update_has_a_larger_effect_in_proportion(llama, pool_of, text):
    pool = honest(pool_of("llama", (4,) * 6))
    before = neutral_signs(pool, llama, text)["update_effect"]
    z = int(before.argmax())
    larger = {s: replace(m, scale=50 * m.scale) for s, m in pool.experts[z].lora.items()}
    assert all(isinstance(module, LoraFactors) for module in larger.values())
    experts = list(pool.experts)
    experts[z] = replace(experts[z], modules=larger)
    after = neutral_signs(Pool(tuple(experts)), llama, text)["update_effect"]
    assert after[z] == pytest.approx(50 * float(before[z]), rel=0.05)  # the median moves a little


def test_kinds_are_compared_by_what_they_change(llama, tmp_path, text):
    found = neutral_signs(mixed_pool_for(llama, tmp_path), llama, text)
    assert not found["update_effect"].isnan().any()
    assert "centroid_neutral" not in found  # without embeddings


def test_without_an_embedder_nothing_is_embedded(llama, monkeypatch):
    monkeypatch.setattr(neutral, "can_embed", lambda: False)
    assert read_neutral_text(llama, list(find_sites(llama.model))[:1]).vectors is None
