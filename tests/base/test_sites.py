"""Sites: the linear layers that experts act at; positions, which no input runs over."""

import re
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from architectures import make_tiny, random_expert
from phatgoose.apps.generation import generate
from phatgoose.base import Base, fingerprint, load_skeleton
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


IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
FEW = {"vocab_size": 300, "max_position_embeddings": 40} | IDS
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 16}
GPT2 = {"vocab_size": 300, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2} | IDS
OPT = FEW | SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
BART |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
KINDS_HERE = {"gpt2": GPT2, "opt": OPT, "bart": FEW | BART}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        *((kind, settings, 40) for kind, settings in KINDS_HERE.items()),
        ("llama", FEW | LLAMA, 40),
        ("t5", T5, None),
    ],
)
def test_positions_are_those_of_the_config(kind, settings, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_skeleton(AutoConfig.for_model(kind, **settings))
    assert positions_of(model) == wanted


LONG = "a passage of far more than twenty-four letters. Is it so?"
CHOOSING = Task("choosing", test=(Example(LONG, "yes", ("yes", "no, never")),) * 2)
WRITING = Task("writing", test=(Example(LONG, "yes"),))


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_scoring_and_generation_leave_room_for_the_answer(kind):
    torch.manual_seed(0)
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config = AutoConfig.for_model(kind, **{**KINDS_HERE[kind], name: 24})
    auto = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    model.generation_config.update(pad_token_id=0, forced_eos_token_id=None)
    tokenizer = make_tokenizer(final_eos=kind == "bart")
    base = Base(model, tokenizer, "few", None, fingerprint(model))
    room = (24, 24, 24) if kind == "bart" else (13, 16, 20)  # its decoder has places of its own
    with pytest.warns(UserWarning, match=f"choosing: 2 of 2 inputs cut to {room[0]} tokens"):
        evaluate(base, CHOOSING)
    with pytest.warns(UserWarning, match=f"writing: 1 of 1 input cut to {room[1]} tokens"):
        evaluate(base, WRITING, max_new_tokens=8)
    with pytest.warns(UserWarning, match=f"the prompt: 1 of 1 input cut to {room[2]} tokens"):
        generate(base.model, base.tokenizer, LONG, 4)
