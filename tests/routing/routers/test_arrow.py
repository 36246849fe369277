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
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.routers.arrow import arrow_vector
from tiny import assert_same_logits, logits_of, make_adapter, make_ids, random


def factors(r: int, n: int, d: int, *, seed: int = 0, kept: int | None = None) -> LoraFactors:
    """Random factors of rank r, or of rank `kept` where that is less, and scale 2."""
    A, B = random(r, n, seed=seed), random(d, r, seed=seed + 1)
    if kept is not None:
        B = B[:, :kept] @ random(min(kept, r), r, seed=seed + 2)
    return LoraFactors(A, B, 2.0)


shapes = st.builds(
    factors,
    r=st.integers(1, 8),
    n=st.integers(1, 12),
    d=st.integers(1, 12),
    seed=st.integers(0, 999),
    kept=st.none() | st.integers(0, 3),
)


# The vectors


@settings(max_examples=150, derandomize=True)
@given(lora=shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_vector_is_the_first_right_singular_one_of_the_product(lora, dtype):
    lora = LoraFactors(lora.A.to(dtype), lora.B.to(dtype), lora.scale)
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
        torch.testing.assert_close((got.double() @ V[0]).abs(), torch.ones(()).double())
        aligned = got.double() * (got.double() @ V[0]).sign()
        torch.testing.assert_close(aligned, V[0], rtol=0, atol=1e-5)


def peft_layer(experts: int, n: int, k: int = 2, seed: int = 0) -> ArrowLoraLinearLayer:
    config = ArrowConfig(top_k=k, router_temperature=1.0, rng_seed=seed)
    config.task_adapter_names = [f"e{z}" for z in range(experts)]
    config.gks_adapter_names = []
    return ArrowLoraLinearLayer(n, config)


@settings(max_examples=50, derandomize=True)
@given(lora=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_variant_of_peft_is_that_of_peft(lora, seed, dtype):
    A, B = lora.A.to(dtype), lora.B.to(dtype)
    wanted = peft_layer(1, A.shape[1], seed=seed).top_right_singular_vec_from_BA(A, B)
    torch.testing.assert_close(arrow_vector(LoraFactors(A, B, 1.0), "peft", seed), wanted)


# The whole model beside PEFT's


@pytest.fixture(scope="session")
def spread(base_folders, tmp_path_factory):
    """`spread(kind)`: a pool of four experts, each with one singular value far above the rest."""
    pools = {}

    def make(kind: str) -> Pool:
        if kind not in pools:
            base = load_base(base_folders[kind], dtype="float32")
            folder, experts = tmp_path_factory.mktemp(f"spread-{kind}"), []
            for z in range(4):
                adapter = make_adapter(base, folder / f"e{z}", seed=z)
                tensors = load_file(adapter / ADAPTER_WEIGHTS)
                for key, tensor in tensors.items():
                    if ".lora_A." in key:
                        tensor[1:] *= 0.2
                save_file(tensors, adapter / ADAPTER_WEIGHTS)
                experts.append(Expert.from_peft(adapter, {}, base=base))
            pools[kind] = Pool(tuple(experts))
        return pools[kind]

    return make


def peft_arrow(base, pool: Pool, k: int):
    """PEFT's own Arrow over the same adapters."""
    fresh = load_base(base.id, dtype="float32").model
    config = ArrowConfig(top_k=k, router_temperature=1.0, rng_seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out at Conv1D, and transformers' own
        return create_arrow_model(fresh, [str(e.directory) for e in pool.experts], config).eval()


@pytest.mark.parametrize("k", [2, 3])
def test_the_routed_model_is_that_of_peft(base, kind, spread, k):
    pool, ids = spread(kind), make_ids(rows=2)
    wanted = logits_of(peft_arrow(base, pool, k), ids)
    plain = logits_of(base.model, ids)
    for variant in ("svd", "peft"):
        got = logits_of(compose(pool, base, router=f"arrow:form={variant}", k=k), ids)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert_same_logits(got, wanted)
        detach(base.model)
    assert not torch.allclose(plain, wanted, atol=0.1)
