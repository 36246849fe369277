"""LoGo beside the released code's arithmetic, and whole models beside its mixtures by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import logits_of
from topic_prompts import PROMPTS, both_streams, experts_of, scores_of

LAST_QUERY = {
    "llama": "model.layers.1.self_attn.q_proj",
    "t5": "encoder.block.1.layer.0.SelfAttention.q",
}


def metric(base, pool: Pool, site: str, text: str) -> Tensor:
    """The released code's norms of one prompt, [experts], from hidden states; float64."""
    stack = base.model.get_encoder() if base.is_encoder_decoder else base.model.base_model
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        entering = stack(input_ids=ids, output_hidden_states=True).hidden_states[1].double()
    projections = []
    for expert in pool.experts:
        lora = expert.lora[site]
        projections.append((entering @ lora.A.double().T) @ lora.B.double().T * lora.scale)
    return torch.stack(projections, dim=1)[0, :, -1].norm(dim=-1)


def shares(base, pool: Pool, site: str, text: str, k: int) -> dict[str, float]:
    """The released code's multipliers, by name."""
    top, chosen = metric(base, pool, site, text).topk(k)
    weights = (top / top.sum()).tolist()
    return {pool.names[z]: w for z, w in zip(chosen.tolist(), weights, strict=True)}


@both_streams
@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_and_weights_are_those_of_the_released_code(base, kind, pool, k):
    wanted = [shares(base, pool, LAST_QUERY[kind], text, k) for text in PROMPTS]
    model = compose(pool, base, router="logo", k=k)
    got = experts_of(model, PROMPTS).named(pool.names)
    assert got == [pytest.approx(expected, abs=1e-5) for expected in wanted]
    assert k == 4 or len({tuple(each) for each in wanted}) > 1


def test_read_at_the_site_it_measures_what_the_layer_is_given(llama, llama_pool):
    seen: list[Tensor] = []
    site = LAST_QUERY["llama"]
    handle = llama.model.get_submodule(site).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0, -1])
    )
    for text in PROMPTS:
        logits_of(llama.model, torch.tensor([llama.tokenizer(text)["input_ids"]]))
    handle.remove()
    model = compose(llama_pool, llama, router="logo:reads=site")
    got = scores_of(model, PROMPTS)
    for u, scores in zip(seen, got, strict=True):
        for expert, score in zip(llama_pool.experts, scores.tolist(), strict=True):
            lora = expert.lora[site]
            update = lora.scale * lora.B.double() @ (lora.A.double() @ u.double())
            assert score == pytest.approx(float(update.norm()), rel=1e-4)
