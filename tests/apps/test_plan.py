"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from phatgoose.apps.plan import Speed, measured, plan_of
from phatgoose.base import load_base
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.errors import BaseModelError, ConfigError, TaskError
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.modules import placed_sites
from phatgoose.training.train_expert import train_expert
from phatgoose.training.trainer import Hyperparameters
from training_runs import SHAPES, each_shape

T5_XL = "google/t5-xl-lm-adapt"
TRAINING = Training(steps=5, batch_size=4, micro_batch_size=2, eval_every=2)
GATES = GateTraining(gate_steps=3, statistics_examples=6)
SETTINGS = Hyperparameters(Lora(rank=2), TRAINING, GATES)
READINGS = 4 * 2 * 32 * 18  # bytes: blocks, d, mean and rest and 16 factors

pytestmark = pytest.mark.usefixtures("_offline")


@pytest.mark.parametrize(("suite", "count"), [("t0hi", 36), ("flan", 166)])
def test_the_papers_pools_have_the_papers_numbers(suite, count):
    plan = plan_of(T5_XL, "bfloat16", Hyperparameters(), open_tasks([suite]))
    assert (plan.sites, plan.expert_parameters) == (432, 35_389_440)
    assert plan.gate_parameters == 1_032_192
    assert len(plan.tasks) == count
    total = plan.total()
    assert (total.steps, total.gate_steps, total.seconds) == (count * 1000, count * 100, None)
    assert all(task.is_bound for task in plan.tasks)
    assert {task.disk_bytes for task in plan.tasks} == {
        2 * 35_389_440 + 2 * 4 * 1_032_192 + 4 * 24 * 2048 * 18  # gates, means; readings
    }


def test_a_plan_counts_what_training_will_do(planned_here, kind, base_folders):
    folder = str(base_folders[kind])
    plan = plan_of(folder, "float32", SETTINGS, open_tasks(["counting.jsonl"]))
    base, data = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    (task,) = plan.tasks
    lengths = [pair.length for pair in Encoder.of(base).pairs(data.with_validation(0).train)]
    # Eight batches of four; after steps 2, 4 and 5, two examples; then means and readings.
    sequences = 4 * (5 + 3) + 3 * 2 + 2 * 6
    assert (task.examples, task.is_bound, task.steps, task.gate_steps) == (18, False, 5, 3)
    assert task.tokens == round(sequences * sum(lengths) / len(lengths))
    expert = train_expert(
        base,
        data,
        out="new/counting",
        peft=SETTINGS.peft,
        training=TRAINING,
        gate_training=GATES,
    )
    files = [load_file(file) for file in expert.directory.glob("*.safetensors")]
    assert task.disk_bytes == sum(t.nbytes for tensors in files for t in tensors.values())
    assert plan.sites == len(expert.lora)
    assert plan.gate_parameters == sum(gate.numel() for gate in expert.gates.values())
    assert plan.working_bytes == (9 + 1) * 4 * plan.expert_parameters


def test_settings_change_the_plan_as_they_change_training(planned_here):
    tasks = open_tasks(["counting.jsonl"])

    def planned(dtype="float32", speed=None, **changed):
        return plan_of("tiny-base", dtype, replace(SETTINGS, **changed), tasks, speed)

    def disk(dtype="float32", **changed):
        return plain.tasks[0].disk_bytes - planned(dtype, **changed).tasks[0].disk_bytes

    plain, joint = planned(), planned(gates=GateTraining(joint=True))
    assert joint.tasks[0].gate_steps == 0
    assert joint.working_bytes == plain.working_bytes + 9 * 4 * plain.gate_parameters
    assert disk(gates=replace(GATES, means=False)) == 4 * plain.gate_parameters
    assert disk(gates=replace(GATES, readings=False)) == READINGS
    assert disk(gates=replace(GATES, embeddings=True)) == -4 * 384 * 6
    assert disk("bfloat16") == 2 * plain.expert_parameters
    (row,) = planned(speed=Speed(100.0)).tasks
    trained, forward = 4 * (5 + 3), 3 * 2 + 2 * 6
    length = row.tokens / (trained + forward)
    assert row.seconds == pytest.approx((trained + forward / 2) * length / 100, rel=0.01)
    short = planned(gates=GateTraining(), formatting=Formatting(4, max_target_tokens=1))
    assert short.tasks[0].tokens == (4 * 105 + 3 * 2 + 2 * 18) * 5


@each_shape
def test_a_plan_counts_the_parameters_of_each_kind(planned_here, base_folders, shape):
    place, settings = str(base_folders["llama"]), Hyperparameters(SHAPES[shape])
    plan = plan_of(place, "bfloat16", settings, open_tasks(["reviews.jsonl"]))
    sites = placed_sites(load_base(place, dtype="float32").model, SHAPES[shape])
    counts = {
        "ia3": 2 * (32 + 32 + 48),
        "houlsby": 4 * (2 * 5 * 32 + 5 + 32),
        "pfeiffer": 2 * (2 * 3 * 32 + 3 + 32),
        "dora": sum(2 * (s.in_features + s.out_features) + s.out_features for s in sites.values()),
    }
    assert (plan.sites, plan.expert_parameters) == (len(sites), counts[shape])
    assert plan.dtype == ("float32" if shape == "ia3" else "bfloat16")
    itemsize = 4 if shape == "ia3" else 2
    vectors = 2 * 4 * plan.gate_parameters + READINGS  # gates, means
    assert plan.tasks[0].disk_bytes == itemsize * plan.expert_parameters + vectors


def test_without_the_bases_tokenizer_the_plan_is_an_upper_bound(planned_here):
    folder = planned_here / "bare"
    folder.mkdir()
    shutil.copy(planned_here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    (task,) = plan_of(str(folder), "auto", SETTINGS, open_tasks(["counting.jsonl"])).tasks
    assert (task.is_bound, task.examples) == (True, 18)


@pytest.mark.parametrize(
    ("task", "dtype", "changed", "error", "match"),
    [
        ("counting", "auto", {"peft": Lora(sites="no")}, ConfigError, "matches 'no'"),
        ("counting", "int3", {}, BaseModelError, "dtype is 'int3'"),
        ("single", "auto", {}, TaskError, "at least two"),
        ("counting", "auto", {"formatting": Formatting(chat=True)}, TaskError, "no chat"),
    ],
)
def test_what_could_not_be_trained_is_refused(planned_here, task, dtype, changed, error, match):
    with pytest.raises(error, match=match):
        plan_of("tiny-base", dtype, replace(SETTINGS, **changed), open_tasks([f"{task}.jsonl"]))


def test_speed_and_memory_are_measured_where_there_are_data(planned_here, base_folders):
    long = [{"input": "a very " * n + "long text", "target": "yes"} for n in range(9)]
    (planned_here / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    place, tasks = str(base_folders["llama"]), open_tasks(["counting.jsonl", "long.jsonl"])
    speed = measured(place, "float32", SETTINGS, tasks)
    assert 0 < speed.tokens_per_second < 1e7
    if sys.platform == "linux":
        assert speed.memory_bytes is not None
        assert speed.memory_bytes > 50e6
    assert plan_of(place, "float32", SETTINGS, tasks, speed).memory_bytes == speed.memory_bytes
    with pytest.raises(TaskError, match="no speed can be measured"):
        measured(place, "float32", SETTINGS, open_tasks(["t0hi/trec"]))
