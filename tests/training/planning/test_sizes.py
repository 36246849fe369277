"""Numbers of parameters, from a base's config alone."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from phatgoose.base.loading import load_base, load_skeleton
from phatgoose.config import Formatting, Lora
from phatgoose.errors import BaseModelError
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.new_modules import placed_sites
from phatgoose.training.plan import plan_training
from phatgoose.training.plan_costs import KNOWN_BASES, Shapes
from training_jobs import SETTINGS
from training_runs import (
    SHAPES,
    each_shape,
)

pytestmark = pytest.mark.usefixtures("_offline")


@pytest.mark.usefixtures("smollm2_cache")
def test_the_table_of_known_bases_gives_what_their_configs_give():
    known = KNOWN_BASES["smollm2"]
    model = load_skeleton(known)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shapes = Shapes.of("smollm2", Lora())  # from its config where the package is installed
    assert (shapes.sites, shapes.expert) == (210, 4_884_480)
    assert shapes.target - shapes.prompt == known.vocab_size * known.hidden_size
    if shapes.from_table:
        pytest.skip("smollm2 is not installed: there is only the table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phatgoose.base.loading.smollm2_folder", _nowhere)
        assert Shapes.of("smollm2", Lora()) == dataclasses.replace(shapes, from_table=True)


def _nowhere() -> Path:
    raise BaseModelError("not here")


def test_memory_grows_with_what_is_trained_at_once(three_tasks, base_folders):
    base = str(base_folders["llama"])

    def memory(**changes):
        training = replace(SETTINGS["training"], batch_size=8, **changes)
        settings = {**SETTINGS, "training": training}
        return plan_training(base, three_tasks, **settings, dtype="float32").memory_bytes

    shapes = Shapes.of(base, SETTINGS["peft"])
    small, large = memory(micro_batch_size=2), memory(micro_batch_size=4)
    loaded, task = load_base(base, dtype="float32"), three_tasks[0].load().with_validation()
    pairs = Encoder.of(loaded, Formatting()).pairs(task.train)
    length, targets = (
        sum(sorted(lengths)[-4:-2])  # a larger micro-batch has the third and the fourth too
        for lengths in ([pair.length for pair in pairs], [len(pair.target) for pair in pairs])
    )
    grown = 2 * length * shapes.features * 4 + targets * shapes.vocabulary * 10
    assert large - small == pytest.approx(grown, abs=1)
    assert small > 4 * shapes.base + 16 * shapes.expert


@each_shape
def test_a_plan_counts_the_parameters_of_each_kind(planned_here, base_folders, shape):
    base, tasks = str(base_folders["llama"]), open_tasks(["reviews.jsonl"])
    plan = plan_training(base, tasks, peft=SHAPES[shape], dtype="bfloat16")
    model = load_base(base, dtype="float32").model
    sites = placed_sites(model, SHAPES[shape])
    counts = {
        "ia3": 2 * (32 + 32 + 48),
        "houlsby": 4 * (2 * 5 * 32 + 5 + 32),
        "pfeiffer": 2 * (2 * 3 * 32 + 3 + 32),
    }
    assert (plan.sites, plan.expert_parameters) == (len(sites), counts[shape])
    assert plan.gate_parameters == sum(site.in_features for site in sites.values())
    assert plan.dtype == ("float32" if shape == "ia3" else "bfloat16")
    itemsize = 4 if shape == "ia3" else 2
    vectors = 2 * 4 * plan.gate_parameters + 4 * 2 * 2 * 32 * 18  # gates, means; readings
    assert plan.tasks[0].disk_bytes == itemsize * plan.expert_parameters + vectors
