"""Experts: trained, interrupted and resumed to the same bits."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from forked import forked, kill_self, needs_fork
from phatgoose.base.loading import load_base
from phatgoose.base.sites import find_sites
from phatgoose.config import Formatting
from phatgoose.errors import ExpertError, PhatgooseError, PoolError, TaskError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.tasks.task import Example, Task, draw
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import (
    ADAPTER,
    LORA,
    PASS,
    TASK,
    TRAINING,
    assert_same_expert,
    interrupted,
    on_call,
    spying_on_fit,
    target_nll,
    train,
    words,
)


def test_what_was_cut_is_told_once_recorded_and_shown(llama, tmp_path, caplog):
    task = Task("long", tuple(Example("a" * n, "yes") for n in (9, *[3] * 19)), words("x"))
    cut = Formatting(max_input_tokens=8)
    with caplog.at_level(logging.INFO, "phatgoose"):
        expert = train(llama, tmp_path / "long", task, formatting=cut)
    told = "long: 1 of 20 inputs (5 %) cut to 8 tokens, by 1 in the median"
    assert [line for line in caplog.messages if "cut" in line] == [told]
    metrics = {key: value for key, value in expert.info.metrics.items() if "inputs" in key}
    assert metrics == {"inputs": 20, "inputs_cut": 1, "inputs_cut_to": 8, "inputs_cut_by": 1}
    assert expert.info.hyperparameters["truncation"] == "middle"
    (record,) = Pool.open(tmp_path / "long").records()
    assert record["formatting"] == {
        "max_input_tokens": 8,
        "truncation": "middle",
        "chat": False,
        "inputs_cut": 1,
    }


def test_cut_targets_are_told_once_for_expert_and_gates(llama, tmp_path):
    task = Task("long", words("a", "b", "cdefgh", "ijklmno"), words("x"))
    told = r"long: 2 of 4 targets \(50 %\) cut to 4 tokens, by 4 in the median"
    with pytest.warns(UserWarning, match=told) as warned:
        train(llama, tmp_path / "long", task, formatting=Formatting(max_target_tokens=4))
    assert len([each for each in warned if "target" in str(each.message)]) == 1


def test_validation_examples_are_drawn_by_the_seed(llama, tmp_path, caplog):
    """The first of a file that is sorted by label are all of one label."""
    task = replace(TASK, validation=words(*["yes"] * 8, *["no"] * 8))
    training = replace(TRAINING, eval_examples=4, seed=3)
    expert = train(llama, tmp_path / "sorted", task, training)
    drawn = draw(task.validation, 4, 3)
    assert {example.target for example in drawn} == {"yes", "no"}
    loss = target_nll(peft_model(llama, expert.directory), llama, drawn).mean().item()
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(loss, abs=1e-4)


def test_peft_loads_the_expert_and_computes_as_the_trained_model_did(base, tmp_path, monkeypatch):
    ids, seen = make_ids(), []
    plain = logits_of(base.model, ids)
    with spying_on_fit(monkeypatch, lambda model: seen.append(logits_of(model, ids))):
        expert = train(base, tmp_path / "echo")
    assert not torch.allclose(seen[0], plain, atol=1e-2)
    assert_same_logits(logits_of(peft_model(base, expert.directory), ids), seen[0])


def test_a_finished_expert_is_complete_and_leaves_no_work_behind(llama, tmp_path):
    expert = train(llama, tmp_path / "echo")
    assert expert.lora.keys() == expert.gates.keys() == expert.means.keys()
    assert expert.lora.keys() == find_sites(llama.model).keys()
    assert expert.info.base == llama.reference
    assert (expert.info.name, expert.info.task["name"]) == ("echo", "echo")
    assert [path.name for path in tmp_path.iterdir()] == ["echo"]


def test_settings_and_results_are_recorded(llama, tmp_path):
    info = train(llama, tmp_path / "echo", name="other").info
    assert info.name == "other"
    wanted = {"rank": 2, "alpha": 4, "steps": 4, "learning_rate": 0.02, "gate_steps": 2}
    assert wanted.items() <= info.hyperparameters.items()
    assert info.metrics["expert_steps"] == 4
    assert info.metrics["expert_best_step"] in (2, 4)
    assert info.metrics["expert_tokens_per_second"] > 0
    assert info.metrics["expert_tokens"] > 0


def test_training_lowers_the_loss(llama, tmp_path):
    training = replace(TRAINING, steps=30, eval_every=30)
    expert = train(llama, tmp_path / "echo", training=training)
    before = target_nll(llama.model, llama, TASK.train).mean()
    after = target_nll(peft_model(llama, expert.directory), llama, TASK.train).mean()
    assert after < 0.5 * before


def test_an_expert_does_not_depend_on_what_its_base_served_before(llama, tmp_path, whole):
    train(llama, tmp_path / "first", Task("other", words("x", "y", "z")))
    assert_same_expert(train(llama, tmp_path / "second"), whole)


def test_a_bfloat16_base_is_trained_through_float32_copies(base_folders, tmp_path, monkeypatch):
    half = load_base(base_folders["llama"], dtype="bfloat16")
    weights = {key: value.clone() for key, value in half.model.state_dict().items()}
    dtypes = {True: set(), False: set()}

    def look(model):
        for parameter in model.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)

    with spying_on_fit(monkeypatch, look):
        expert = train(half, tmp_path / "echo")
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    saved = load_file(expert.directory / ADAPTER)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(half.model.state_dict()[key], weights[key]) for key in weights)


def test_training_depends_on_its_seed_alone(llama, tmp_path, whole):
    torch.manual_seed(2)
    assert_same_expert(train(llama, tmp_path / "again"), whole)
    other = train(llama, tmp_path / "other", training=replace(TRAINING, seed=7))
    assert (other.directory / ADAPTER).read_bytes() != (whole.directory / ADAPTER).read_bytes()


def test_experts_can_act_on_chosen_sites(llama, tmp_path):
    expert = train(llama, tmp_path / "echo", peft=replace(LORA, sites="self_attn"))
    assert expert.gates.keys() == find_sites(llama.model, "self_attn").keys()


def test_training_needs_two_examples(llama, tmp_path):
    with pytest.raises(TaskError, match="at least two"):
        train(llama, tmp_path / "echo", Task("tiny", words("a")))


def test_a_routed_base_is_refused(llama, llama_pool, tmp_path):
    compose(llama_pool, llama)
    with pytest.raises(PhatgooseError, match="routed"):
        train(llama, tmp_path / "echo")


# Interruptions. A run's forward passes: per LoRA step 2 (micro-batches); after steps 2 and 4 one
# validation of 1; then 2 per gate step.


@pytest.mark.parametrize("kind", ["gpt2", "t5"], indirect=True)  # with dropout
def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path, monkeypatch):
    whole = train(base, tmp_path / "whole")
    interrupted(monkeypatch, base, tmp_path / "cut", PASS, call=8)
    assert (tmp_path / ".cut.work" / "expert" / "checkpoint-2" / "complete").is_file()
    assert_same_expert(train(base, tmp_path / "cut", resume=True), whole)
    assert not (tmp_path / ".cut.work").exists()


def test_a_resumed_run_skips_what_is_done(llama, tmp_path, monkeypatch):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=11)  # in the gates
    passes = []
    monkeypatch.setattr(*on_call(PASS, 5, lambda: passes.append("too many")))
    train(llama, tmp_path / "cut", resume=True)
    assert not passes


def test_unfinished_work_is_an_error_unless_resumed_or_restarted(
    llama, tmp_path, monkeypatch, whole
):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    with pytest.raises(ExpertError, match="use resume to continue it or restart"):
        train(llama, tmp_path / "cut")
    assert (tmp_path / ".cut.work" / "expert" / "checkpoint-2").is_dir()
    assert_same_expert(train(llama, tmp_path / "cut", restart=True), whole)


def test_restarting_with_other_settings_uses_them(llama, tmp_path, monkeypatch):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    expert = train(llama, tmp_path / "cut", peft=replace(LORA, rank=3), restart=True)
    assert {lora.A.shape[0] for lora in expert.lora.values()} == {3}


def test_resuming_without_any_work_starts_it(llama, tmp_path, whole):
    assert_same_expert(train(llama, tmp_path / "echo", resume=True), whole)


KILLS = {
    "in a LoRA step": (PASS, 8),
    "before a checkpoint's optimiser state": ("torch.save", 1),
    "before the adapter is in place": ("os.rename", 1),
    "in a gate step": (PASS, 12),
    "in the middle of the expert's files": ("phatgoose.experts.expert.model_card", 1),
    "before the expert is in place": ("os.rename", 2),
}


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("function", "call"), KILLS.values(), ids=KILLS)
def test_a_killed_run_never_looks_finished_and_can_be_resumed(
    llama, tmp_path, whole, function, call
):
    def train_and_die() -> None:
        setattr(*on_call(function, call, kill_self))
        train(llama, tmp_path / "cut")

    assert forked(train_and_die) == -signal.SIGKILL
    with pytest.raises(PoolError, match="No expert was found"):
        Pool.open(tmp_path)
    assert_same_expert(train(llama, tmp_path / "cut", resume=True), whole)
