"""Router seqr beside lengths of whole updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from phatgoose.routing.saved import add_to_saved
from tiny import logits_of, make_ids, random

SITE = "model.layers.0.self_attn.q_proj"  # of the tiny Llama


def lengths(pool: Pool, u: Tensor) -> Tensor:
    """|scale B A u| of every token and expert, without any factorisation, float64 [T, E]."""
    loras = [expert.lora[SITE] for expert in pool.experts]
    updates = [lora.scale * lora.B.double() @ lora.A.double() for lora in loras]
    return torch.stack([(u.double() @ each.T).norm(dim=-1) for each in updates], dim=1)


def test_scores_are_lengths_of_updates_in_units_of_neutral_text(llama, llama_pool, read_neutrally):
    usual, u = lengths(llama_pool, read_neutrally(llama)[SITE]), random(30, 32)
    wanted = (lengths(llama_pool, u) - usual.mean(dim=0)) / usual.std(dim=0, correction=0)
    at_site = composition_of(compose(llama_pool, llama, router="seqr")).layers[SITE].at_site
    torch.testing.assert_close(
        at_site.router.scores(u, at_site).double(), wanted, atol=2e-3, rtol=2e-3
    )
    decision = at_site(u)
    assert torch.equal(decision.experts[:, 0], wanted.argmax(dim=1))
    assert len(decision.experts.unique()) > 1
    assert torch.equal(decision.weights, torch.ones(30, 1))


def test_it_is_saved_and_wants_a_tokenizer_and_the_base_to_stay(llama, llama_pool, tmp_path):
    with pytest.raises(ConfigError, match="reads neutral text; hand the base over with its tok"):
        compose(llama_pool, llama.model, router="seqr")
    model, ids = compose(llama_pool.select(["e0", "e1"]), llama, router="seqr"), make_ids()
    wanted = logits_of(model, ids)
    save(model, tmp_path / "routed")
    with pytest.raises(RoutingError, match="compose the pool again"):
        add_to_saved(tmp_path / "routed", llama_pool.select(["e2"]))
    detach(model)
    assert torch.equal(logits_of(load(tmp_path / "routed", llama), ids), wanted)
