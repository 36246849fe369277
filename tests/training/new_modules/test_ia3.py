"""New (IA)³ vectors: where they are, and whether they scale inputs."""

from __future__ import annotations

import pytest
from torch import nn

from phatgoose.config import IA3, Bottleneck
from phatgoose.errors import ConfigError
from phatgoose.training.new_modules import placed_sites, scales_input


def test_sites_can_be_chosen_and_unknown_models_must_have_them_chosen(llama):
    queries = IA3(sites="q_proj", feedforward="layers.1")
    sites = placed_sites(llama.model, queries)
    assert set(sites) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert scales_input(llama.model, queries, sites) == {"model.layers.1.self_attn.q_proj"}
    gates = Bottleneck(sites="gate_proj", size=2)
    assert {site.rpartition(".")[2] for site in placed_sites(llama.model, gates)} == {"gate_proj"}
    with pytest.raises(ConfigError, match="feedforward is"):
        scales_input(llama.model, IA3(feedforward="("), sites)
    llama.model.config.model_type = "new"
    with pytest.raises(ConfigError, match="of type new isn't known to PEFT"):
        placed_sites(llama.model, IA3())
    llama.model.model.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    with pytest.raises(ConfigError, match="isn't known; name the layers with sites"):
        placed_sites(llama.model, Bottleneck())
