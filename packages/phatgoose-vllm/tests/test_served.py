"""What vLLM's plugin opens, and which share of it a layer gets; without vLLM."""

from types import SimpleNamespace

import pytest
import torch

import phatgoose_vllm as vllm
from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach, save
from phatgoose_vllm import served
from phatgoose_vllm.served import Section, Share, open_served, parts_of, place_of
from routed_models import tailed
from tiny import make_model, random, write_expert

QKV = {0: "q_proj", 1: "k_proj", 2: "v_proj"}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SITE = "model.layers.0.self_attn.q_proj"


def qkv(rank, size):
    """As vLLM splits it: by heads; keys' heads are copied where they are fewer than processes."""
    keys = Section(8, max(1, 2 // size) * 4)
    return Share(16, 16, (Section(32, 32 // size), keys, keys), rank, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_shares_of_a_packed_layer_make_up_the_whole(size):
    queries, keys = random(32, 16), random(8, 16, seed=1)
    for rank in range(size):
        parts = parts_of("qkv_proj", qkv(rank, size), QKV, 3)
        assert [part.first for part in parts] == [0, 32 // size, 32 // size + parts[1].width]
        assert torch.equal(parts[0].of(queries, 0), queries.chunk(size)[rank])
        # Two heads of keys: with four processes two have the first one, with eight four.
        assert torch.equal(
            parts[1].of(keys, 0), keys.chunk(min(size, 2))[rank * min(size, 2) // size]
        )


@pytest.mark.parametrize("size", [1, 2])
def test_a_layer_that_the_base_has_packed_is_split_section_by_section(size):
    whole = torch.arange(32 + 8 + 8)
    for rank in range(size):
        (part,) = parts_of("c_attn", qkv(rank, size), {0: "c_attn"}, 1)
        wanted = torch.cat([s.chunk(size)[rank] for s in torch.split(whole, [32, 8, 8])])
        assert torch.equal(part.of(whole), wanted)
        assert (part.first, part.width) == (0, 48 // size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_updates_of_all_shares_add_up(size):
    """Megatron's two splits, applied to W u + B A u: outputs are joined, inputs summed."""
    u, A, B = random(5, 16), random(3, 4, 16, seed=1), random(3, 4, 32, seed=2)
    joined, summed = [], 0
    for rank in range(size):
        outputs = Share(16, 16, (Section(32, 32 // size),), rank, size)
        (part,) = parts_of("up", outputs, {0: "up"}, 1)
        joined.append(torch.einsum("tn,ern,erd->td", u, A, part.of(B)))
        columns = Share(16, 16 // size, (Section(32, 32),), rank, size).columns
        summed = summed + torch.einsum("tn,ern,erd->td", u[:, columns], A[..., columns], B)
    for got in (torch.cat(joined, dim=-1), summed):
        torch.testing.assert_close(got, torch.einsum("tn,ern,erd->td", u, A, B))


@pytest.mark.parametrize(
    ("site", "renamed", "wanted"),
    [
        (SITE, SITE, ("model.layers.0.self_attn.qkv_proj", 0, 3)),
        # vLLM's newer mappers name the packed layer themselves.
        (SITE, SITE.replace("q_", "qkv_"), ("model.layers.0.self_attn.qkv_proj", 0, 3)),
        ("h.1.up_proj", "model.h.1.up_proj", ("model.h.1.gate_up_proj", 1, 2)),
        ("h.0.attn.c_attn", "h.0.attn.c_attn", ("h.0.attn.c_attn", 0, 1)),
        ("h.0.attn.c_attn", None, ("", 0, 1)),  # vLLM leaves this weight out
    ],
)
def test_where_a_site_is_in_vllms_model(site, renamed, wanted):
    assert place_of(site, PACKED, lambda _: renamed and f"{renamed}.weight") == wanted


# What the environment names.


@pytest.fixture
def serve(monkeypatch, tmp_path, llama):
    """A function that saves a pool composed by a router, and opens it as vLLM's processes do."""

    def opened(pool, router="phatgoose", **settings):
        model = compose(pool, llama, router=router, **settings)
        save(model, tmp_path / "routed", overwrite=True)
        detach(model)
        monkeypatch.setenv(served.MODEL, str(tmp_path / "routed"))
        return open_served()

    return opened


ALONE = Share(32, 32, (Section(32, 32),))
(PART,) = parts_of("q_proj", ALONE, {0: SITE}, 1)


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow"])
def test_a_saved_model_gives_the_layers_what_ours_has(serve, llama_pool, llama, router):
    opened = serve(llama_pool, router, k=2)
    layer = compose(llama_pool, llama, router=router, k=2).get_submodule(SITE)
    assert opened.names == llama_pool.names
    experts = opened.experts(PART, ALONE, torch.float32)
    assert torch.equal(experts.A, layer.A)
    assert torch.equal(experts.B, layer.B)
    for name, tensor in layer.at_site.state().items():
        assert torch.equal(experts.state[name], tensor)
    u = random(6, 32)
    decision = opened.router.decision(u, SimpleNamespace(**experts.numbers, **experts.state))
    assert torch.equal(decision.experts, layer.at_site(u).experts)


@pytest.mark.parametrize("rank", [8, 2])  # where our own model folds too, and where it doesn't
def test_the_mean_of_all_experts_is_folded_as_in_our_own_model(serve, llama, tmp_path, rank):
    pool = Pool([write_expert(llama, tmp_path, f"e{i}", rank=rank) for i in range(4)])
    opened, inputs = serve(pool, "merged"), random(5, 32)
    weight = llama.model.get_submodule(SITE).weight.detach().clone()
    layer = compose(pool, llama, router="merged").get_submodule(SITE)
    whole, half = opened.folded(PART, ALONE, weight), Share(32, 16, (Section(32, 32),), 1, 2)
    wanted = torch.nn.functional.linear(inputs, whole)
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(opened.folded(PART, half, weight[:, 16:]), whole[:, 16:])
    assert not torch.equal(whole, weight)


def test_vllms_default_type_and_device_change_no_number(serve, llama_pool):
    """vLLM builds a model with both set, and a LoRA's scale of 1/3, say, isn't a bfloat16."""
    wanted = serve(llama_pool).experts(PART, ALONE, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = open_served().experts(PART, ALONE, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("A", "B"):
        assert torch.equal(getattr(got, name), getattr(wanted, name))
    assert torch.equal(got.state["vectors"], wanted.state["vectors"])


def test_what_vllm_cant_run_is_refused_with_what_to_do(serve, llama_pool, llama_mixed):
    with pytest.raises(RoutingError, match=r"q_proj: the experts map"):
        serve(llama_pool).experts(PART, Share(48, 48, ALONE.sections), torch.float32)
    half = Share(32, 16, (Section(32, 32),), 0, 2)
    with pytest.raises(ConfigError, match="Router arrow reads all inputs"):
        serve(llama_pool, "arrow").experts(PART, half, torch.float32)
    opened = serve(llama_mixed)
    (part,) = parts_of("layer", ALONE, {0: opened.sites[0]}, 1)
    with pytest.raises(RoutingError, match=r"of another kind or have biases.*leave-out"):
        opened.experts(part, ALONE, torch.float32)
    for router, why in (
        ("discriminant", "reads the whole prompt.*gateway"),
        ("random", "draws lots"),
    ):
        with pytest.raises(ConfigError, match=f"Router {router} {why}"):
            serve(llama_pool, router)
    with pytest.raises(ConfigError, match=r"act from a prompt's end on.*by 'phatgoose serve'\.$"):
        serve(tailed(llama_pool.experts, (3, None, None, None)))


def test_a_place_without_a_routed_model_ends_vllm_at_once(tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for place in ("", "nowhere", "hub:someone/expert@main", "base"):
        with pytest.raises(ConfigError, match="wanted a routed model's folder"):
            served.check_place(place)
    monkeypatch.delenv(served.MODEL, raising=False)
    vllm.register()  # without the variable nothing is imported
