"""The trainer: losses, checkpoints, the order of examples, and several processes."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest

from phatgoose.errors import ExpertError
from phatgoose.tasks.batching import target_logits
from phatgoose.tasks.encoding import TokenPair
from phatgoose.tasks.task import Task
from phatgoose.training import trainer as trainer_module
from phatgoose.training.trainer import (
    visited,
)
from tiny import peft_model
from training_runs import (
    TASK,
    TRAINING,
    target_nll,
    train,
    without_dropout,
    words,
)


@pytest.mark.parametrize(("kind", "micro"), [("llama", 1), ("t5", 3)], indirect=["kind"])
def test_the_training_loss_is_the_mean_over_all_target_tokens_of_the_batch(base, tmp_path, micro):
    without_dropout(base.model)
    wanted = target_nll(base.model, base, TASK.train).mean().item()
    training = replace(TRAINING, steps=1, batch_size=6, micro_batch_size=micro, eval_every=1)
    expert = train(base, tmp_path / "echo", training=training)
    assert expert.info.metrics["expert_train_loss"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(("kind", "micro"), [("llama", 4), ("t5", 1)], indirect=["kind"])
def test_the_validation_loss_is_the_mean_over_all_target_tokens(base, tmp_path, micro):
    training = replace(TRAINING, micro_batch_size=micro)
    expert = train(base, tmp_path / "echo", training=training)
    wanted = target_nll(peft_model(base, expert.directory), base, TASK.validation).mean().item()
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(wanted, abs=1e-4)


def test_the_best_checkpoint_is_kept(llama, tmp_path, caplog):
    task = Task("liar", words("yes", "yes", "yes", "yes"), validation=words("no", "maybe"))
    training = replace(TRAINING, steps=10, learning_rate=0.1)
    with caplog.at_level(logging.INFO, "phatgoose.training.trainer"):
        expert = train(llama, tmp_path / "liar", task, training)
    logged = re.findall(r"step (\d+) of 10, validation loss ([\d.]+)", caplog.text)
    losses = {int(step): float(loss) for step, loss in logged}
    best = min(losses, key=losses.get)
    assert len(losses) == 5
    assert best != 10
    assert expert.info.metrics["expert_best_step"] == best
    loss = target_nll(peft_model(llama, expert.directory), llama, task.validation).mean().item()
    assert loss == pytest.approx(losses[best], abs=1e-3)


DIVERGED = "echo: {}: training diverged, the {} is {} at step {}; lower the learning rate, and rem"


def broken_after(passes: int, value: float):
    """Target logits that are `value` from that pass on."""
    calls = []

    def broken(model, inputs):
        calls.append(1)
        return target_logits(model, inputs) * (value if len(calls) > passes else 1.0)

    return broken


# A run's forward passes: per LoRA step 2; after steps 2 and 4 one validation; 2 per gate step.
@pytest.mark.parametrize(
    ("passes", "stage", "what", "step"),
    [
        (2, "expert", "loss", "2 of 4"),
        (4, "expert", "validation loss", "2 of 4"),
        (12, "gates", "loss", "2 of 2"),
    ],
)
def test_a_training_that_diverges_stops_at_once(
    llama, tmp_path, monkeypatch, passes, stage, what, step
):
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "target_logits", broken_after(passes, float("nan")))
        told = DIVERGED.format(stage, what, "nan", step)
        with pytest.raises(ExpertError, match=re.escape(told)):
            train(llama, tmp_path / "echo")
    assert not (tmp_path / "echo").exists()


def test_every_pass_visits_each_example_once_and_batches_hold_similar_lengths():
    pairs = [TokenPair([5] * (1 + i * 7 % 10), [i]) for i in range(10)]
    order = visited(pairs, batch=4, steps=5, seed=0)
    assert sorted(pair.target[0] for pair in order) == sorted([*range(10)] * 2)
    lengths = [pair.length for pair in order]
    assert all(lengths[i : i + 4] == sorted(lengths[i : i + 4]) for i in range(0, 20, 4))
    assert order == visited(pairs, batch=4, steps=5, seed=0)
    assert order != visited(pairs, batch=4, steps=5, seed=1)
