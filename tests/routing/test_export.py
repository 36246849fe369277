"""Export: what leaves, how near it is, and which shares it mixes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mixed_experts import ordered
from phatgoose.config import Routing
from phatgoose.errors import RoutingError
from phatgoose.routing.compose import compose, composition_of, detach, open_model
from phatgoose.routing.export import (
    EXPORT_INFO,
    export,
    fidelity,
    fixed_update,
    merged_layer,
    prompt_texts,
    shares_for,
)
from phatgoose.routing.layers import FoldedLinear, RoutedLinear
from phatgoose.routing.recording import record
from phatgoose.sites import replaced
from routed_models import compose_by
from tiny import assert_same_logits, logits_of, make_ids, peft_model

PROMPTS = prompt_texts(["Is a heron a bird?", "1 + 2 ="])
each_kind = pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])


def by_transformers(folder, kind):
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


def told_to_be_near(result):
    assert result.fidelity.agreement == 1
    assert 0 <= result.fidelity.difference < 1e-4


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"router": "single:expert=e2"}),
        ("gpt2", {"router": "merged"}),
        ("t5", {"weights": {"e0": 0.7, "e3": -0.2}}),
    ],
)
def test_constant_routing_leaves_exactly_in_either_form(base, kind, pool, tmp_path, options):
    model = compose(pool, base, **options)
    ids = make_ids(rows=2)
    wanted = logits_of(model, ids)
    adapter = export(model, tmp_path / "adapter")
    whole = export(model, tmp_path / "whole", merged=True)
    if "weights" in options:
        assert adapter.shares.whole() == pytest.approx(options["weights"], abs=1e-6)
    assert adapter.lost == whole.lost == 0
    told_to_be_near(adapter)
    told_to_be_near(whole)
    assert_same_logits(logits_of(model, ids), wanted)  # the routed model is as it was
    assert_same_logits(logits_of(peft_model(base, tmp_path / "adapter"), ids), wanted)
    assert_same_logits(logits_of(by_transformers(tmp_path / "whole", kind), ids), wanted)


@each_kind
def test_a_mixture_fixed_for_an_input_is_what_the_router_does_with_it(
    base, kind, pool, tmp_path, toy_embedder
):
    """Centroid mixes three experts for the whole input, so nothing is lost on it."""
    model = compose_by("centroid", pool, base, k=3)
    texts = prompt_texts(["apples, pears and plums"])
    result = export(model, tmp_path / "adapter", texts=texts)
    export(model, tmp_path / "whole", texts=texts, merged=True)
    told_to_be_near(result)
    assert result.fidelity.texts == result.shares.chosen_for == "the prompt"
    shares = list(result.shares.whole().values())
    assert sum(shares) == pytest.approx(1)
    assert sum(share > 0 for share in shares) == 3
    ids = base.tokenizer("apples, pears and plums", return_tensors="pt")["input_ids"]
    wanted = logits_of(model, ids)
    assert_same_logits(logits_of(peft_model(base, tmp_path / "adapter"), ids), wanted)
    assert_same_logits(logits_of(by_transformers(tmp_path / "whole", kind), ids), wanted)


@each_kind
def test_a_mixture_of_a_router_by_token_is_that_of_its_shares_and_says_what_it_loses(
    base, kind, pool, tmp_path
):
    model = compose(pool, base, router="phatgoose", k=2)
    result = export(model, tmp_path / "adapter", texts=PROMPTS)
    assert result.fidelity.difference > 1e-3  # no adapter does what the router does
    assert all(share.sum() == pytest.approx(1) for share in result.shares.by_site.values())
    got = peft_model(base, tmp_path / "adapter")
    for site, shares in result.shares.by_site.items():
        layer = got.base_model.model.get_submodule(site)
        wanted = sum(
            float(share) * lora.scale * (lora.B.double() @ lora.A.double())
            for share, lora in zip(shares, (e.lora[site] for e in pool.experts), strict=True)
        )
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if kind == "gpt2" else delta
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_loss_told_of_a_cut_is_that_of_brute_force(llama, llama_pool, tmp_path, rank):
    model = compose(llama_pool, llama, router="merged")
    result = export(model, tmp_path / "cut", rank=rank)
    assert result.rank == rank
    tuned, lost, norms = peft_model(llama, tmp_path / "cut"), 0.0, 0.0
    for site, told in result.losses.items():
        loras = [expert.lora[site] for expert in llama_pool.experts]
        exact = sum(lora.scale * lora.B.double() @ lora.A.double() for lora in loras) / len(loras)
        singular = torch.linalg.svdvals(exact)
        kept = tuned.base_model.model.get_submodule(site).get_delta_weight("default").double()
        assert torch.linalg.matrix_rank(kept, rtol=1e-4) <= rank
        missing = float((exact - kept).norm())
        assert told.lost == pytest.approx(float(singular[rank:].norm()), rel=1e-4, abs=1e-4)
        assert missing == pytest.approx(told.lost, rel=1e-3, abs=1e-4)
        assert told.norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert (told.rank, told.of) == (rank, 16)
        lost, norms = lost + told.lost**2, norms + told.norm**2
    assert result.lost == pytest.approx((lost / norms) ** 0.5)
    record = json.loads((tmp_path / "cut" / EXPORT_INFO).read_text())
    site = next(iter(result.losses))
    assert record["sites"][site]["lost"] == result.losses[site].lost
    assert record["experts"] == pytest.approx(dict.fromkeys(llama_pool.names, 0.25))


@pytest.mark.parametrize("folds", [True, False], ids=["folded", "factored"])
def test_ranks_beyond_a_layer_s_sizes_are_brought_down_without_loss(
    llama, pool_of, tmp_path, folds
):
    """Three experts of ranks 24, 9 and 20 in layers of 32."""
    pool, ids = pool_of("llama", (24, 9, 20)), make_ids()
    if folds:
        model = compose(pool, llama, router="merged")
    else:
        place = pool.experts[0].directory.parent
        routing = Routing("merged", kernel="concat")  # which needs the factors
        model = open_model(place, llama.id, dtype="float32", routing=routing).model
    kind = FoldedLinear if folds else RoutedLinear
    assert all(type(layer) is kind for layer in composition_of(model).layers.values())
    wanted = logits_of(model, ids)
    result = export(model, tmp_path / "adapter")
    assert (result.rank, result.lost) == (32, 0)
    assert_same_logits(logits_of(peft_model(llama, tmp_path / "adapter"), ids), wanted)
    export(model, tmp_path / "whole", merged=True)
    assert_same_logits(logits_of(by_transformers(tmp_path / "whole", "llama"), ids), wanted)


@each_kind
def test_ia3_and_biases_leave_merged_only_where_the_base_can_hold_them(
    base, kind, mixed_pool, tmp_path
):
    ids = make_ids(rows=2)
    model = compose(ordered(mixed_pool, ["lora0", "ia32", "ia36"]), base, router="merged")
    wanted = logits_of(model, ids)
    with pytest.raises(RoutingError, match=r"an expert scales the layer.* --merged"):
        export(model, tmp_path / "adapter")
    export(model, tmp_path / "whole", merged=True)
    assert_same_logits(logits_of(by_transformers(tmp_path / "whole", kind), ids), wanted)
    detach(model)
    model = compose(ordered(mixed_pool, ["lora0", "biased1"]), base, router="merged")
    wanted = logits_of(model, ids)
    export(model, tmp_path / "biased")
    assert_same_logits(logits_of(peft_model(base, tmp_path / "biased"), ids), wanted)
    if kind == "gpt2":  # whose layers have biases
        export(model, tmp_path / "biased-whole", merged=True)
        got = logits_of(by_transformers(tmp_path / "biased-whole", kind), ids)
        assert_same_logits(got, wanted)
    else:
        with pytest.raises(RoutingError, match="the base has none there"):
            export(model, tmp_path / "biased-whole", merged=True)


def test_what_can_t_leave_is_refused_and_nothing_is_written(llama, llama_mixed, tmp_path):
    def refused(complaint, **options):
        with pytest.raises(RoutingError, match=complaint):
            export(model, tmp_path / "out" / "x", **options)
        assert not (tmp_path / "out").exists()

    with pytest.raises(RoutingError, match="not routed"):
        export(llama.model, tmp_path / "x")
    model = compose(llama_mixed, llama, router="single:expert=bottleneck3")
    for merged in (False, True):
        refused("'bottleneck3' is of the kind 'bottleneck', which neither", merged=merged)
    detach(model)
    model = compose(llama_mixed, llama, k=2, router="phatgoose")
    refused("chooses again for every token, which an adapter can't hold: fix its mixture")
    (tmp_path / "there").mkdir()
    with pytest.raises(RoutingError, match="exists already"):
        export(model, tmp_path / "there")


def test_differences_are_means_over_all_tokens_and_the_vocabulary(llama, llama_pool):
    model = compose(llama_pool, llama, k=2, router="phatgoose")
    base = {site: layer.base for site, layer in composition_of(model).layers.items()}
    texts = prompt_texts(["to be", "or not to be"])
    told = fidelity(model, llama.tokenizer, base, texts)
    wanted, got = [], []
    for text in texts.examples:
        ids = torch.tensor([llama.tokenizer(text.input)["input_ids"]])
        wanted.append(logits_of(model, ids)[0])
        with replaced(model, base):
            got.append(logits_of(model, ids)[0])
    one, other = torch.cat(wanted), torch.cat(got)
    assert told.texts == "the prompt"
    assert told.tokens == len(one)
    assert told.difference == pytest.approx(float((one - other).abs().mean()), rel=1e-5)
    same = (one.argmax(-1) == other.argmax(-1)).float().mean()
    assert told.agreement == pytest.approx(float(same))


def test_shares_are_means_over_tokens_then_prompts(llama, llama_pool):
    model = compose(llama_pool, llama, k=2, router="phatgoose")
    texts = prompt_texts(["a", "many more tokens than one"])
    found = shares_for(model, llama.tokenizer, texts)
    assert found.chosen_for == "the prompt"
    passes = []
    for text in texts.examples:
        ids = torch.tensor([llama.tokenizer(text.input)["input_ids"]])
        with record(model) as recording, torch.no_grad():
            model(input_ids=ids)
        passes.append(recording.usage())
    for site, shares in found.by_site.items():
        wanted = torch.stack([usage[site] for usage in passes]).double().mean(dim=0)
        torch.testing.assert_close(shares, wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_elsewhere_can_not_be_merged(llama, llama_pool):
    parts = composition_of(compose(llama_pool, llama, k=2, router="phatgoose"))
    layer = next(iter(parts.layers.values()))
    update = fixed_update(layer, torch.tensor([0.0, 1.0, 0.0, 0.0]), parts)
    layer.base.weight = nn.Parameter(layer.base.weight.to("meta"), requires_grad=False)
    with pytest.raises(RoutingError, match="quantised or kept elsewhere"):
        merged_layer(layer, update)
