"""Experts of a pool, and unfinished work: complete or absent, whoever competes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import ExpertError
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.pool_jobs import ExpertJob, train_experts
from phatgoose.training.train_expert import open_work
from phatgoose.training.trainer import Hyperparameters

HOLD = """
from filelock import FileLock
lock = FileLock({!r})
lock.acquire()
print("held", flush=True)
input()
"""


def test_one_process_at_a_time_is_at_a_piece_of_work(tmp_path):
    out = tmp_path / "expert"
    with open_work(out, {"a": 1}, resume=False) as work:
        (work / "checkpoint").write_text("1")
    lock = str(tmp_path / ".expert.work" / "lock")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"held\n"
        for resume in (True, False):
            with pytest.raises(ExpertError, match="Another process is at work"):  # noqa: SIM117
                with open_work(out, {"a": 1}, resume=resume):
                    pass
        assert (work / "checkpoint").exists()
        other.kill()
    with open_work(out, {"a": 1}, resume=True) as again:
        assert (again / "checkpoint").read_text() == "1"


def test_finished_experts_come_first_with_a_warning_where_settings_differ(llama, tmp_path):
    rows = [{"input": f"Number {i}:", "target": "yes"} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    training = Training(batch_size=4, steps=3, eval_every=1)
    settings = Hyperparameters(Lora(rank=2), training, GateTraining(gate_steps=2))
    job = ExpertJob(*open_tasks([str(tmp_path / "rows.json")]), settings)
    (first,) = train_experts(llama, [job], out=tmp_path)
    other = replace(settings, training=replace(settings.training, seed=3))
    with pytest.warns(UserWarning, match=r"kept as it is, with another seed\.$"):
        (again,) = train_experts(llama, [replace(job, settings=other)], out=tmp_path)
    assert again == first
