"""Merged: the mean of all updates, added at the side or folded into the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from phatgoose.base import load_base
from phatgoose.experts.lora import LoraStack
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.layers import FoldedLinear, folded_weight
from tiny import assert_same_logits, logits_of, make_ids, random

LARGE = (24, 9, 20)  # ranks at which merging folds at every site of every tiny base
SITE = "model.layers.0.self_attn.q_proj"


def mean_update(pool: Pool, site: str) -> Tensor:
    """The mean of s B A over the pool, zero for those not at `site`, float64 [d, n]."""
    loras = [expert.lora[site] for expert in pool.experts if site in expert.lora]
    return sum(lora.scale * lora.B.double() @ lora.A.double() for lora in loras) / len(pool)


def merged(base, pool: Pool) -> dict[str, type]:
    """The type of each layer of `pool` merged, which is `base` with the mean in every weight."""
    by_hand = load_base(base.id, dtype="float32").model
    for site in pool.sites:
        layer, mean = by_hand.get_submodule(site), mean_update(pool, site)
        layer.weight.data += mean.T if isinstance(layer, Conv1D) else mean
    model, ids = compose(pool, base, router="merged"), make_ids(rows=2)
    assert_same_logits(logits_of(model, ids), logits_of(by_hand, ids))
    return {site: type(layer) for site, layer in composition_of(model).layers.items()}


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4), LARGE], ids=["factored", "folded"])
def test_it_is_the_exact_mean_of_all_products(base, kind, pool_of, ranks):
    layers = merged(base, pool_of(kind, ranks))
    assert (set(layers.values()) == {FoldedLinear}) == (ranks == LARGE)


@pytest.mark.parametrize("rank", [2, 30])
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_an_expert_that_does_not_act_at_a_site_counts_as_zero_there(base, kind, make_expert, rank):
    few = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]
    patterns = {"rank_pattern": {few[0]: 2 * rank}, "alpha_pattern": {few[0]: 5}}
    pool = Pool(
        (
            make_expert(base, "everywhere", rank=rank, **patterns),
            make_expert(base, "few", rank=rank + 1, seed=1, target_modules=few),
            make_expert(base, "other", rank=rank + 2, seed=2, use_rslora=True),
        )
    )
    assert {sum(site in each.modules for each in pool.experts) for site in pool.sites} == {2, 3}
    assert (FoldedLinear in merged(base, pool).values()) == (rank == 30)


class Doubling(nn.Linear):
    """A linear layer that is more than its weight, as those in 8-bit floats are."""

    def forward(self, u: Tensor) -> Tensor:
        return 2 * super().forward(u)


def test_a_layer_that_does_more_than_its_weight_is_not_folded(llama, pool_of):
    pool, u = pool_of("llama", LARGE), torch.ones(1, 32)
    attention = llama.model.get_submodule(SITE.rpartition(".")[0])
    doubling = Doubling(32, 32, bias=False)
    doubling.weight = attention.q_proj.weight
    attention.q_proj = doubling
    wanted = doubling(u) + u @ mean_update(pool, SITE).float().T
    got = composition_of(compose(pool, llama, router="merged")).layers[SITE](u)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
def test_a_weight_in_bfloat16_is_rounded_once(conv):
    base = (Conv1D(48, 16) if conv else nn.Linear(16, 48)).bfloat16()
    stack = LoraStack(random(9, 4, 16).bfloat16(), random(9, 4, 48, seed=1).bfloat16())
    got = folded_weight(base, stack, 10)  # one expert isn't here
    weight = base.weight.double()
    products = stack.B.double().transpose(1, 2) @ stack.A.double()
    exact = (weight.T if conv else weight) + products.sum(dim=0) / 10
    assert (got.dtype, got.shape) == (torch.bfloat16, (48, 16))
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    assert ((got.double() - exact).abs() <= 1.01 * half_a_step * exact.abs() + 1e-6).all()
