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
from phatgoose.routing.compose import compose, composition_of, detach
from phatgoose.routing.export import EXPORT_INFO, Export, export
from phatgoose.routing.layers import FoldedLinear, RoutedLinear
from phatgoose.routing.opening import open_model
from tiny import assert_same_logits, logits_of, make_ids, peft_model


def exported(model, base, folder, **options) -> Export:
    """What was written of `model`, which the libraries load as the same; `model` is as it was."""
    ids = make_ids(rows=2)
    wanted, result = logits_of(model, ids), export(model, folder, **options)
    assert_same_logits(logits_of(model, ids), wanted)
    if not result.merged:
        loaded = peft_model(base, folder)
    else:
        auto = AutoModelForSeq2SeqLM if base.is_encoder_decoder else AutoModelForCausalLM
        loaded = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    assert_same_logits(logits_of(loaded, ids), wanted)
    return result


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"router": "single:expert=e2"}),
        ("llama", {"weights": {"e2": 0.5}}),
        ("gpt2", {"router": "merged"}),
        ("t5", {"weights": {"e0": 0.7, "e3": -0.2}}),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_constant_routing_leaves_exactly_in_either_form(base, pool, tmp_path, options, merged):
    result = exported(compose(pool, base, **options), base, tmp_path / "out", merged=merged)
    if "weights" in options:
        assert result.mixture == pytest.approx(options["weights"], abs=1e-6)
    assert result.lost == 0


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
    pool = pool_of("llama", (24, 9, 20))
    if folds:
        model = compose(pool, llama, router="merged")
    else:
        place = pool.experts[0].directory.parent
        routing = Routing("merged", kernel="concat")  # which needs the factors
        model = open_model(place, llama.id, dtype="float32", routing=routing).model
    kind = FoldedLinear if folds else RoutedLinear
    assert all(type(layer) is kind for layer in composition_of(model).layers.values())
    result = exported(model, llama, tmp_path / "adapter")
    assert (result.rank, result.lost) == (32, 0)
    exported(model, llama, tmp_path / "whole", merged=True)


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
def test_ia3_and_biases_leave_merged_only_where_the_base_can_hold_them(
    base, kind, mixed_pool, tmp_path
):
    model = compose(ordered(mixed_pool, ["lora0", "ia32", "ia36"]), base, router="merged")
    with pytest.raises(RoutingError, match=r"an expert scales the layer.* --merged"):
        export(model, tmp_path / "adapter")
    exported(model, base, tmp_path / "whole", merged=True)
    detach(model)
    model = compose(ordered(mixed_pool, ["lora0", "biased1"]), base, router="merged")
    exported(model, base, tmp_path / "biased")
    if kind == "gpt2":  # whose layers have biases
        exported(model, base, tmp_path / "biased-whole", merged=True)
    else:
        with pytest.raises(RoutingError, match="the base has none there"):
            export(model, tmp_path / "biased-whole", merged=True)


def test_what_can_t_leave_is_refused_and_nothing_is_written(
    llama, llama_pool, llama_mixed, tmp_path
):
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
    model = compose(llama_mixed, llama, router="single:expert=lora0")
    for rank, merged in ((0, False), (-1, False), (4, True)):
        refused(f"A rank cuts an adapter .* this one is {rank}", rank=rank, merged=merged)
    detach(model)
    model = compose(llama_mixed, llama, k=2, router="phatgoose")
    refused("chooses again for every token, which an adapter can't hold; route by merged")
    detach(model)
    model = compose(llama_pool.select(["e0"]), llama, router="discriminant")
    refused("Router discriminant chooses again for every input")  # this expert or the base
    (tmp_path / "there").mkdir()
    with pytest.raises(RoutingError, match="exists already"):
        export(model, tmp_path / "there")


def test_a_weight_that_is_elsewhere_can_not_be_merged(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, router="single:expert=e1")
    layer = next(iter(composition_of(model).layers.values()))
    layer.base.weight = nn.Parameter(layer.base.weight.to("meta"), requires_grad=False)
    with pytest.raises(RoutingError, match="quantised or kept elsewhere"):
        export(model, tmp_path / "whole", merged=True)
