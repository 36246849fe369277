"""Small disks, short trainings on them, what they leave, and the one line that tells of failure."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phatgoose.base import Base
from phatgoose.config import Training
from phatgoose.errors import PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_expert
from training_jobs import GATES, LORA

TASK = Task("t", tuple(Example(f"Say {i}", "yes") for i in range(8)))


FEW = {"training": Training(batch_size=4, steps=3, eval_every=1), "gate_training": GATES}


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"can't mount here: {done.stderr.decode().strip()}")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def told(action: Callable[[], object]) -> str:
    with pytest.raises(PhatgooseError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train(base: Base, out: Path, **options: bool) -> Expert:
    return train_expert(base, TASK, out=out, peft=LORA, **FEW, **options)
