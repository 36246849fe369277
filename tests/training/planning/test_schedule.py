"""Plans spread over workers, the memory of one, and speeds measured on the spot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phatgoose.errors import ConfigError
from phatgoose.training.plan import plan_training, schedule
from training_jobs import SETTINGS


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
def test_the_next_expert_goes_to_whoever_is_free(three_tasks, base_folders, workers, seconds):
    plan = plan_training(str(base_folders["llama"]), three_tasks, **SETTINGS, dtype="float32")
    spread = schedule(with_seconds(plan, 10, 40, 20, 30), workers, 0.5)
    assert spread.seconds == pytest.approx(seconds)
    assert spread.share == pytest.approx(100 / (workers * seconds))
    assert spread.gpus == workers / 2
    assert spread.working_bytes == min(workers, 4) * plan.working_bytes
    assert (spread.disk_bytes, spread.memory_bytes) == (
        4 * plan.tasks[0].disk_bytes,
        plan.memory_bytes,
    )


def test_a_cluster_that_is_none_is_refused(three_tasks, base_folders):
    plan = plan_training(str(base_folders["llama"]), three_tasks, **SETTINGS)
    with pytest.raises(ConfigError, match="workers is 0"):
        schedule(plan, 0)
    with pytest.raises(ConfigError, match="gpus_per_worker is -1"):
        schedule(plan, 1, -1)
