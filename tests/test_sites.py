import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import logits_of, make_ids
from phatgoose.errors import ConfigError
from phatgoose.sites import TokenMasks, find_sites, replace_module, watch_inputs

SITES_PER_BLOCK = {
    "llama": 7,
    "qwen2": 7,
    "gpt2": 4,
    "t5": 7 + 11,
}  # an encoder and a decoder block
ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "gpt2": "attn", "t5": "Attention"}


def first_decoder_site(sites):
    return next(name for name, site in sites.items() if site.stream == "decoder")


def test_every_linear_layer_of_every_block_is_a_site(base, kind):
    assert len(find_sites(base.model)) == 2 * SITES_PER_BLOCK[kind]


def test_embeddings_and_heads_are_no_sites(base):
    layers = {id(base.model.get_submodule(name)) for name in find_sites(base.model)}
    assert id(base.model.get_output_embeddings()) not in layers
    assert id(base.model.get_input_embeddings()) not in layers


def test_shapes_are_those_of_the_layers_product(base):
    for name, site in find_sites(base.model).items():
        layer = base.model.get_submodule(name)
        assert isinstance(layer, nn.Linear | Conv1D)
        assert site.name == name
        assert layer(torch.zeros(3, site.in_features)).shape == (3, site.out_features)


def test_sites_come_in_the_order_of_the_model(base):
    names = [name for name, _ in base.model.named_modules()]
    places = [names.index(site) for site in find_sites(base.model)]
    assert places == sorted(places)


def test_a_pattern_keeps_matching_sites(base, kind):
    sites = find_sites(base.model, ATTENTION[kind])
    assert sites
    assert sites.keys() == {name for name in find_sites(base.model) if ATTENTION[kind] in name}


@pytest.mark.parametrize("pattern", ["(", "no_such_layer"])
def test_a_pattern_that_is_none_or_matches_nothing_is_refused(llama, pattern):
    with pytest.raises(ConfigError, match=pattern.replace("(", r"\(")):
        find_sites(llama.model, pattern)


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_all_sites_of_a_causal_model_see_its_tokens(base):
    assert {site.stream for site in find_sites(base.model).values()} == {"decoder"}


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_keys_and_values_of_cross_attention_see_the_encoders_tokens(base):
    streams = {name: site.stream for name, site in find_sites(base.model).items()}
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert streams[f"{cross}.k"] == streams[f"{cross}.v"] == "encoder"
    assert streams[f"{cross}.q"] == streams[f"{cross}.o"] == "decoder"
    assert streams["encoder.block.0.layer.0.SelfAttention.k"] == "encoder"
    assert streams["decoder.block.0.layer.0.SelfAttention.k"] == "decoder"


def test_sites_are_the_layers_through_which_tokens_of_their_stream_pass(base):
    seen = {}
    inputs = {"decoder_input_ids": make_ids(tokens=3)} if base.is_encoder_decoder else {}
    sites = find_sites(base.model)
    with watch_inputs(base.model, sites, lambda site, u, _: seen.update({site.name: u.shape})):
        logits_of(base.model, make_ids(tokens=7), **inputs)
    for name, site in sites.items():
        tokens = 3 if base.is_encoder_decoder and site.stream == "decoder" else 7
        assert seen[name] == (1, tokens, site.in_features)


def test_a_module_can_be_replaced_by_name(llama):
    layer = nn.Linear(32, 32)
    replace_module(llama.model, "model.layers.1.self_attn.q_proj", layer)
    assert llama.model.model.layers[1].self_attn.q_proj is layer


def test_without_a_mask_every_token_is_real(base):
    masks = TokenMasks().attach(base.model)
    logits_of(base.model, make_ids(rows=2))
    assert masks.real_tokens(torch.empty(2, 7, 32), "decoder") is None


def test_masks_are_those_of_the_present_call(base):
    masks, ids = TokenMasks().attach(base.model), make_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits_of(base.model, ids, attention_mask=mask)
    stream = "encoder" if base.is_encoder_decoder else "decoder"
    assert torch.equal(masks.real_tokens(torch.empty(2, 7, 32), stream), mask.bool())
    assert masks.real_tokens(torch.empty(2, 6, 32), stream) is None
    logits_of(base.model, ids)
    assert masks.real_tokens(torch.empty(2, 7, 32), stream) is None


def test_with_a_cache_the_mask_is_cut_to_the_present_tokens(llama):
    sites, seen = find_sites(llama.model, "layers.0.self_attn.q_proj"), []
    ids = make_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with watch_inputs(llama.model, sites, lambda _, u, real: seen.append(real)):
        llama.model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3)
    assert torch.equal(seen[0], mask.bool())
    assert seen[1:] == [None, None]  # all that is passed then is real


def test_a_mask_that_hides_nothing_is_none(llama):
    sites, seen = find_sites(llama.model, "layers.0.self_attn.q_proj"), []
    with watch_inputs(llama.model, sites, lambda _, u, real: seen.append(real)), torch.no_grad():
        llama.model(make_ids(rows=2), attention_mask=torch.ones_like(make_ids(rows=2)))
    assert seen == [None]


def test_masks_can_be_given_by_position(llama):
    masks, ids = TokenMasks().attach(llama.model), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad():
        llama.model.model(ids, mask)
    assert torch.equal(masks.real_tokens(torch.empty(1, 7, 32), "decoder"), mask.bool())


def test_detached_masks_watch_nothing(base):
    masks = TokenMasks().attach(base.model)
    masks.detach()
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_watching_ends_with_its_context_even_after_an_error(llama):
    def stop(*_):
        raise LookupError

    with pytest.raises(LookupError), watch_inputs(llama.model, find_sites(llama.model), stop):
        logits_of(llama.model, make_ids())
    assert not any(module._forward_pre_hooks for module in llama.model.modules())


def test_watching_hands_over_input_and_mask(llama):
    sites, seen = find_sites(llama.model), {}
    name = first_decoder_site(sites)
    ids = make_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with watch_inputs(
        llama.model, {name: sites[name]}, lambda _, u, real: seen.update({0: (u, real)})
    ):
        logits_of(llama.model, ids, attention_mask=mask)
    u, real = seen[0]
    first = llama.model.model.layers[0].input_layernorm(llama.model.get_input_embeddings()(ids))
    assert torch.equal(u, first)
    assert torch.equal(real, mask.bool())
