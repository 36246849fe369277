"""Sites: the linear layers that experts act at; positions, which no input runs over."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from architectures import make_tiny, random_expert
from phatgoose.apps.generation import generate
from phatgoose.base.identity import Base, fingerprint
from phatgoose.errors import ConfigError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.sites import find_sites, positions_of
from phatgoose.tasks.task import Example, Task
from tiny import make_ids, make_tokenizer

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


def test_routers_of_mixtures_that_are_linear_layers_by_name_only_are_no_sites():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 259}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = AutoConfig.for_model("phimoe", **sizes, router_jitter_noise=0.0)
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
    sites = find_sites(t5 if architecture == "t5" else make_tiny(architecture))
    for name, site in sites.items():
        wanted = "encoder" if re.search(ENCODERS[architecture], name) else "decoder"
        assert site.stream == wanted, name
    assert {site.stream for site in sites.values()} == {"encoder", "decoder"}


POSITIONS = {"gpt2": "n_positions", "opt": "max_position_embeddings"}
POSITIONS |= {"bart": "max_position_embeddings"}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_those_of_the_config(kind):
    assert positions_of(make_tiny(kind, **{POSITIONS[kind]: 40})) == 40
    assert positions_of(make_tiny("llama", max_position_embeddings=40)) == 40
    assert positions_of(make_tiny("t5")) is None


LONG = "a passage of far more than twenty-four letters. Is it so?"
CHOOSING = Task("choosing", test=(Example(LONG, "yes", ("yes", "no, never")),) * 2)
WRITING = Task("writing", test=(Example(LONG, "yes"),))


@pytest.mark.parametrize("kind", POSITIONS)
def test_scoring_and_generation_leave_room_for_the_answer(kind):
    model = make_tiny(kind, **{POSITIONS[kind]: 24})
    tokenizer = make_tokenizer(final_eos=kind == "bart")
    base = Base(model, tokenizer, "few", None, fingerprint(model))
    room = (24, 24, 24) if kind == "bart" else (13, 16, 20)  # its decoder has places of its own
    with pytest.warns(UserWarning, match=f"choosing: 2 of 2 inputs cut to {room[0]} tokens"):
        evaluate(base, CHOOSING)
    with pytest.warns(UserWarning, match=f"writing: 1 of 1 input cut to {room[1]} tokens"):
        evaluate(base, WRITING, max_new_tokens=8)
    with pytest.warns(UserWarning, match=f"the prompt: 1 of 1 input cut to {room[2]} tokens"):
        generate(base.model, base.tokenizer, LONG, 4)
