"""PEFT adapters: read as PEFT itself would, or refused with the reason."""

from __future__ import annotations

import json

import pytest
import torch

from changed_adapters import change_tensors, complaint_about
from phatgoose.experts.adapter import read_modules
from phatgoose.experts.kinds.kind import read_tensors
from phatgoose.experts.kinds.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config


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


def test_a_tensor_with_a_foreign_prefix_is_refused(adapter):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(4, 32)}))
    assert repr(name) in complaint_about(adapter)


def test_weights_without_any_factor_are_refused(adapter):
    change_tensors(adapter, lambda tensors: tensors.clear())
    assert "no LoRA factors" in complaint_about(adapter)


def test_reading_changes_no_file(adapter):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    read_adapter_config(adapter)
    read_tensors(adapter / ADAPTER_WEIGHTS)
    read_modules(adapter)
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
