"""Experts: trained, refused, interrupted and resumed to the same bits."""

import copy
import json
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import TrainerCallback

from forked import forked, kill_self, needs_fork
from phatgoose.base.loading import load_base
from phatgoose.errors import ExpertError, PhatgooseError, PoolError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.sites import find_sites
from phatgoose.tasks.task import Task
from phatgoose.training.train_expert import open_work
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import ADAPTER, GATES, LORA, TASK, TRAINING, assert_same_expert, train, words


def on_call(function: str, call: int, action):
    """(module, name, a function in its place that does `action` on its `call`-th call)."""
    module, _, name = function.rpartition(".")
    original, calls = getattr(import_module(module), name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            action()
        return original(*args, **kwargs)

    return import_module(module), name, counted


def interrupt():
    raise KeyboardInterrupt


def interrupted(monkeypatch, base, out: Path, function: str, call: int, **options) -> None:
    """Start a training in `out` that is interrupted in the given call."""
    with monkeypatch.context() as patch:
        patch.setattr(*on_call(function, call, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train(base, out, **options)
    assert not out.exists()


PASS = "phatgoose.training.trainer.target_logits"


def test_peft_loads_the_expert_and_computes_as_the_trained_model_did(base, tmp_path):
    ids, plain, seen = make_ids(), logits_of(base.model, make_ids()), []

    class Look(TrainerCallback):
        def on_train_end(self, *_, model, **__):
            seen.append(logits_of(model.eval(), ids))

    training = replace(TRAINING, eval_every=TRAINING.steps)  # the last step is the best one
    expert = train(base, tmp_path / "echo", training=training, callbacks=[Look()])
    assert not torch.allclose(seen[0], plain, atol=1e-2)
    assert_same_logits(logits_of(peft_model(base, expert.directory), ids), seen[0])


@pytest.fixture(scope="module")
def whole(base_folders, tmp_path_factory) -> Expert:
    """The expert of an uninterrupted training of the tiny Llama."""
    base = load_base(base_folders["llama"], dtype="float32")
    return train(base, tmp_path_factory.mktemp("whole") / "whole", name="other")


def test_a_finished_expert_is_complete_and_leaves_no_work_behind(llama, whole):
    assert whole.lora.keys() == whole.gates.keys() == whole.means.keys()
    assert whole.lora.keys() == find_sites(llama.model).keys()
    assert [path.name for path in whole.directory.parent.iterdir()] == ["whole"]
    info = whole.info
    assert (info.name, info.task["name"], info.base) == ("other", "echo", llama.reference)
    wanted = {"rank": 2, "alpha": 4, "steps": 4, "learning_rate": 0.02, "gate_steps": 2}
    assert wanted.items() <= info.hyperparameters.items()
    assert info.metrics["expert_steps"] == 4
    assert info.metrics["expert_best_step"] in (2, 4)
    assert info.metrics["expert_tokens_per_second"] > 0
    targets = json.loads((whole.directory / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(whole.lora)  # the same bytes in every run


def test_training_depends_on_its_seed_alone(llama, tmp_path, whole):
    torch.manual_seed(2)
    train(llama, tmp_path / "first", Task("other", words("w", "x", "y", "z")))  # on the same base
    assert_same_expert(train(llama, tmp_path / "again"), whole)
    other = train(llama, tmp_path / "other", training=replace(TRAINING, seed=7))
    assert (other.directory / ADAPTER).read_bytes() != (whole.directory / ADAPTER).read_bytes()


# Interruptions. A run's forward passes: per LoRA step 2 (micro-batches); after steps 2 and 4 one
# validation of 1; then 2 per gate step.


@pytest.mark.parametrize("kind", ["gpt2", "t5"], indirect=True)  # with dropout
def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path, monkeypatch):
    whole = train(base, tmp_path / "whole")
    interrupted(monkeypatch, base, tmp_path / "cut", PASS, call=8)
    assert (tmp_path / ".cut.work" / "expert" / "checkpoint-2" / "complete").is_file()
    assert_same_expert(train(base, tmp_path / "cut", resume=True), whole)
    assert not (tmp_path / ".cut.work").exists()


KILLS = {
    "in a LoRA step": (PASS, 8),
    "before a checkpoint's optimiser state": ("torch.save", 1),
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
    with pytest.raises(PoolError, match="No expert and no PEFT adapter in"):
        Pool.open(tmp_path)
    assert_same_expert(train(llama, tmp_path / "cut", resume=True), whole)


def test_a_routed_base_is_refused(llama, llama_pool, tmp_path):
    compose(llama_pool, llama, router="phatgoose")
    with pytest.raises(PhatgooseError, match="routed"):
        train(llama, tmp_path / "new")


def test_work_with_other_settings_data_or_base_is_not_resumed(llama, tmp_path, monkeypatch):
    interrupted(monkeypatch, llama, tmp_path / "cut", PASS, call=8)
    for other in (
        {"peft": replace(LORA, rank=3)},
        {"gate_training": replace(GATES, joint=True)},
        {"task": replace(TASK, train=words("quite", "other", "data"))},
        {"base": load_base(llama.id, dtype="bfloat16")},
    ):
        with pytest.raises(ExpertError, match="the same settings, data and base"):
            train(**{"base": llama, "out": tmp_path / "cut", "resume": True, **other})


def test_a_finished_expert_is_kept_and_what_differs_is_told(llama, loaded_bases, whole):
    t5 = copy.deepcopy(loaded_bases["t5"])
    for base in (t5, t5.id):
        with pytest.raises(WrongBaseError, match=r"is an expert of .*; choose another"):
            train(base, whole.directory, resume=True)
    rate = replace(GATES, gate_learning_rate=0.25)
    for other in ({"peft": replace(LORA, rank=3)}, {"gate_training": rate}):
        with pytest.warns(UserWarning, match=r"kept as it is, with another (rank|gate_l\w+)\.$"):
            train(llama, whole.directory, resume=True, **other)
    fewer = replace(GATES, statistics_examples=1)  # which `measure` may have changed
    assert_same_expert(train(llama, whole.directory, resume=True, gate_training=fewer), whole)


def test_one_process_at_a_time_is_at_a_piece_of_work(tmp_path):
    out = tmp_path / "expert"
    with open_work(out, {"a": 1}, resume=False) as work:
        (work / "checkpoint").write_text("1")
    with FileLock(work / "lock"):
        for resume in (True, False):
            another = open_work(out, {"a": 1}, resume=resume)
            with pytest.raises(ExpertError, match=r"lock.* could not be acquired"), another:
                pass
    with open_work(out, {"a": 1}, resume=True) as again:
        assert (again / "checkpoint").read_text() == "1"
