"""Bases that keep a state of what they have read in the place of keys and values."""

import pytest
import torch

from architectures import make_tiny, random_expert, reading_pool
from phatgoose.base.identity import Base, fingerprint
from phatgoose.base.loading import load_skeleton
from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, routing_for
from phatgoose.routing.recording import record
from routed_models import tailed
from tiny import make_ids, make_tokenizer


@pytest.fixture
def mamba() -> Base:
    model = make_tiny("mamba")
    return Base(model, make_tokenizer(final_eos=False), "tiny", None, fingerprint(model))


def experts_of(model):
    return [random_expert(model, seed) for seed in range(3)]


def generated(model, **options):
    ids = make_ids(rows=2)
    length = {"max_new_tokens": 5, "do_sample": False}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)


def test_the_experts_of_a_prompt_stay_those_of_its_answer(mamba):
    pool = reading_pool(experts_of(mamba.model))
    model = compose(pool, mamba, router="discriminant:fallback=off", k=1)
    with record(model) as recording:
        tokens = generated(model)
    assert torch.equal(tokens, generated(model, use_cache=False))
    for passes in recording.weights.values():
        chosen = torch.cat(passes, dim=1).argmax(dim=-1)  # [rows, tokens]
        assert (chosen == chosen[:, :1]).all()
    assert torch.equal(tokens, generated(model))  # another call, another cache


def test_experts_act_from_a_prompts_end_on(mamba):
    """Each step of a generation has the logits of one pass over prompt and answer, announced."""
    pool, ids = tailed(experts_of(mamba.model), (3, None, 1)), make_ids(rows=2)
    model = compose(pool, mamba, k=2, router="phatgoose")
    settings = {"output_logits": True, "return_dict_in_generate": True}
    for options in ({}, {"use_cache": False}):
        found = generated(model, **settings, **options)
        with routing_for(model, ids.tolist()), torch.no_grad():
            wanted = model(found.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
        got = torch.stack(found.logits, dim=1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_model_that_reads_padding_is_refused():
    model = make_tiny("rwkv")
    with pytest.raises(BaseModelError, match="type rwkv read padding as if it were text"):
        load_skeleton(model.config)
    with pytest.raises(BaseModelError, match="type rwkv read padding"):
        compose(Pool(tuple(experts_of(model))), model, k=1, router="phatgoose")
