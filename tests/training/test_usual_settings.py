"""Settings that people know from other trainers: schedules, dropout, patience, callbacks, logs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    get_scheduler,
)

from phatgoose.base import load_base, quantisation
from phatgoose.errors import BaseModelError, ConfigError
from phatgoose.experts.kind import ModifiedLinear, applied
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.training.trainer import PartialTrainer
from tiny import VOCABULARY, assert_same_logits, logits_of, make_ids, make_tokenizer, peft_model
from training_runs import (
    GATES,
    LORA,
    TASK,
    TRAINING,
    assert_same_expert,
    train,
    words,
)


class Rates(TrainerCallback):
    """The rate of every step, and how many steps its training has."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.stages: list[int] = []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **_):
        self.rates.append(lr_scheduler.get_last_lr()[0])
        self.stages.append(state.max_steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_schedule_is_transformers_own_and_a_callback_hears_of_both_trainings(
    llama, tmp_path, schedule
):
    heard = Rates()
    training = replace(TRAINING, steps=8, lr_schedule=schedule)
    train(llama, tmp_path / "echo", training=training, callbacks=[heard])
    assert heard.stages == [8] * 8 + [2] * 2  # the expert's, then the gates'
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    wanted = get_scheduler(schedule, optimiser, num_warmup_steps=2, num_training_steps=8)
    rates = []
    for _ in range(8):
        rates.append(wanted.get_last_lr()[0])
        optimiser.step()
        wanted.step()
    assert heard.rates[:8] == pytest.approx(rates)


def test_a_callback_may_end_the_training_and_that_step_is_validated(llama, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= 3

    training = replace(TRAINING, steps=50, eval_every=50)
    expert = train(llama, tmp_path / "echo", training=training, callbacks=[Stop()])
    assert expert.info.metrics["expert_steps"] == expert.info.metrics["expert_best_step"] == 3


def test_transformers_own_early_stopping_is_for_the_expert_alone(llama, tmp_path):
    stops = EarlyStoppingCallback(early_stopping_patience=1)
    expert = train(llama, tmp_path / "echo", callbacks=[stops])
    assert expert.info.metrics["gate_steps"] == GATES.gate_steps


def worsening(monkeypatch, best: int) -> None:
    """Validation losses fall up to step `best`, and rise from there on."""
    real = PartialTrainer.compute_loss

    def loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = real(self, model, inputs, return_outputs, num_items_in_batch)
        return found if model.training else found * (1 + abs(self.state.global_step - best))

    monkeypatch.setattr(PartialTrainer, "compute_loss", loss)


PATIENT = replace(TRAINING, steps=40, eval_every=1, patience=3)


def test_training_stops_after_so_many_validations_that_are_no_better(llama, tmp_path, monkeypatch):
    worsening(monkeypatch, best=2)
    metrics = train(llama, tmp_path / "echo", training=PATIENT).info.metrics
    assert (metrics["expert_steps"], metrics["expert_best_step"]) == (5, 2)
    assert metrics["gate_steps"] == 2  # which nothing validates


@pytest.mark.parametrize("checkpoint", [4, 5])
def test_a_training_that_resumes_is_as_patient_as_one_that_did_not(
    llama, tmp_path, monkeypatch, checkpoint
):
    worsening(monkeypatch, best=2)
    wanted = train(llama, tmp_path / "whole", training=PATIENT)
    real = PartialTrainer._save_checkpoint

    def cut_short(self, model, trial=None):
        real(self, model, trial)
        if self.state.global_step == checkpoint and "expert" in self._label:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialTrainer, "_save_checkpoint", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(llama, tmp_path / "echo", training=PATIENT)
    resumed = train(llama, tmp_path / "echo", training=PATIENT, resume=True)
    assert resumed.info.metrics["expert_best_step"] == 2
    assert_same_expert(resumed, wanted)


def test_dropout_acts_in_training_alone_and_no_dropout_changes_nothing(llama, tmp_path):
    plain = train(llama, tmp_path / "plain")
    same = train(llama, tmp_path / "same", peft=replace(LORA, lora_dropout=0.0))
    assert_same_expert(same, plain)
    dropped = train(llama, tmp_path / "dropped", peft=replace(LORA, lora_dropout=0.5))
    site = next(iter(plain.lora))
    assert not torch.equal(dropped.lora[site].A, plain.lora[site].A)
    ids = make_ids()
    once, again = (logits_of(peft_model(llama, dropped.directory), ids) for _ in range(2))
    assert torch.equal(once, again)


def test_rslora_is_scaled_by_the_root_of_the_rank_for_peft_and_for_us(llama, tmp_path):
    expert = train(llama, tmp_path / "echo", peft=replace(LORA, rslora=True))
    assert LoraConfig.from_pretrained(expert.directory).use_rslora is True
    assert {module.scale for module in expert.lora.values()} == {LORA.alpha / LORA.rank**0.5}
    ids = make_ids()
    with applied(llama.model, expert.modules, ModifiedLinear):
        ours = logits_of(llama.model, ids)
    assert_same_logits(ours, logits_of(peft_model(llama, expert.directory), ids))


def test_epochs_are_passes_over_the_training_examples(llama, tmp_path):
    training = replace(TRAINING, epochs=2.5)  # of six examples, four to a batch
    expert = train(llama, tmp_path / "echo", training=training)
    assert expert.info.metrics["expert_steps"] == 4
    assert expert.info.hyperparameters["steps"] == 4
    assert train(llama, tmp_path / "echo", training=training, resume=True).name == "echo"
    more = replace(TASK, train=words(*"abcdefghijkl"))
    assert train(llama, tmp_path / "more", more, training).info.metrics["expert_steps"] == 8


def test_logs_go_where_the_setting_says(llama, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    train(llama, tmp_path / "echo", training=replace(TRAINING, report_to="tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage, steps in (("expert", 4), ("gates", 2)):
        events = EventAccumulator(str(tmp_path / "runs" / "echo" / stage))
        events.Reload()
        assert [each.step for each in events.Scalars("train/loss")] == list(range(1, steps + 1))


def test_logs_that_nothing_can_take_are_refused_before_training(llama, tmp_path):
    missing = [name for name in ("wandb", "swanlab") if importlib.util.find_spec(name) is None]
    for name in ("nothing", *missing):
        complaint = "not supported" if name == "nothing" else f"requires {name}"
        with pytest.raises(ConfigError, match=f"report_to is '{name}': .*{complaint}"):
            train(llama, tmp_path / "echo", training=replace(TRAINING, report_to=name))
    assert not list(tmp_path.iterdir())


def test_an_expert_is_trained_on_a_base_of_four_bits_for_the_base_of_those_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # blocks of 64
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer(final_eos=False).save_pretrained(tmp_path / "base")
    plain, base = (load_base(tmp_path / "base", dtype=dtype) for dtype in ("float32", "4bit"))
    assert (quantisation(base.model), base.fingerprint) == ("Params4bit", plain.fingerprint)
    expert = train(base, tmp_path / "echo")
    assert expert.info.base == plain.reference
    assert all(module.B.any() for module in expert.lora.values())
    assert all(gate.any() for gate in expert.gates.values())
    for each in (plain, base):
        routed = compose(Pool.open(expert.directory), each, router="phatgoose")
        assert logits_of(routed, make_ids()).isfinite().all()


def test_four_bits_without_their_library_are_refused_in_a_line(base_folders, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="needs bitsandbytes: pip install bitsandbytes"):
        load_base(base_folders["llama"], dtype="4bit")
