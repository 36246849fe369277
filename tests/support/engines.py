"""Real engines for tests: the pool, the prompts, and the environment they run in."""

import os
from pathlib import Path

import pytest

import phatgoose
from phatgoose.base.loading import load_base
from phatgoose.base.smollm2 import smollm2_folder
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import BaseModelError
from phatgoose.tasks.loading import load_task
from phatgoose.training.train_expert import train_expert

TASKS = Path(phatgoose.__file__).parent / "apps" / "demo_tasks"  # vLLM's environment has no extras
UNSEEN = ("hotel_feedback", "evening_classes", "family_papers", "course_places", "village_post")
PROMPTS = 50


def engine_prompts():
    rows = (load_task(TASKS / f"{name}.csv").test[: PROMPTS // len(UNSEEN)] for name in UNSEEN)
    return [row.input for task in rows for row in task]


def engine_pool(tmp_path_factory, **gates):
    """The pool that PHATGOOSE_ENGINE_POOL names, or else one of experts trained for a few steps."""
    try:
        smollm2_folder()
    except BaseModelError as error:
        pytest.skip(str(error))
    if os.environ.get("PHATGOOSE_ENGINE_POOL"):
        return Path(os.environ["PHATGOOSE_ENGINE_POOL"])
    folder, base = tmp_path_factory.mktemp("pool"), load_base("smollm2", dtype="float32")
    few = {
        "peft": Lora(rank=16, alpha=16.0),
        "training": Training(steps=8, batch_size=4, eval_examples=4),
        "gate_training": GateTraining(gate_steps=1, statistics_examples=16, **gates),
    }
    for name in ("sentiment", "archive", "village"):
        train_expert(base, load_task(TASKS / f"{name}.csv"), out=folder / name, **few)
    return folder


def vllm_environment(routed=None, **more):
    """Environment variables for vLLM on a few shared cores, with our plugin if `routed`."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores may be shared
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # starts in half the time
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    # Without the variables of our tests' own.
    ours = {name for name in os.environ if "PHATGOOSE_" in name}
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    return {**plain, **fixed, **({"PHATGOOSE_MODEL": str(routed)} if routed else {}), **more}
