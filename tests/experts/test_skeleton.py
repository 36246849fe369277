"""What PEFT makes of a config: its layers without weights, in transformers' names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from changed_adapters import set_config
from import_cases import make_tiny
from phatgoose.base import load_base
from phatgoose.errors import ExpertError
from phatgoose.experts import skeleton as skeletons
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import assert_same_logits, logits_of, make_adapter, make_ids, peft_model

OLD_NAMES = {
    "model.layers": "transformer.h",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
}


@pytest.mark.skipif("exaone" not in CONFIG_MAPPING, reason="this transformers has no exaone")
def test_names_that_transformers_5_has_changed_are_changed_as_peft_does_it(tmp_path):
    base = load_base(make_tiny("exaone", tmp_path / "base"), dtype="float32")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "k_proj"], use_rslora=True
    )
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    for new, old in OLD_NAMES.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert "base_model.model.transformer.h.0.attn.attention.q_proj.lora_A.weight" in tensors
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    expert = import_adapter(adapter, tmp_path / "expert")
    assert set(expert.lora) == {
        f"model.layers.{i}.self_attn.{side}_proj" for i in (0, 1) for side in "qk"
    }
    wanted = logits_of(peft_model(base, adapter), make_ids())
    again = logits_of(peft_model(base, expert.directory), make_ids())
    assert not torch.allclose(wanted, logits_of(base.model, make_ids()))
    torch.testing.assert_close(again, wanted)
    with pytest.warns(UserWarning, match="on trust"):
        routed = compose(Pool((expert,)), base, router="single", k=1)
    assert_same_logits(logits_of(routed, make_ids()), wanted)


def test_a_target_that_transformers_5_has_fused_is_refused_by_name(tmp_path):
    base = load_base(make_tiny("mixtral", tmp_path / "base"), dtype="float32")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert set(import_adapter(adapter, tmp_path / "plain").lora) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    set_config(adapter, target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.raises(ExpertError, match=r"fused into parameters \(.*down_proj, gate_up_proj"):
        import_adapter(adapter, tmp_path / "fused")


def test_peft_is_asked_once_for_all_adapters_of_one_config(own_adapter, tmp_path, monkeypatch):
    skeletons._resolve.cache_clear()
    calls = []
    build = skeletons.get_peft_model
    monkeypatch.setattr(
        skeletons, "get_peft_model", lambda *given: calls.append(given) or build(*given)
    )
    for name in ("a", "b", "c"):
        import_adapter(own_adapter, tmp_path / name)
    set_config(own_adapter, use_rslora=True)
    import_adapter(own_adapter, tmp_path / "d")
    assert len(calls) == 2


def test_a_config_can_not_make_peft_import_a_module(adapter, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    set_config(adapter, megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(ExpertError, match="megatron_config"):
        import_adapter(adapter, tmp_path / "mine")
    set_config(adapter, megatron_config=None)
    import_adapter(adapter, tmp_path / "mine")
    assert not (tmp_path / "ran").exists()
