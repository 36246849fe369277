"""Plans spread over workers, the memory of one, and speeds measured on the spot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from command_line import open_row, write_rows
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import ConfigError, TaskError
from phatgoose.tasks.suites.training_tasks import open_tasks
from phatgoose.training.planning.plan import plan_training
from phatgoose.training.planning.schedule import schedule
from phatgoose.training.planning.sizes import Shapes
from phatgoose.training.planning.speed import Speed, measure_speed

SETTINGS = {
    "peft": Lora(rank=2),
    "training": Training(steps=20, batch_size=4, micro_batch_size=2, eval_every=10),
    "gate_training": GateTraining(gate_steps=5, statistics_examples=6),
}


@pytest.fixture
def tasks(tmp_path):
    for name in ("one", "two", "three"):
        write_rows(tmp_path / f"{name}.jsonl", [open_row(i) for i in range(20)])
    return open_tasks([str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")])


def with_seconds(plan, *seconds):
    tasks = [replace(plan.tasks[0], seconds=each) for each in seconds]
    return replace(plan, tasks=tuple(tasks), start_seconds=5.0)


@pytest.mark.parametrize(
    ("workers", "seconds"),
    [
        (1, 5 + 100),  # one after the other
        (2, 5 + 60),  # 10 + 20 + 30 beside 40
        (3, 5 + 40),
        (9, 5 + 40),  # more than there are experts
    ],
)
def test_the_next_expert_goes_to_whoever_is_free(tasks, base_folders, workers, seconds):
    plan = plan_training(str(base_folders["llama"]), tasks, **SETTINGS, dtype="float32")
    spread = schedule(with_seconds(plan, 10, 40, 20, 30), workers, 0.5)
    assert spread.seconds == pytest.approx(seconds)
    assert spread.share == pytest.approx(100 / (workers * seconds))
    assert spread.gpus == workers / 2
    assert spread.working_bytes == min(workers, 4) * plan.working_bytes
    assert (spread.disk_bytes, spread.memory_bytes) == (
        4 * plan.tasks[0].disk_bytes,
        plan.memory_bytes,
    )


def test_a_cluster_that_is_none_is_refused(tasks, base_folders):
    plan = plan_training(str(base_folders["llama"]), tasks, **SETTINGS)
    with pytest.raises(ConfigError, match="workers is 0"):
        schedule(plan, 0)
    with pytest.raises(ConfigError, match="gpus_per_worker is -1"):
        schedule(plan, 1, -1)


def test_memory_grows_with_what_is_trained_at_once(tasks, base_folders):
    base = str(base_folders["llama"])

    def memory(**changes):
        training = replace(SETTINGS["training"], batch_size=8, **changes)
        settings = {**SETTINGS, "training": training}
        return plan_training(base, tasks, **settings, dtype="float32").memory_bytes

    shapes = Shapes.of(base, SETTINGS["peft"])
    small, large = memory(micro_batch_size=2), memory(micro_batch_size=4)
    task = plan_training(base, tasks, **SETTINGS, dtype="float32").tasks[0]
    length = task.prompt_tokens + task.target_tokens
    grown = 2 * (length * shapes.features * 4 + task.target_tokens * shapes.vocabulary * 10)
    assert large - small == pytest.approx(grown, abs=1)
    assert small > 4 * shapes.base + 16 * shapes.expert


def test_a_measured_speed_is_used_stage_by_stage(tasks, base_folders):
    speed = Speed(100.0, 50.0, 200.0, start_seconds=3.0, memory_bytes=12345)
    plan = plan_training(str(base_folders["llama"]), tasks, **SETTINGS, speed=speed)
    task = plan.tasks[0]
    length = task.prompt_tokens + task.target_tokens
    wanted = length * (4 * 20 / 100 + 4 * 5 / 50 + task.measured / 200)
    assert task.seconds == pytest.approx(wanted)
    assert (plan.memory_bytes, plan.start_seconds) == (12345, 3.0)
    assert any("100 tokens a second of an expert, 50 of gates" in note for note in plan.notes)
    assert not any("counted" in note for note in plan.notes)


def test_a_speed_is_measured_on_the_first_task_with_data(tasks, base_folders):
    speed = measure_speed(str(base_folders["llama"]), tasks, **SETTINGS, dtype="float32")
    rates = (speed.expert, speed.gates, speed.forward, speed.start_seconds)
    assert all(0 < rate < 1e7 for rate in rates)
    assert speed.memory_bytes > 50e6
    with pytest.raises(TaskError, match="no speed can be measured"):
        measure_speed(str(base_folders["llama"]), open_tasks(["t0hi/trec"]), **SETTINGS)


def test_the_command_tells_what_a_cluster_takes(tasks, base_folders, tmp_path, phat):
    files = [task.named for task in tasks]
    common = ("train", *files, "--base", base_folders["llama"], "--plan", "--workers", 2)
    done = phat(
        *common,
        "--gpus-per-worker",
        0.5,
        "--tokens-per-second",
        1000,
        "--json",
        tmp_path / "plan.json",
    )
    assert done.code == 0
    assert "On 2 workers (1 GPUs): " in " ".join(done.out.split())
    spread = json.loads((tmp_path / "plan.json").read_text())["schedule"]
    assert (spread["workers"], spread["gpus"]) == (2, 1.0)
    done = phat(*common, "--measure", "--tflops", 3)
    assert (done.code, "--tflops tells a speed, and --measure finds one" in done.err) == (2, True)


def test_flags_of_a_cluster_need_one(tasks, base_folders, phat):
    common = ("train", tasks[0].named, "--base", base_folders["llama"])
    done = phat(*common, "--workers", 2)
    assert (done.code, "--workers is for --engine ray" in done.err) == (2, True)
    done = phat(*common, "--engine", "slurm")
    assert (done.code, "--engine is 'slurm', but must be local or ray" in done.err) == (2, True)
    done = phat(*common, "--measure")
    assert (done.code, "--measure is for --plan" in done.err) == (2, True)
