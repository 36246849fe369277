"""Plans: the paper's numbers, tiny ones counted by hand, and nothing fetched from anywhere."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from phatgoose.apps.plan import plan_of
from phatgoose.base import load_base
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.train_expert import placed_sites
from phatgoose.training.trainer import Hyperparameters
from training_runs import SHAPES, each_shape

T5_XL = "google/t5-xl-lm-adapt"
TRAINING = Training(steps=5, batch_size=4, micro_batch_size=2, eval_every=2)
GATES = GateTraining(gate_steps=3, statistics_examples=6)
SETTINGS = Hyperparameters(Lora(rank=2), TRAINING, GATES)

pytestmark = pytest.mark.usefixtures("_offline")


def test_a_plan_counts_what_training_will_do(planned_here, kind, base_folders):
    folder = str(base_folders[kind])
    plan = plan_of(folder, SETTINGS, open_tasks(["counting.jsonl"]))
    base, data = load_base(folder, dtype="float32"), load_task("counting.jsonl")
    (task,) = plan.tasks
    lengths = [pair.length for pair in Encoder.of(base).pairs(data.with_validation(0).train)]
    # Eight batches of four; after steps 2, 4 and 5, two examples; then means and readings.
    trained, forward, length = 4 * (5 + 3), 3 * 2 + 2 * 6, sum(lengths) / len(lengths)
    assert (task.examples, task.is_bound, task.steps, task.gate_steps) == (18, False, 5, 3)
    assert task.tokens == round((trained + forward) * length)
    short = replace(
        SETTINGS,
        gate_training=GateTraining(joint=True),
        formatting=Formatting(4, max_target_tokens=1),
    )
    (task,) = plan_of(folder, short, open_tasks(["counting.jsonl"])).tasks
    assert (task.gate_steps, task.tokens) == (0, (4 * 5 + 3 * 2 + 2 * 18) * 5)


@each_shape
def test_a_plan_counts_the_parameters_of_each_kind(planned_here, base_folders, shape):
    place, settings = str(base_folders["llama"]), Hyperparameters(SHAPES[shape])
    plan = plan_of(place, settings, open_tasks(["reviews.jsonl"]))
    sites = placed_sites(load_base(place, dtype="float32").model, SHAPES[shape])
    counts = {
        "ia3": 2 * (32 + 32 + 48),
        "houlsby": 4 * (2 * 5 * 32 + 5 + 32),
        "pfeiffer": 2 * (2 * 3 * 32 + 3 + 32),
        "dora": sum(2 * (s.in_features + s.out_features) + s.out_features for s in sites.values()),
    }
    assert (plan.sites, plan.expert_parameters) == (len(sites), counts[shape])


def test_without_the_bases_tokenizer_the_plan_is_an_upper_bound(planned_here):
    folder = planned_here / "bare"
    folder.mkdir()
    shutil.copy(planned_here / "tiny-base" / "config.json", folder)  # weights aren't needed either
    (task,) = plan_of(str(folder), SETTINGS, open_tasks(["counting.jsonl"])).tasks
    assert (task.is_bound, task.examples) == (True, 18)
