"""Arrow beside torch's SVD of the whole B A and beside PEFT's own Arrow."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import load_file, save_file

from phatgoose.base import load_base
from phatgoose.experts.expert import Expert
from phatgoose.experts.kind import ADAPTER_WEIGHTS
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers.arrow import arrow_vector
from tiny import assert_same_logits, logits_of, make_adapter, make_ids, random

FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


def factors(r: int, n: int, d: int, seed: int, dtype: torch.dtype, rank: int) -> LoraFactors:
    """Random factors of rank r, or of `rank` where that is less."""
    B = random(d, r, seed=seed + 1)[:, :rank] @ random(min(rank, r), r, seed=seed + 2)
    return LoraFactors(random(r, n, seed=seed).to(dtype), B.to(dtype), 2.0)


sizes, seeds = st.integers(1, 12), st.integers(0, 999)
loras = st.builds(
    factors, st.integers(1, 8), sizes, sizes, seeds, FLOATS, st.integers(0, 3) | st.just(8)
)


@settings(max_examples=150, derandomize=True)
@given(lora=loras)
def test_the_vector_is_the_first_right_singular_one_of_the_product(lora):
    got = arrow_vector(lora)
    assert (got.dtype, got.shape) == (torch.float32, lora.A.shape[1:])
    product = lora.B.double() @ lora.A.double()
    _, values, V = torch.linalg.svd(product)
    if not product.any():
        assert not got.any()
        return
    assert got.norm() == pytest.approx(1, abs=1e-6)
    assert (product @ got.double()).norm() == pytest.approx(float(values[0]), rel=1e-6)
    if len(values) == 1 or values[1] < 0.9 * values[0]:
        aligned = got.double() * (got.double() @ V[0]).sign()
        torch.testing.assert_close(aligned, V[0], rtol=0, atol=1e-5)


def arrow_config(experts: int, k: int, seed: int) -> ArrowConfig:
    config = ArrowConfig(top_k=k, router_temperature=1.0, rng_seed=seed)
    config.task_adapter_names = [f"e{z}" for z in range(experts)]
    config.gks_adapter_names = []
    return config


@settings(max_examples=50, derandomize=True)
@given(lora=loras, seed=st.integers(0, 99))
def test_the_variant_of_peft_is_that_of_peft(lora, seed):
    layer = ArrowLoraLinearLayer(lora.A.shape[1], arrow_config(1, 2, seed))
    wanted = layer.top_right_singular_vec_from_BA(lora.A, lora.B)
    torch.testing.assert_close(arrow_vector(lora, "peft", seed), wanted)


# The whole model beside PEFT's


def spread_pool(base, folder) -> Pool:
    """A pool of four experts, each with one singular value far above the rest."""
    experts = []
    for z in range(4):
        adapter = make_adapter(base, folder / f"e{z}", seed=z)
        tensors = load_file(adapter / ADAPTER_WEIGHTS)
        for key, tensor in tensors.items():
            if ".lora_A." in key:
                tensor[1:] *= 0.2
        save_file(tensors, adapter / ADAPTER_WEIGHTS)
        experts.append(Expert.from_peft(adapter, {}, base=base))
    return Pool(tuple(experts))


@pytest.mark.parametrize("k", [2, 3])
def test_the_routed_model_is_that_of_peft(base, k, tmp_path):
    pool, ids = spread_pool(base, tmp_path), make_ids(rows=2)
    fresh, config = load_base(base.id, dtype="float32").model, arrow_config(4, k, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out at Conv1D, and transformers' own
        theirs = create_arrow_model(fresh, [str(e.directory) for e in pool.experts], config)
    wanted = logits_of(theirs.eval(), ids)
    assert not torch.allclose(logits_of(base.model, ids), wanted, atol=0.1)
    for variant in ("svd", "peft"):
        got = logits_of(compose(pool, base, router=f"arrow:form={variant}", k=k), ids)
        assert_same_logits(got, wanted)
        detach(base.model)
