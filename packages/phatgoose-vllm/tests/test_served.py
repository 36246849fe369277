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
from tiny import make_model, random, write_expert

QKV = {0: "q_proj", 1: "k_proj", 2: "v_proj"}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SITE = "model.layers.0.self_attn.q_proj"


def qkv(rank: int, size: int, heads: int = 8, keys: int = 2, head: int = 4) -> Share:
    """As vLLM splits it: by heads; keys' heads are copied where they are fewer than processes."""
    held = heads // size * head
    held_keys = max(1, keys // size) * head
    sections = (Section(heads * head, held), *[Section(keys * head, held_keys)] * 2)
    return Share(16, 16, sections, rank, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_shares_of_a_packed_layer_make_up_the_whole(size):
    weights = [random(rows, 16, seed=rows) for rows in (32, 8, 9 - 1)]
    for rank in range(size):
        parts = parts_of("qkv_proj", qkv(rank, size), QKV, 3)
        assert [part.first for part in parts] == [0, 32 // size, 32 // size + parts[1].width]
        queries, keys, _ = (part.of(w, 0) for part, w in zip(parts, weights, strict=True))
        assert torch.equal(queries, weights[0].chunk(size)[rank])
        # Two heads of keys: with four processes two have the first one, with eight four.
        assert torch.equal(keys, weights[1].chunk(min(size, 2))[rank * min(size, 2) // size])


@pytest.mark.parametrize("size", [1, 2])
def test_a_layer_that_the_base_has_packed_is_split_section_by_section(size):
    whole = torch.arange(32 + 8 + 8)
    for rank in range(size):
        (part,) = parts_of("c_attn", qkv(rank, size), {0: "c_attn"}, 1)
        wanted = torch.cat([s.chunk(size)[rank] for s in torch.split(whole, [32, 8, 8])])
        assert torch.equal(part.of(whole), wanted)
        assert (part.first, part.width) == (0, 48 // size)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_updates_of_all_shares_add_up(size, tokens):
    """Megatron's two splits, applied to W u + B A u: outputs are joined, inputs summed."""
    u, A, B = random(tokens, 16), random(3, 4, 16, seed=1), random(3, 4, 32, seed=2)
    whole = torch.einsum("tn,ern,erd->td", u, A, B)
    joined, summed = [], 0
    for rank in range(size):
        outputs = Share(16, 16, (Section(32, 32 // size),), rank, size)
        (part,) = parts_of("up", outputs, {0: "up"}, 1)
        joined.append(torch.einsum("tn,ern,erd->td", u, A, part.of(B)))
        inputs = Share(16, 16 // size, (Section(32, 32),), rank, size)
        mine = A[..., inputs.columns]
        summed = summed + torch.einsum("tn,ern,erd->td", u[:, inputs.columns], mine, B)
    torch.testing.assert_close(torch.cat(joined, dim=-1), whole)
    torch.testing.assert_close(summed, whole)


@pytest.mark.parametrize(
    ("site", "rename", "wanted"),
    [
        (SITE, lambda n: n, ("model.layers.0.self_attn.qkv_proj", 0, 3)),
        # vLLM's newer mappers name the packed layer themselves.
        (
            SITE,
            lambda n: n.replace("q_proj", "qkv_proj"),
            ("model.layers.0.self_attn.qkv_proj", 0, 3),
        ),
        (
            "h.1.mlp.up_proj",
            lambda n: f"transformer.{n}",
            ("transformer.h.1.mlp.gate_up_proj", 1, 2),
        ),
        ("h.0.attn.c_attn", lambda n: n, ("h.0.attn.c_attn", 0, 1)),
        ("h.0.attn.c_attn", lambda n: None, ("", 0, 1)),  # vLLM leaves this weight out
    ],
)
def test_where_a_site_is_in_vllms_model(site, rename, wanted):
    assert place_of(site, PACKED, rename) == wanted


# What the environment names.


@pytest.fixture
def serve(monkeypatch, tmp_path, llama):
    """A function that saves a pool composed by a router, and opens it as vLLM's processes do."""

    def opened(pool, router: str = "phatgoose", **settings) -> served.Served:
        model = compose(pool, llama, router=router, **settings)
        folder = tmp_path / f"routed-{router}"
        save(model, folder, overwrite=True)
        detach(model)
        monkeypatch.setenv(served.MODEL, str(folder))
        return open_served()

    return opened


ALONE = Share(32, 32, (Section(32, 32),))
(PART,) = parts_of("q_proj", ALONE, {0: SITE}, 1)


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow", "spectr"])
def test_a_saved_model_gives_the_layers_what_ours_has(serve, llama_pool, llama, router):
    opened = serve(llama_pool, router, k=2)
    layer = compose(llama_pool, llama, router=router, k=2).get_submodule(SITE)
    assert opened.names == llama_pool.names
    experts = opened.experts(PART, ALONE, torch.float32)
    assert torch.equal(experts.A, layer.A)
    assert torch.equal(experts.B, layer.B)
    for name, tensor in layer.router.state().items():
        assert torch.equal(experts.state[name], tensor)
    u = random(6, 32)
    table = SimpleNamespace(**experts.numbers, **experts.state)
    decision = opened.router.decision(u, table)
    assert torch.equal(decision.experts, layer.router(u).experts)


def test_the_mean_of_all_experts_is_folded_as_in_our_own_model(serve, llama, tmp_path):
    for rank in (8, 2):  # ranks at which our own model folds too, and at which it doesn't
        names = [f"e{i}-{rank}" for i in range(4)]
        pool = Pool([write_expert(llama, tmp_path, name, rank=rank) for name in names])
        opened = serve(pool, "merged")
        weight = llama.model.get_submodule(SITE).weight.detach().clone()
        model = compose(pool, llama, router="merged")
        layer = model.get_submodule(SITE)
        inputs = random(5, 32)
        wanted = torch.nn.functional.linear(inputs, opened.folded(PART, ALONE, weight))
        torch.testing.assert_close(layer(inputs), wanted, rtol=1e-4, atol=1e-4)
        whole, half = opened.folded(PART, ALONE, weight), Share(32, 16, (Section(32, 32),), 1, 2)
        torch.testing.assert_close(opened.folded(PART, half, weight[:, 16:]), whole[:, 16:])
        assert not torch.equal(whole, weight)
        detach(model)


def test_vllms_default_type_and_device_change_no_number(serve, llama_pool):
    """vLLM builds a model with both set, and a LoRA's scale of 1/3, say, isn't a bfloat16."""
    wanted = serve(llama_pool).experts(PART, ALONE, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = open_served().experts(PART, ALONE, torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.A, wanted.A)
    assert torch.equal(got.B, wanted.B)
    assert torch.equal(got.state["vectors"], wanted.state["vectors"])


def test_experts_that_vllm_cant_add_are_refused(serve, llama_pool, llama_mixed):
    opened = serve(llama_pool)
    with pytest.raises(RoutingError, match=r"q_proj: the experts map"):
        opened.experts(PART, Share(48, 48, ALONE.sections), torch.float32)
    half = Share(32, 16, (Section(32, 32),), 0, 2)
    with pytest.raises(ConfigError, match="Router spectr reads all inputs"):
        serve(llama_pool, "spectr").experts(PART, half, torch.float32)
    opened = serve(llama_mixed)
    (part,) = parts_of("layer", ALONE, {0: opened.sites[0]}, 1)
    with pytest.raises(RoutingError, match=r"of another kind or have biases.*leave-out"):
        opened.experts(part, ALONE, torch.float32)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("discriminant", "Router discriminant reads the whole prompt.*gateway"),
        ("random", "Router random draws lots"),
    ],
)
def test_routers_that_vllm_cant_run_are_refused_with_what_to_do(serve, llama_pool, router, message):
    with pytest.raises(ConfigError, match=message):
        serve(llama_pool, router)


@pytest.mark.parametrize("place", ["", "nowhere", "hub:someone/expert@main", "base"])
def test_a_place_without_a_routed_model_ends_vllm_at_once(tmp_path, monkeypatch, place):
    make_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="wanted a routed model's folder"):
        served.check_place(place)


def test_without_the_variable_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(served.MODEL, raising=False)
    vllm.register()
