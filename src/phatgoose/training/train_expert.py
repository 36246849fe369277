"""Experts: an adapter of any kind trained on a task, then its gates and statistics.

Gates follow the expert, or are trained together with it (both in `gates`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..base.loading import Base
from ..config import Formatting, GateTraining, Lora, Peft, Training, given_or_default
from ..experts.expert import Expert
from ..experts.kinds.kind import FreshExpert
from ..experts.kinds.registry import kind_for
from ..tasks.cuts import Cuts
from ..tasks.task import Task, draw
from . import processes
from .gates import Record, add_gates, take_gates
from .new_modules import fresh_expert, parameters_at
from .progress import TrainingCallback
from .trainer import FitReport, TrainingRun, finished_expert, fit, settings_of_training
from .workdir import open_work

REPORT = "report.json"
JOINT_GATES = "gates.safetensors"


def train_expert(
    base: Base | str | Path,
    task: Task | str | Path,
    *,
    out: str | Path,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    name: str | None = None,
    resume: bool = False,
    restart: bool = False,
    callback: TrainingCallback | None = None,
) -> Expert:
    """A finished expert for `task`, written to `out`, with gates and statistics (paper section 3).

    `peft` sets the kind and shape of the adapter; None is the paper's LoRA. Gates are trained after
    it, or with `gate_training.joint` together with it, for its steps and at its learning rate
    (paper Appendix A); the files are the same either way.
    `base` is a loaded base or its name; a loaded one serves many tasks. `task` may be a file or
    `hub:DATASET` too. Checkpoints are kept in
    `.<out's name>.work` beside `out`. `resume` continues an interrupted run (and loads a finished
    expert, with a warning where that has other settings), `restart` throws its work away; with
    neither, existing work is an error.
    Where `accelerate launch` started several processes, all of them call this, share each batch,
    and the first one writes.
    Raises ExpertError when `out` exists, the name can't be an expert's or training diverges,
    ConfigError when resumed work had other settings, RoutingError when means are wanted and the
    base pads inside, TaskError when the task can't be used.
    """
    out, peft = Path(out), peft or Lora()
    kind_for(peft)  # refuses what is none
    training = given_or_default(Training, training, "training")
    gate_training = given_or_default(GateTraining, gate_training, "gate_training")
    formatting = given_or_default(Formatting, formatting, "formatting")
    settings = settings_of_training(peft, training, gate_training, formatting)
    finished = finished_expert(out, settings, resume=resume)
    if finished is not None:
        return finished
    run = TrainingRun.of(
        base,
        task,
        out,
        training=training,
        gate_training=gate_training,
        formatting=formatting,
        name=name,
        callback=callback,
    )
    parameters_at(run.base.model, peft)  # refuses bad settings before anything is written
    with open_work(out, run.identity(peft), resume=resume, restart=restart) as work:
        adapter = _train_adapter(run, peft)
        record = Record(
            hyperparameters={"peft": kind_for(peft).name, **asdict(peft)},
            metrics=json.loads((work / REPORT).read_text(encoding="utf-8")),
            gates=load_file(work / JOINT_GATES) if run.gate_training.joint else None,
            cuts_told=True,
        )
        return add_gates(run, adapter, record)


def _train_adapter(run: TrainingRun, peft: Peft) -> Path:
    """The folder of the trained adapter, made unless an earlier run finished it.

    Joint gates are left in the work folder beside the report.
    """
    task, training, work = run.task, run.training, run.work
    finished = work / "adapter"
    if finished.is_dir():
        run.callback.on_steps(training.steps)
        return finished
    validated = draw(task.validation, training.eval_examples, training.seed)
    train, validation = map(run.encoder.pairs, (task.train, validated))
    cuts = run.encoder.cuts(train)
    if processes.is_first():
        cuts.report(task.name)
    torch.manual_seed(training.seed)
    with fresh_expert(run.base, peft, joint=run.gate_training.joint) as fresh:
        report = fit(
            fresh.model,
            run=run,
            stage="expert",
            train=train,
            validation=validation,
            steps=training.steps,
            learning_rate=training.learning_rate,
            checkpoint_every=min(training.eval_every, training.steps),
        )
        gates = take_gates(fresh.parts) if run.gate_training.joint else None
        if processes.is_first():
            if gates is not None:
                save_file(gates, work / JOINT_GATES)
            _save_adapter(fresh, work, report, cuts)
            shutil.rmtree(work / "expert")
            run.callback.on_saved()
        processes.wait_for_all()
    return finished


def _save_adapter(fresh: FreshExpert, work: Path, report: FitReport, cuts: Cuts) -> None:
    """The adapter and the report, complete or not at all."""
    unfinished = work / "adapter.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    fresh.save(unfinished)
    metrics = {f"expert_{key}": value for key, value in asdict(report).items()} | cuts.record()
    (work / REPORT).write_text(json.dumps(metrics), encoding="utf-8")
    os.rename(unfinished, work / "adapter")
