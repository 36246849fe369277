"""The loop: whose mean a loss is, when it is validated, and which checkpoint is kept."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phatgoose.config import Training
from phatgoose.errors import ConfigError
from phatgoose.tasks.task import Task
from phatgoose.training.trainer import _micro_batch, is_first, process_count, process_rank
from tiny import peft_model
from training_runs import (
    TASK,
    TRAINING,
    target_nll,
    train,
    without_dropout,
    words,
)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
@pytest.mark.parametrize("micro", [1, 3])
def test_the_training_loss_is_the_mean_over_all_target_tokens_of_the_batch(base, tmp_path, micro):
    without_dropout(base.model)
    wanted = target_nll(base.model, base, TASK.train).mean().item()
    training = replace(TRAINING, steps=1, batch_size=6, micro_batch_size=micro, eval_every=1)
    expert = train(base, tmp_path / "echo", training=training)
    assert expert.info.metrics["expert_train_loss"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
@pytest.mark.parametrize("micro", [1, 4])
def test_the_validation_loss_is_the_mean_over_all_target_tokens(base, tmp_path, micro):
    training = replace(TRAINING, micro_batch_size=micro)
    expert = train(base, tmp_path / "echo", training=training)
    wanted = target_nll(peft_model(base, expert.directory), base, TASK.validation).mean().item()
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(wanted, abs=1e-4)


def test_the_micro_batch_changes_the_result_by_rounding_only(llama, tmp_path):
    training = replace(TRAINING, steps=1, batch_size=6, eval_every=1, warmup_ratio=0.0)

    def factors(micro: int) -> Tensor:
        settings = replace(training, micro_batch_size=micro)
        expert = train(llama, tmp_path / str(micro), training=settings)
        return torch.cat([t.flatten() for lora in expert.lora.values() for t in (lora.A, lora.B)])

    close = (factors(1) - factors(6)).abs() < 1e-3 * training.learning_rate
    assert close.float().mean() > 0.99


def test_the_last_step_is_validated_whatever_the_interval(llama, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    expert = train(llama, tmp_path / "echo", training=replace(TRAINING, steps=5, eval_every=3))
    steps = re.findall(r"step (\d+) of 5, validation loss", caplog.text)
    assert steps == ["3", "5"]
    assert expert.info.metrics["expert_best_step"] in (3, 5)


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


def test_a_process_takes_an_equal_share_of_a_batch_or_says_why_not(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert (process_count(), process_rank(), is_first()) == (3, 1, False)
    assert _micro_batch(Training(batch_size=12, micro_batch_size=8)) == 4
    assert _micro_batch(Training(batch_size=30, micro_batch_size=8)) == 5
    with pytest.raises(ConfigError, match="batch_size is 16, but must be a multiple of the 3"):
        _micro_batch(Training(batch_size=16))
