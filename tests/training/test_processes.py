"""Several processes that train one expert together: the expert is that of one process."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phatgoose.base.loading import Base, load_base
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.experts.expert import LAYOUT, check_expert
from phatgoose.experts.kinds.peft import ADAPTER_WEIGHTS
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_expert
from phatgoose.training.trainer import (
    is_first,
    join_processes,
    process_count,
    process_rank,
    wait_for_all,
)

ANSWERS = ("yes", "no, never", "perhaps")
ROWS = [Example(f"Number {i}{'!' * (i % 5)}:", ANSWERS[i % 3]) for i in range(23)]
TASK = Task("numbers", train=tuple(ROWS[:16]), validation=tuple(ROWS[16:]))  # 7: not to be halved
TRAINING = Training(steps=5, batch_size=8, micro_batch_size=2, eval_every=2, learning_rate=2e-2)


def train(base: Base | str, out: Path, *, joint: bool) -> None:
    gates = GateTraining(gate_steps=3, statistics_examples=4, joint=joint)
    train_expert(
        base, TASK, out=out, peft=Lora(rank=2), training=TRAINING, gate_training=gates, resume=True
    )


def train_as(rank: int, port: int, base: Path, out: Path, joint: bool) -> None:
    """What one of two processes does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    warnings.simplefilter("default")
    torch.set_num_threads(1)
    train(load_base(base, dtype="float32"), out, joint=joint)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_train_the_expert_of_one(base_folders, llama, tmp_path, joint):
    train(llama, tmp_path / "alone" / "numbers", joint=joint)
    port, context = free_port(), multiprocessing.get_context("fork")
    places = (port, base_folders["llama"], tmp_path / "together" / "numbers", joint)
    both = [context.Process(target=train_as, args=(rank, *places)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    ended = [process.exitcode for process in both]
    for process in both:
        process.kill()
    assert ended == [0, 0]
    alone, together = (tmp_path / place / "numbers" for place in ("alone", "together"))
    assert check_expert(together) == []
    assert sorted(path.name for path in together.parent.iterdir()) == ["numbers"]
    for file in (ADAPTER_WEIGHTS, LAYOUT.vectors):
        wanted, got = load_file(alone / file), load_file(together / file)
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            largest = float(tensor.abs().max())
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-3 * largest)


def test_one_process_is_the_first_of_one_and_waits_for_nobody():
    assert (process_count(), process_rank(), is_first()) == (1, 0, True)
    join_processes()
    wait_for_all()
