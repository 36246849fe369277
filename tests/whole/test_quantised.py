"""Pools over quantised bases: torchao's and bitsandbytes' linears, as their libraries make them."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from oracle import naively_routed
from phatgoose.base.identity import Base, fingerprint, number_format, quantisation
from phatgoose.base.loading import load_base
from phatgoose.routing.compose import compose, detach, load, save
from phatgoose.sites import find_sites, replace_module
from tiny import assert_same_logits, logits_of, make_ids


def torchao_int8(model: PreTrainedModel) -> None:
    """Int8 weights, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own code
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def bitsandbytes(model: PreTrainedModel, bits: int) -> None:
    """Weights of 8 or 4 bits in every block, in place; they are packed when moved to a device."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name in find_sites(model):
        plain = model.get_submodule(name)
        shape = (plain.in_features, plain.out_features, plain.bias is not None)
        if bits == 8:
            packed = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            packed = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32)
        packed.load_state_dict(plain.state_dict())
        replace_module(model, name, packed.to(model.device).requires_grad_(False))


@pytest.fixture(
    params=[torchao_int8, partial(bitsandbytes, bits=8), partial(bitsandbytes, bits=4)],
    ids=["torchao-int8", "bitsandbytes-8", "bitsandbytes-4"],
)
def quantised(request, base_folders) -> Callable[[], Base]:
    """A maker of the tiny Llama, quantised after it was loaded."""

    def make() -> Base:
        base = load_base(base_folders["llama"], dtype="float32")
        request.param(base.model)
        return base

    return make


def test_a_pool_routes_over_quantised_linears(quantised, llama_pool, tmp_path):
    base, ids = quantised(), make_ids(rows=2)
    assert number_format(base.model) == f"torch.float32, {quantisation(base.model)}"
    assert fingerprint(base.model) == fingerprint(quantised().model) != base.fingerprint
    alone = logits_of(base.model, ids)
    with naively_routed(base.model, llama_pool.experts, k=2):
        wanted = logits_of(base.model, ids)
    model = compose(llama_pool, base, router="phatgoose")
    assert_same_logits(logits_of(model, ids), wanted)
    assert not torch.allclose(wanted, alone, atol=1e-2)
    save(model, tmp_path / "routed")
    assert torch.equal(logits_of(detach(model), ids), alone)
    again = load(tmp_path / "routed", quantised())
    assert_same_logits(logits_of(again, ids), wanted)


def test_a_model_that_came_quantised_is_taken_on_trust_with_a_warning(quantised, llama_pool):
    with pytest.warns(UserWarning, match=r"is quantised \(\w+\), so its weights can't be compared"):
        model = compose(llama_pool, quantised().model, router="phatgoose")
    assert model.phatgoose.base == llama_pool.base
