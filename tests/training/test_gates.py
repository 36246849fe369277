"""Gates: trained after an expert, and nothing else with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from phatgoose.base import load_base
from phatgoose.config import GateTraining, Training
from phatgoose.errors import ConfigError, ExpertError
from phatgoose.sites import find_sites
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_gates
from tiny import make_adapter
from training_runs import PASS, interrupt, on_call, train

TASK = Task(
    "echo",
    train=tuple(Example(f"say {word}", word) for word in ("a", "bee", "seedy", "of", "gee", "ice")),
    validation=(Example("say yes", "yes"),),
)
TRAINING = Training(batch_size=4, micro_batch_size=2, learning_rate=0.05)
GATES = GateTraining(gate_steps=4)


def gated(base, adapter, out, **options):
    """Gates trained for an adapter, with these settings unless told otherwise."""
    settings = {"training": TRAINING, "gate_training": GATES, **options}
    return train_gates(base, adapter, TASK, out=out, **settings)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.fixture
def adapter(llama, tmp_path):
    return make_adapter(llama, tmp_path / "adapter")


def test_gate_training_changes_the_gates_and_nothing_else(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before, modules = weights_of(base.model), dict(base.model.named_modules())
    expert = gated(base, folder, tmp_path / "expert")
    assert same_weights(base.model, before)
    assert dict(base.model.named_modules()) == modules
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    saved = (expert.directory / "adapter_model.safetensors").read_bytes()
    assert saved == files["adapter_model.safetensors"]
    assert expert.gates.keys() == find_sites(base.model).keys()
    assert all(gate.any() for gate in expert.gates.values())


def test_the_settings_of_an_adapters_own_training_are_no_gate_trainings(llama, tmp_path):
    expert = train(llama, tmp_path / "expert")  # TRAINING and GATES of training_runs
    first = dict(expert.info.hyperparameters)
    other = replace(TRAINING, batch_size=2, seed=3)
    again = gated(llama, expert.directory, tmp_path / "again", training=other)
    wanted = {**first, "gate_steps": 4, "gate_learning_rate": 0.005, "seed": 3}
    wanted |= {"gate_batch_size": 2, "gate_micro_batch_size": 2}
    assert again.info.hyperparameters == wanted
    assert (wanted["steps"], wanted["learning_rate"], wanted["eval_every"]) == (4, 0.02, 2)
    assert again.info.metrics["expert_steps"] == wanted["steps"]
    given = replace(GATES, gate_learning_rate=0.01)
    options = {"training": other, "gate_training": given}
    third = gated(llama, again.directory, tmp_path / "third", **options)
    assert third.info.hyperparameters == {**wanted, "gate_learning_rate": 0.01}


def test_gates_are_trained_in_float32_on_a_bfloat16_base(llama, adapter, tmp_path):
    half = load_base(llama.id, dtype="bfloat16")
    before = weights_of(half.model)
    expert = gated(half, adapter, tmp_path / "expert")
    assert same_weights(half.model, before)
    gates = torch.cat(list(expert.gates.values()))
    assert gates.dtype == torch.float32
    assert not torch.equal(gates, gates.bfloat16().float())


def test_an_interrupted_gate_training_resumes_to_the_same_bits(
    llama, adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr("phatgoose.training.trainer.GATE_CHECKPOINT_EVERY", 2)
    wanted = gated(llama, adapter, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(*on_call(PASS, 8, interrupt))  # in the fourth of four steps of two passes
        with pytest.raises(KeyboardInterrupt):
            gated(llama, adapter, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ExpertError, match="resume"):
        gated(llama, adapter, tmp_path / "cut")
    with pytest.raises(ConfigError, match="other settings"):
        train_gates(llama, adapter, TASK, out=tmp_path / "cut", resume=True)
    got = gated(llama, adapter, tmp_path / "cut", resume=True)
    assert all(torch.equal(got.gates[site], wanted.gates[site]) for site in wanted.gates)
    assert not list(tmp_path.glob(".*"))
    other = replace(TRAINING, batch_size=TRAINING.batch_size + 1)
    with pytest.warns(UserWarning, match="with another .*gate_batch_size"):
        gated(llama, adapter, tmp_path / "cut", resume=True, training=other)
