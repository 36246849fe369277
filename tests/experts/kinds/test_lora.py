"""LoRAs on disk: read as PEFT would, or refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from changed_adapters import change_tensors, complaint_about
from phatgoose.experts.adapter import read_modules
from tiny import make_adapter

SITE = "base_model.model.model.layers.0.self_attn.q_proj"


PLAIN = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}},
    {"alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 5}},
    {
        "use_rslora": True,
        "rank_pattern": {"mlp.down_proj": 1},
        "alpha_pattern": {"down_proj": 7, r"layers.\d.self_attn.k_proj": 9},
    },
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": "all-linear"},
    {"init_lora_weights": "gaussian"},
    {"lora_dropout": 0.5},
]


def peft_layers(base: Any, adapter: Path) -> dict[str, LoraLayer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base.model, adapter)
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_factors_and_scales_are_pefts_own(llama, tmp_path, options):
    adapter = make_adapter(llama, tmp_path / "adapter", **options)
    factors, layers = read_modules(adapter), peft_layers(llama, adapter)
    assert set(factors) == set(layers)
    for site, layer in layers.items():
        assert factors[site].scale == pytest.approx(layer.scaling["default"]), site
        assert torch.equal(factors[site].A, layer.lora_A["default"].weight), site
        assert torch.equal(factors[site].B, layer.lora_B["default"].weight), site


@pytest.mark.parametrize(("kind", "module"), [("gpt2", "c_attn"), ("t5", "wo")])
def test_factors_and_scales_are_pefts_own_for_other_bases(base, module, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={module: 2})
    factors, layers = read_modules(adapter), peft_layers(base, adapter)
    assert set(factors) == set(layers)
    for site, layer in layers.items():
        assert factors[site].scale == pytest.approx(layer.scaling["default"]), site


def test_the_patterns_above_do_change_ranks_and_scales(llama, tmp_path):
    adapter = make_adapter(
        llama, tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}
    )
    factors = read_modules(adapter)
    ranks = {lora.A.shape[0] for lora in factors.values()}
    scales = {lora.scale for lora in factors.values()}
    assert ranks == {2, 4}
    assert scales == {2.0, 4.0, 1.25}


def test_biases_of_a_base_without_any_are_no_obstacle(llama, tmp_path):
    plain = read_modules(make_adapter(llama, tmp_path / "plain"))
    biased = read_modules(make_adapter(llama, tmp_path / "biased", bias="all"))
    assert all(torch.equal(biased[site].B, lora.B) for site, lora in plain.items())


@pytest.mark.parametrize("side", "AB")
def test_a_factor_without_its_partner_is_refused_with_the_site(adapter, side):
    change_tensors(adapter, lambda tensors: tensors.pop(f"{SITE}.lora_{side}.weight"))
    message = complaint_about(adapter)
    assert "site model.layers.0.self_attn.q_proj" in message
    assert "None" in message


@pytest.mark.parametrize("shape", [(5, 32), (4,), (4, 32, 1)])
def test_factors_that_do_not_fit_each_other_are_refused_with_both_shapes(adapter, shape):
    name = f"{SITE}.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    message = complaint_about(adapter)
    assert f"got {shape} and (32, 4)" in message
