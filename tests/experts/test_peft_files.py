"""PEFT's adapters: LoRA and (IA)³, read as PEFT would, or refused with the reason."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from changed_adapters import change_tensors, complaint_about, set_config
from golden_sites import DOWN, QUERY
from paths import GOLDENS
from phatgoose.experts.expert import Expert, read_modules
from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INVOCATION, UNSUPPORTED
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


def test_biases_of_a_base_without_any_are_no_obstacle(llama, tmp_path):
    plain = read_modules(make_adapter(llama, tmp_path / "plain"))
    biased = read_modules(make_adapter(llama, tmp_path / "biased", bias="all"))
    assert all(torch.equal(biased[site].B, lora.B) for site, lora in plain.items())


def test_the_golden_ia3_is_read_as_it_was_written():
    expert = Expert.load(GOLDENS / "ia3")
    assert expert.kind == "ia3"
    assert expert.modules[QUERY].vector.tolist() == [0.5, 0.75, 1.0]
    assert expert.modules[DOWN].vector.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    assert {site: m.on_input for site, m in expert.modules.items()} == {QUERY: False, DOWN: True}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 1, 1)])
def test_an_ia3_tensor_of_another_shape_is_refused(tmp_path, shape):
    folder = shutil.copytree(GOLDENS / "ia3", tmp_path / "mine")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors[f"base_model.model.{QUERY}.ia3_l"] = torch.ones(shape)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    assert f"site {QUERY}: wanted a vector" in complaint_about(folder)
    tensors["base_model.model.x.lora_A.weight"] = torch.ones(2, 2)
    del tensors[f"base_model.model.{QUERY}.ia3_l"]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    assert "'base_model.model.x.lora_A.weight'" in complaint_about(folder)


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
def test_a_tensor_that_is_left_over_is_refused_by_name(own_adapter, extra, reason):
    name = f"base_model.model.{extra}"
    change_tensors(own_adapter, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    message = complaint_about(own_adapter)
    assert repr(name) in message
    assert reason in message


def config_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / ADAPTER_CONFIG).write_text(text)


def tensors_with(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, change)


def only_pickled(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


A, B = f"{SITE}.lora_A.weight", f"{SITE}.lora_B.weight"
FOREIGN = "model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "no PEFT adapter"),
    *((config_of(text), "") for text in ("{", "[]", "null", '"LORA"')),
    (config_of('{"model_class": "X", "config": {"r": 8}}'), "AdapterHub"),
    (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "does not exist"),
    (only_pickled, "never read"),
    (tensors_with(lambda t: t.clear()), "no LoRA factors"),
    (tensors_with(lambda t: t.update({FOREIGN: torch.zeros(4, 32)})), repr(FOREIGN)),
    *(
        (tensors_with(lambda t, key=key: t.pop(key)), "site model.layers.0.self_attn.q_proj: ")
        for key in (A, B)
    ),
    *(
        (tensors_with(lambda t, shape=shape: t.update({A: torch.zeros(shape)})), f"got {shape} and")
        for shape in ((5, 32), (4,), (4, 32, 1))
    ),
    *(
        (
            tensors_with(lambda t, odd=odd: t[B].view(-1)[7].fill_(odd)),
            f"{B} holds a value that is not",
        )
        for odd in (float("nan"), float("inf"), float("-inf"))
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_adapter_is_refused_with_the_reason(own_adapter, damage, reason):
    damage(own_adapter)
    assert reason in complaint_about(own_adapter)


REFUSED = [
    ("use_dora", True, "DoRA rescales the base weight"),
    ("modules_to_save", ["lm_head"], "it replaces whole modules"),
    ("trainable_token_indices", [1, 2], "changes token embeddings"),
    ("layer_replication", [[0, 1]], "changes the base's layers"),
    ("target_parameters", ["x"], "no linear layers"),
    ("lora_bias", True, "the bias of B is None"),
    ("megatron_config", {"a": 1}, "import a module"),
    ("some_new_option", 3, "which the installed PEFT doesn't know"),
    ("lora_alpha", "8", "lora_alpha is '8'"),
    ("rank_pattern", [1], "rank_pattern is [1]"),
    ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern is"),
    ("alpha_pattern", {"(": 2}, "no regular expression"),
    ("init_lora_weights", "sorcery", "'sorcery', which is unknown"),
    ("init_lora_weights", "corda", "initialised by corda"),
    ("init_lora_weights", "loftq", "initialised by loftq"),
    ("init_lora_weights", "lora_ga", "initialised by lora_ga"),
    ("init_lora_weights", "pissa", "initialised by pissa"),
    ("init_lora_weights", "pissa_niter_4", "initialised by pissa_niter_4"),
    ("init_lora_weights", "OLoRA", "initialised by OLoRA"),
    ("peft_type", "PREFIX_TUNING", "learned tokens or keys"),
    ("peft_type", "BOFT", "multiplies the base weight"),
    ("peft_type", "LOHA", "--allow-loss"),
    ("peft_type", "SOMETHING", "its updates can't be routed"),
    ("peft_type", None, "type None; wanted LORA or IA3"),
]


@pytest.mark.parametrize(("key", "value", "reason"), REFUSED)
def test_what_is_no_plain_lora_is_refused_with_the_reason(own_adapter, key, value, reason):
    set_config(own_adapter, **{key: value})
    assert reason in complaint_about(own_adapter)


def test_every_lora_variant_that_peft_knows_is_refused_or_known_to_be_plain():
    plain_at_inference = {"velora_config", "monteclora_config"}  # they change the training only
    known = {*UNSUPPORTED, *plain_at_inference, INVOCATION}
    for field in dataclasses.fields(LoraConfig):
        if field.metadata.get("is_lora_variant"):
            assert field.name in known, (
                f"PEFT's {field.name} selects another forward pass; name it in UNSUPPORTED"
            )
