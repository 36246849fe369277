"""Settings of very short trainings."""

import json
from pathlib import Path

from phatgoose.config import GateTraining, Lora, Training
from phatgoose.tasks.suites.registry import open_tasks
from phatgoose.training.pool_jobs import ExpertJob
from phatgoose.training.trainer import Hyperparameters

LORA = Lora(rank=2)
TRAINING = Training(steps=4, batch_size=4, micro_batch_size=4, eval_every=1)
GATES = GateTraining(gate_steps=2, statistics_examples=4)
SETTINGS = Hyperparameters(LORA, TRAINING, GATES)


def job_in(folder: Path) -> ExpertJob:
    """The training of one expert on twelve rows of a file, which is written to `folder`."""
    rows = [{"input": f"Number {i}:", "target": ("yes", "no")[i % 2]} for i in range(12)]
    file = folder / "numbers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = open_tasks([str(file)])
    return ExpertJob(task, SETTINGS)
