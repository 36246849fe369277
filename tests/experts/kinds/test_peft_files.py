"""PEFT adapters: read as PEFT itself would, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from changed_adapters import change_tensors, complaint_about
from phatgoose.base.loading import load_base
from phatgoose.experts.adapter import read_modules
from phatgoose.experts.kinds.kind import read_tensors
from phatgoose.experts.kinds.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
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


@pytest.fixture(scope="module")
def original(base_folders, tmp_path_factory) -> Path:
    base = load_base(base_folders["llama"], dtype="float32")
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def adapter(original, tmp_path) -> Path:
    """A plain adapter of one's own to damage."""
    return shutil.copytree(original, tmp_path / "my-adapter")


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


def test_a_folder_without_a_config_is_no_adapter(tmp_path):
    message = complaint_about(tmp_path)
    assert "no PEFT adapter" in message
    assert ADAPTER_CONFIG in message


@pytest.mark.parametrize("text", ["{", "[]", "null", '"LORA"'])
def test_a_broken_config_is_refused(adapter, text):
    (adapter / ADAPTER_CONFIG).write_text(text)
    complaint_about(adapter)


def test_pickled_weights_are_refused_unread(adapter):
    (adapter / ADAPTER_WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "never read" in complaint_about(adapter)


def test_missing_weights_are_refused(adapter):
    (adapter / ADAPTER_WEIGHTS).unlink()
    assert "does not exist" in complaint_about(adapter)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("lm_head.weight", "resized or trained"),
        ("model.embed_tokens.weight", "resized or trained"),
        ("model.embed_tokens.lora_embedding_A", "an embedding is no site"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "trains a bias of the base"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("model.layers.0.mlp.strange", "no part of a plain adapter."),
    ],
)
def test_a_tensor_that_is_left_over_is_refused_by_name(adapter, extra, reason):
    name = f"base_model.model.{extra}"
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    message = complaint_about(adapter)
    assert repr(name) in message
    assert reason in message


def test_an_adapterhub_folder_is_told_apart(adapter):
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"model_class": "X", "config": {"r": 8}}))
    assert "AdapterHub" in complaint_about(adapter)


def test_biases_of_a_base_without_any_are_no_obstacle(llama, tmp_path):
    plain = read_modules(make_adapter(llama, tmp_path / "plain"))
    biased = read_modules(make_adapter(llama, tmp_path / "biased", bias="all"))
    assert all(torch.equal(biased[site].B, lora.B) for site, lora in plain.items())


def test_a_tensor_with_a_foreign_prefix_is_refused(adapter):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(4, 32)}))
    assert repr(name) in complaint_about(adapter)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_tensor(adapter, value):
    name = f"{SITE}.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    message = complaint_about(adapter)
    assert name in message
    assert "not finite" in message


@pytest.mark.parametrize("length", [0, 5, 500, -1])
def test_truncated_weights_are_refused(adapter, length):
    weights = adapter / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:length])
    assert "damaged or truncated" in complaint_about(adapter)


def test_weights_without_any_factor_are_refused(adapter):
    change_tensors(adapter, lambda tensors: tensors.clear())
    assert "no LoRA factors" in complaint_about(adapter)


def test_reading_changes_no_file(adapter):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    read_adapter_config(adapter)
    read_tensors(adapter / ADAPTER_WEIGHTS)
    read_modules(adapter)
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
