"""Sites: the linear layers that experts act at."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from architectures import make_other, random_expert
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.sites import find_sites
from tiny import make_ids

SITES_PER_BLOCK = {"llama": 7, "qwen2": 7, "gpt2": 4, "t5": 7 + 11}  # both of T5's kinds of block
ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "gpt2": "attn", "t5": "Attention"}


def test_sites_are_the_linear_layers_of_every_block_in_the_order_of_the_model(base, kind):
    sites = find_sites(base.model)
    assert len(sites) == 2 * SITES_PER_BLOCK[kind]
    for name, site in sites.items():
        layer = base.model.get_submodule(name)
        assert isinstance(layer, nn.Linear | Conv1D)
        assert site.name == name
        assert layer(torch.zeros(3, site.in_features)).shape == (3, site.out_features)
        assert layer is not base.model.get_output_embeddings()
    names = [name for name, _ in base.model.named_modules() if name in sites]
    assert names == list(sites)
    some = find_sites(base.model, ATTENTION[kind])
    assert some.keys() == {name for name in names if ATTENTION[kind] in name} != set()
    for pattern in ("(", "no_such_layer"):
        with pytest.raises(ConfigError, match=re.escape(pattern)):
            find_sites(base.model, pattern)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.0}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8}),
    ],
)
def test_routers_of_mixtures_that_are_linear_layers_by_name_only_are_no_sites(
    architecture, settings
):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 259}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(architecture, **sizes, **heads, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert any("Router" in type(module).__name__ for module in model.modules())
    assert all("_proj" in name for name in find_sites(model))
    pool, ids = Pool(tuple(random_expert(model, seed) for seed in range(2))), make_ids()
    assert compose(pool, model, router="phatgoose")(input_ids=ids).logits.isfinite().all()


ENCODERS = {
    "bart": r"\.encoder\.|encoder_attn\.[kv]_proj",
    "nllb-moe": r"\.encoder\.|cross_attention\.[kv]_proj",
    "prophetnet": r"\.encoder\.|cross_attn\.(key|value)_proj",
    "t5": r"^encoder\.|EncDecAttention\.[kv]$",
}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_keys_and_values_of_cross_attention_see_the_encoders_tokens(architecture, loaded_bases):
    assert {site.stream for site in find_sites(loaded_bases["llama"].model).values()} == {"decoder"}
    t5 = loaded_bases["t5"].model
    sites = find_sites(t5 if architecture == "t5" else make_other(architecture))
    for name, site in sites.items():
        wanted = "encoder" if re.search(ENCODERS[architecture], name) else "decoder"
        assert site.stream == wanted, name
    assert {site.stream for site in sites.values()} == {"encoder", "decoder"}
