"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phatgoose.base import load_base
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.errors import BaseModelError, ConfigError, TaskError
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training import plan as planning
from phatgoose.training.modules import placed_sites
from phatgoose.training.plan import Planner, Speed
from phatgoose.training.train_expert import train_expert
from training_jobs import SETTINGS
from training_runs import SHAPES, each_shape

T5_XL = "google/t5-xl-lm-adapt"
PER_ROW = {"peft": Lora(rank=2), "training": Training(steps=5, batch_size=4, eval_every=2)}
GATES = GateTraining(gate_steps=3, statistics_examples=6)
READINGS = 4 * 2 * 2 * 32 * 18  # bytes: places, blocks, d, mean and rest and 16 factors

pytestmark = pytest.mark.usefixtures("_offline")


@pytest.mark.parametrize(("suite", "count"), [("t0hi", 36), ("flan", 166)])
def test_the_papers_pools_have_the_papers_numbers(suite, count):
    plan = Planner(T5_XL, dtype="bfloat16").plan(open_tasks([suite]))
    assert (plan.sites, plan.expert_parameters) == (432, 35_389_440)
    assert plan.gate_parameters == 1_032_192
    assert len(plan.tasks) == count
    total = plan.total()
    assert (total.steps, total.gate_steps, total.seconds) == (count * 1000, count * 100, None)
    assert all(task.is_bound for task in plan.tasks)
    assert {task.disk_bytes for task in plan.tasks} == {
        2 * 35_389_440 + 2 * 4 * 1_032_192 + 4 * 2 * 24 * 2048 * 18  # gates, means; readings
    }


def test_memory_counts_an_encoder_s_layers_with_prompts_alone():
    def memory(prompt):
        limits = Formatting(max_input_tokens=prompt, max_target_tokens=10)
        planner = Planner(T5_XL, dtype="bfloat16", formatting=limits)
        return planner.plan(open_tasks(["hub:a/b"])).memory_bytes

    attention, feed_forward = 4 * (2048 + 2048), 3 * (2048 + 5120)  # inputs and outputs
    encoder = 24 * (attention + feed_forward) + 24 * attention // 2  # and cross-attention's k, v
    assert memory(200) - memory(100) == 100 * 8 * 2 * 2 * encoder  # 8 rows, bfloat16, kept twice


def test_each_dataset_is_planned_with_its_own_micro_batch():
    news, hop = open_tasks(["t0hi/ag_news", "t0hi/wiki_hop"])
    assert (news.entry.micro_batch_size, hop.entry.micro_batch_size) == (16, 2)

    def memory(*tasks, **training):
        return Planner(T5_XL, training=Training(**training)).plan(tasks).memory_bytes

    plain = {rows: memory(news.without_micro_batch(), micro_batch_size=rows) for rows in (2, 8, 16)}
    assert (memory(hop), memory(news)) == (plain[2], plain[16])
    assert memory(hop, news) == plain[16]  # a worker may get either
    assert memory(news, micro_batch_size=2) == plain[16]
    assert memory(news, batch_size=8) == plain[8]


def test_a_plan_counts_what_training_will_do(planned_here, kind, base_folders):
    folder = str(base_folders[kind])
    planner = Planner(folder, **PER_ROW, gate_training=GATES, dtype="float32")
    plan = planner.plan(open_tasks(["counting.jsonl"]))
    base, data = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    (task,) = plan.tasks
    lengths = [pair.length for pair in Encoder.of(base).pairs(data.with_validation(0).train)]
    # Eight batches of four; after steps 2, 4 and 5, two examples; then means and readings.
    sequences = 4 * (5 + 3) + 3 * 2 + 2 * 6
    assert (task.examples, task.is_bound, task.steps, task.gate_steps) == (18, False, 5, 3)
    assert task.tokens == round(sequences * sum(lengths) / len(lengths))
    expert = train_expert(base, data, out="new/counting", **PER_ROW, gate_training=GATES)
    files = [load_file(file) for file in expert.directory.glob("*.safetensors")]
    assert task.disk_bytes == sum(t.nbytes for tensors in files for t in tensors.values())
    assert plan.sites == len(expert.lora)
    assert plan.gate_parameters == sum(gate.numel() for gate in expert.gates.values())


def test_checkpoints_are_as_large_as_planned(planned_here, base_folders, monkeypatch):
    sizes, real = [], shutil.rmtree

    def measure(folder, *arguments, **options):
        if Path(folder).name.startswith("checkpoint-"):
            files = ("trainable.safetensors", "optimizer.pt")
            sizes.append(sum((Path(folder) / name).stat().st_size for name in files))
        real(folder, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", measure)
    settings = {"peft": Lora(rank=64), "training": Training(steps=4, batch_size=2, eval_every=1)}
    folder = str(base_folders["llama"])
    plan = Planner(folder, **settings, dtype="float32").plan([])
    assert plan.total().disk_bytes == 0
    base, task = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    train_expert(base, task, out="new", **settings, gate_training=GATES)
    adapter = 4 * plan.expert_parameters
    assert max(sizes) == pytest.approx((plan.working_bytes - adapter) / 3, rel=0.05)


def test_settings_change_the_plan_as_they_change_training(planned_here):
    tasks = open_tasks(["counting.jsonl"])

    def planned(dtype="float32", speed=None, **options):
        return Planner("tiny-base", dtype=dtype, **PER_ROW, **options).plan(tasks, speed)

    def disk(**options):
        return plain.tasks[0].disk_bytes - planned(**options).tasks[0].disk_bytes

    plain, joint = planned(gate_training=GATES), planned(gate_training=GateTraining(joint=True))
    assert joint.tasks[0].gate_steps == 0
    assert joint.working_bytes == plain.working_bytes + 9 * 4 * plain.gate_parameters
    assert disk(gate_training=replace(GATES, means=False)) == 4 * plain.gate_parameters
    assert disk(gate_training=replace(GATES, readings=False)) == READINGS
    assert disk(gate_training=replace(GATES, embeddings=True)) == -4 * 384 * 6
    assert disk(gate_training=GATES, dtype="bfloat16") == 2 * plain.expert_parameters
    (row,) = planned(gate_training=GATES, speed=Speed(100.0)).tasks
    trained, forward = 4 * (5 + 3), 3 * 2 + 2 * 6
    length = row.tokens / (trained + forward)
    assert row.seconds == pytest.approx((trained + forward / 2) * length / 100, rel=0.01)
    short = planned(formatting=Formatting(max_input_tokens=4, max_target_tokens=1))
    assert short.tasks[0].tokens == (4 * 105 + 3 * 2 + 2 * 18) * 5


@each_shape
def test_a_plan_counts_the_parameters_of_each_kind(planned_here, base_folders, shape):
    planner = Planner(str(base_folders["llama"]), peft=SHAPES[shape], dtype="bfloat16")
    plan = planner.plan(open_tasks(["reviews.jsonl"]))
    sites = placed_sites(load_base(planner.base, dtype="float32").model, SHAPES[shape])
    counts = {
        "ia3": 2 * (32 + 32 + 48),
        "houlsby": 4 * (2 * 5 * 32 + 5 + 32),
        "pfeiffer": 2 * (2 * 3 * 32 + 3 + 32),
        "dora": sum(2 * (s.in_features + s.out_features) + s.out_features for s in sites.values()),
    }
    assert (plan.sites, plan.expert_parameters) == (len(sites), counts[shape])
    assert plan.gate_parameters == sum(site.in_features for site in sites.values())
    assert plan.dtype == ("float32" if shape == "ia3" else "bfloat16")
    itemsize = 2 if shape in ("houlsby", "pfeiffer") else 4  # a DoRA's are in two files
    vectors = 2 * 4 * plan.gate_parameters + READINGS  # gates, means
    assert plan.tasks[0].disk_bytes == itemsize * plan.expert_parameters + vectors


def test_without_the_bases_tokenizer_the_plan_is_an_upper_bound(planned_here):
    folder = planned_here / "bare"
    folder.mkdir()
    shutil.copy(planned_here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    (task,) = Planner(str(folder)).plan(open_tasks(["counting.jsonl"])).tasks
    assert (task.is_bound, task.examples) == (True, 18)


def test_copies_are_counted_and_those_that_are_missing_are_refused(planned_here, hub_copies):
    samsum, trec = open_tasks(["t0hi/samsum", "t0hi/trec"], hub_copies)
    (task,) = Planner("tiny-base", **PER_ROW).plan([samsum]).tasks
    assert (task.examples, task.is_bound) == (8, False)
    with pytest.raises(TaskError, match="trec isn't there"):
        Planner("tiny-base", **PER_ROW).plan([trec])


@pytest.mark.parametrize(
    ("base", "task", "settings", "error", "match"),
    [
        ("tiny-base", "counting", {"peft": Lora(sites="no")}, ConfigError, "matches 'no'"),
        ("tiny-base", "counting", {"dtype": "int3"}, BaseModelError, "dtype is 'int3'"),
        ("tiny-base", "single", {}, TaskError, "at least two"),
        ("tiny-base", "counting", {"formatting": Formatting(chat=True)}, TaskError, "no chat"),
    ],
)
def test_what_could_not_be_trained_is_refused(planned_here, base, task, settings, error, match):
    with pytest.raises(error, match=match):
        Planner(base, **settings).plan(open_tasks([f"{task}.jsonl"]))


def test_speed_and_memory_are_of_the_longest_micro_batch_and_a_drawn_one(
    three_tasks, base_folders, tmp_path, monkeypatch
):
    long = [{"input": "a very " * n + "long text", "target": "yes"} for n in range(9)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    tasks = [*three_tasks, *open_tasks([str(tmp_path / "long.jsonl")])]
    trained = []

    def record(base, task, **settings):
        trained.append((task, settings["training"]))
        return train_expert(base, task, **settings)

    monkeypatch.setattr(planning, "train_expert", record)
    planner = Planner(str(base_folders["llama"]), **SETTINGS, dtype="float32")
    speed = planner.measure(tasks)
    assert 0 < speed.tokens_per_second < 1e7
    ((task, training),) = trained
    assert (training.batch_size, training.micro_batch_size) == (4, 2)
    words = [len(row.input.split()) for row in (*task.train[2:], *task.validation)]
    assert words == [18, 16, 18, 16]
    plan = planner.plan(tasks, speed)
    if speed.memory_bytes is not None:
        assert plan.memory_bytes == speed.memory_bytes > 50e6


def test_a_speed_is_measured_with_the_tasks_own_micro_batch(three_tasks, base_folders, monkeypatch):
    tasks = [
        replace(task, entry=replace(task.entry, micro_batch_size=own))
        for task, own in zip(three_tasks, (1, 3, None), strict=True)
    ]
    trained = []

    def record(base, task, **settings):
        trained.append((task.name, settings["training"].micro_batch_size))
        return train_expert(base, task, **settings)

    monkeypatch.setattr(planning, "train_expert", record)
    Planner(str(base_folders["llama"]), **SETTINGS, dtype="float32").measure(tasks)
    assert trained == [("two", 3)]


def test_without_data_on_this_machine_no_speed_can_be_measured(base_folders):
    with pytest.raises(TaskError, match="no speed can be measured"):
        Planner(str(base_folders["llama"])).measure(open_tasks(["t0hi/trec"]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_a_processs_memory_is_its_own_not_its_parents():
    held = torch.ones(40_000_000)
    code = "from phatgoose.training.plan import most_memory; print(most_memory())"
    started = [sys.executable, "-c", code]
    child = subprocess.run(started, capture_output=True, text=True, check=True, close_fds=False)
    assert 50e6 < int(child.stdout) < planning.most_memory() - held.nbytes / 2
