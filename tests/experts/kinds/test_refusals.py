"""Adapters that are refused, each with its reason."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig

from changed_adapters import complaint_about, set_config
from phatgoose.experts.kinds.peft import UNSUPPORTED
from tiny import make_adapter

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
def test_what_is_no_plain_lora_is_refused_with_the_reason(adapter, key, value, reason):
    set_config(adapter, **{key: value})
    assert reason in complaint_about(adapter)


def test_a_real_dora_adapter_is_refused(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "dora", use_dora=True)
    assert "use_dora" in complaint_about(adapter)


def test_every_lora_variant_that_peft_knows_is_refused_or_known_to_be_plain():
    plain_at_inference = {"velora_config", "monteclora_config"}  # they change the training only
    for field in dataclasses.fields(LoraConfig):
        if field.metadata.get("is_lora_variant"):
            assert field.name in {*UNSUPPORTED, *plain_at_inference}, (
                f"PEFT's {field.name} selects another forward pass; name it in UNSUPPORTED"
            )
