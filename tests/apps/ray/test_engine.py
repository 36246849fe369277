"""Jobs on a real Ray cluster of two raylets on this machine; machines and workers die in it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import ConfigError, EngineError
from phatgoose.evaluation.compare import compare
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.pool import Pool
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.pool_jobs import ExpertJob, train_experts
from phatgoose.training.trainer import COMPLETE, Hyperparameters, Progress

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

from ray.cluster_utils import Cluster  # noqa: E402  there is none without ray

from phatgoose.apps.ray_engine import RayEngine, connected  # noqa: E402

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
NOTICED_SOON = {  # that a machine is gone
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
FRUIT = ["apples", "pears", "plums"]


@pytest.fixture(scope="module")
def cluster():
    """Two machines, with two cores and one; their three GPUs exist on paper only."""
    head = {"num_cpus": 2, "num_gpus": 2, **SMALL, "_system_config": NOTICED_SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.second = cluster.add_node(num_cpus=1, num_gpus=1, **SMALL)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@dataclass(frozen=True)
class Nap:
    """A job that sleeps, and at its first try may kill its worker or fail."""

    name: str
    deadly: bool = False
    wrong: bool = False
    tries: int = 1
    size: int = 2

    def again(self) -> Nap:
        return replace(self, tries=self.tries + 1, deadly=self.deadly and self.tries > 3)


class Naps:
    """What naps are taken with."""

    @contextmanager
    def open(self):
        def nap(job):
            if job.deadly:
                time.sleep(1.5)
                os.kill(os.getpid(), signal.SIGKILL)
            if job.wrong:
                raise ConfigError("this nap can't be taken")
            time.sleep(0.1)
            return os.getpid(), job.tries

        yield nap

    def portable(self):
        return self


def naps(engine, *jobs):
    """What comes of these naps, and the units of a bar."""
    units = []
    done = dict(engine.run(Naps(), jobs, SimpleNamespace(update=units.append)))
    return done, sum(units)


def test_a_lost_worker_is_replaced_and_its_job_done_again(cluster, caplog):
    jobs = [Nap("deadly", deadly=True), *(Nap(f"nap {i}") for i in range(6))]
    done, units = naps(RayEngine(2), *jobs)
    assert {job.name: tries for job, (_, tries) in done.items()} == {
        job.name: 1 + job.deadly for job in jobs
    }
    assert len({process for process, _ in done.values()}) <= 3  # a process does many
    assert units == sum(job.size for job in jobs)
    assert "A worker was lost at deadly; another continues." in caplog.text


@pytest.mark.parametrize(
    ("job", "error"),
    [
        ({"wrong": True}, (ConfigError, r"^this nap can't be taken$")),
        ({"deadly": True, "tries": 5}, (EngineError, r"3 workers were lost at bad")),
    ],
    ids=str,
)
def test_what_a_job_raises_is_raised_here_and_one_that_only_kills_is_given_up(cluster, job, error):
    with pytest.raises(error[0], match=error[1]):
        naps(RayEngine(1), Nap("bad", **job))


def write_tasks(folder):
    folder.mkdir()
    for name in FRUIT:
        rows = [
            {"input": f"{name} {i}:", "target": ("yes", "no")[i % 2], "choices": ["yes", "no"]}
            for i in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tensors_of(expert):
    return load_file(expert / ADAPTER_WEIGHTS) | load_file(expert / LAYOUT.vectors)


def scores_of(comparison):
    return {
        row: {task: (r.low, r.high, r.sample.score) for task, r in results.items()}
        for row, results in comparison.results.items()
    }


def test_experts_and_cells_survive_machines_and_are_those_of_the_local_engine(
    cluster, base_folders, llama, tmp_path, caplog
):
    from serving import beside, until

    training = Training(steps=60, batch_size=4, micro_batch_size=4, eval_every=5, eval_examples=4)
    gates = GateTraining(gate_steps=30, statistics_examples=4)
    settings, tests = (
        Hyperparameters(Lora(rank=2), training, gates),
        write_tasks(tmp_path / "tests"),
    )
    places = [str(path) for path in sorted(tests.iterdir())]
    jobs = [ExpertJob(task, settings) for task in open_tasks(places)]
    far, here, gate = tmp_path / "far", tmp_path / "here", tmp_path / "gate"
    engine = HeldHalfway(RayEngine(3), gate)
    place = str(base_folders["llama"])
    running = train_experts(place, jobs, out=far, dtype="float32", engine=engine)

    # The second machine holds one of three workers. It goes when all three are in the middle,
    # where they wait for it, and everything on it at once: a worker may not finish its job before
    # it misses its machine.
    def pull_the_plug():
        begun = f".*.work/*/checkpoint-*/{COMPLETE}"
        until(lambda: len({path.parts[-4] for path in far.glob(begun)}) == 3, seconds=300)
        (raylet,) = cluster.second.all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)
        cluster.remove_node(cluster.second, allow_graceful=False)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        gate.touch()

    plug = beside(pull_the_plug)
    assert sorted(expert.name for expert in running) == FRUIT
    plug.result()
    assert caplog.text.count("A worker was lost at") == 1
    assert sorted(p.name for p in far.iterdir()) == FRUIT
    list(train_experts(llama.id, jobs, out=here, dtype="float32"))
    for name in FRUIT:
        wanted, got = tensors_of(here / name), tensors_of(far / name)
        assert wanted.keys() == got.keys()
        assert all(got[key].equal(tensor) for key, tensor in wanted.items())

    options = {"methods": ["base", "phatgoose", "oracle"], "base": llama, "limit": 6}
    wanted, got = (
        compare(Pool.open(far), tests, out=tmp_path / name, **options, **engine)
        for name, engine in (("alone", {}), ("both", {"engine": RayEngine(2)}))
    )
    assert scores_of(got) == scores_of(wanted)
    assert got.choices == wanted.choices


@dataclass
class HeldHalfway:
    """An engine whose workers wait after their first ten steps, until there is a file `gate`."""

    engine: RayEngine
    gate: Path
    remote: bool = True

    def run(self, workshop, jobs, bar):
        return self.engine.run(HeldWorkshop(workshop, self.gate), jobs, bar)


@dataclass(frozen=True)
class HeldWorkshop:
    """The workshop of `HeldHalfway`."""

    workshop: Any
    gate: Path

    def open(self):
        steps, step = itertools.count(), Progress.on_step_end

        def held(*arguments, **options):
            step(*arguments, **options)
            while next(steps) >= 10 and not self.gate.exists():
                time.sleep(0.02)

        Progress.on_step_end = held  # in the worker's process alone
        return self.workshop.open()

    def portable(self):
        return replace(self, workshop=self.workshop.portable())


def test_a_connection_that_exists_is_used(cluster):
    with connected("nowhere:1"):
        assert ray.is_initialized()
    assert ray.is_initialized()
