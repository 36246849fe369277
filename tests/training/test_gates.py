"""Gates: trained after an expert, and nothing else with them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from phatgoose.base.loading import load_base
from phatgoose.config import GateTraining, Training
from phatgoose.errors import ExpertError
from phatgoose.sites import find_sites
from phatgoose.tasks.task import Task
from phatgoose.training.train_expert import train_gates
from tiny import make_adapter
from training_runs import ADAPTER, train, words

TASK = Task("echo", words("a", "bee", "seedy", "of", "gee", "ice"), validation=words("yes"))
TRAINING = Training(batch_size=4, micro_batch_size=2, learning_rate=0.05)
GATES = GateTraining(gate_steps=4)


def gated(base, adapter, out, **options):
    """Gates trained for an adapter, with these settings unless told otherwise."""
    settings = {"training": TRAINING, "gate_training": GATES, **options}
    return train_gates(base, adapter, TASK, out=out, **settings)


def state_of(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, bytes]]:
    weights = model.state_dict().items()
    modules = dict(model.named_modules())
    return modules, {key: value.view(torch.uint8).numpy().tobytes() for key, value in weights}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_training_changes_the_gates_and_nothing_else(base, dtype, tmp_path):
    base = load_base(base.id, dtype=dtype)
    folder = make_adapter(base, tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = state_of(base.model)
    expert = gated(base, folder, tmp_path / "expert")
    assert state_of(base.model) == before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert (expert.directory / ADAPTER).read_bytes() == files[ADAPTER]
    assert expert.gates.keys() == find_sites(base.model).keys()
    assert all(gate.any() for gate in expert.gates.values())
    gates = torch.cat(list(expert.gates.values()))  # in float32, whatever the base is in
    assert not torch.equal(gates, gates.bfloat16().float())


def test_the_settings_of_an_adapters_own_training_are_no_gate_trainings(llama, tmp_path):
    expert = train(llama, tmp_path / "expert")  # TRAINING and GATES of training_runs
    other = replace(TRAINING, batch_size=2, seed=3)
    again = gated(llama, expert.directory, tmp_path / "again", training=other)
    changed = {"gate_steps": 4, "gate_learning_rate": 0.005, "seed": 3}
    changed |= {"gate_batch_size": 2, "gate_micro_batch_size": 2}
    wanted = {**expert.info.hyperparameters, **changed}
    assert again.info.hyperparameters == wanted
    assert (wanted["steps"], wanted["learning_rate"], wanted["eval_every"]) == (4, 0.02, 2)
    assert again.info.metrics["expert_steps"] == wanted["steps"]


class Interrupted(TrainerCallback):
    """A checkpoint of every second step, and an interruption in the fourth, between two passes."""

    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step % 2 == 0

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_gate_training_resumes_to_the_same_bits(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    wanted = gated(llama, adapter, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        gated(llama, adapter, tmp_path / "cut", callbacks=[Interrupted()])
    checkpoints = (tmp_path / ".cut.work" / "gates").glob("checkpoint-*")
    assert [path.name for path in checkpoints] == ["checkpoint-2"]
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ExpertError, match="resume"):
        gated(llama, adapter, tmp_path / "cut")
    with pytest.raises(ExpertError, match="the same settings"):
        train_gates(llama, adapter, TASK, out=tmp_path / "cut", resume=True)
    got = gated(llama, adapter, tmp_path / "cut", resume=True)
    assert all(torch.equal(got.gates[site], wanted.gates[site]) for site in wanted.gates)
    assert not list(tmp_path.glob(".*"))
    other = replace(TRAINING, batch_size=TRAINING.batch_size + 1)
    with pytest.warns(UserWarning, match="with another .*gate_batch_size"):
        gated(llama, adapter, tmp_path / "cut", resume=True, training=other)
