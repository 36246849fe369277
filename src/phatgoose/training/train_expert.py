"""Experts: an adapter of any kind trained on somebody's task, then its gates and statistics.

Gates follow the expert, or are trained together with it (`GateTraining.joint`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..base.loading import Base, load_base
from ..config import PEFT_KINDS, Formatting, GateTraining, Lora, Peft, Training
from ..errors import ExpertError
from ..experts.expert import Expert
from ..experts.expert_info import check_name
from ..tasks.collating import Collator
from ..tasks.cuts import Cuts
from ..tasks.encoding import Encoder
from ..tasks.task import Task
from . import processes
from .gates import Record, add_gates
from .loop import FitReport, Watcher, fit
from .new_modules.fresh import FreshExpert, fresh_expert
from .new_modules.placement import parameters_at
from .unfinished import discard_work, open_work

__all__ = ["train_expert"]

REPORT = "report.json"
JOINT_GATES = "gates.safetensors"


def train_expert(
    base: Base | str,
    task: Task,
    *,
    out: str | Path,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    name: str | None = None,
    resume: bool = False,
    restart: bool = False,
    watcher: Watcher | None = None,
) -> Expert:
    """A finished expert for `task`, written to `out`, with gates and statistics (METHOD section 3).

    `peft` says of which kind and shape the adapter is; None is the paper's LoRA. Gates are trained
    after it, or with `gate_training.joint` together with it, for its steps and at its learning rate
    (the paper's Appendix A); its files are the same either way.
    `base` is a loaded base or its name; loading it once serves many tasks. Checkpoints are kept in
    `.<out's name>.work` beside `out`. An interrupted run is continued with `resume` (a finished one
    is simply loaded) and thrown away with `restart`; with neither, existing work is an error.
    `watcher` is told of steps and of what is kept. Where `accelerate launch` started several
    processes, all of them call this, share each batch, and the first one writes.
    Raises ExpertError when `out` exists or the name can't be an expert's, ConfigError when resumed
    work had other settings, TaskError when the task can't be used.
    """
    out = Path(out)
    peft, training = peft or Lora(), training or Training()
    gate_training, formatting = gate_training or GateTraining(), formatting or Formatting()
    if out.exists() and resume:
        discard_work(out)
        return Expert.load(out)
    if out.exists():
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    check_name(name or out.name)
    processes.join()
    base = load_base(base) if isinstance(base, str) else base
    identity = {
        "base": base.fingerprint,
        "task": task.digest,
        "settings": [asdict(peft), asdict(training), asdict(gate_training), asdict(formatting)],
    }
    # What can't be trained is refused here, before anything is written.
    task, encoder = task.with_validation(training.seed), Encoder.of(base, formatting)
    parameters_at(base.model, peft)
    with open_work(out, identity, resume=resume, restart=restart) as work:
        joint = gate_training.joint
        adapter = _train_adapter(
            base, task, encoder, work, peft, training, watcher or Watcher(), joint=joint
        )
        record = Record(
            hyperparameters={"peft": _kind_of(peft), **asdict(peft)},
            metrics=json.loads((work / REPORT).read_text(encoding="utf-8")),
            gates=load_file(work / JOINT_GATES) if joint else None,
            told=True,
        )
        return add_gates(
            base,
            adapter,
            task,
            encoder,
            out=out,
            work=work,
            training=training,
            gate_training=gate_training,
            name=name,
            record=record,
            watcher=watcher,
        )


def _train_adapter(
    base: Base,
    task: Task,
    encoder: Encoder,
    work: Path,
    peft: Peft,
    training: Training,
    watcher: Watcher,
    *,
    joint: bool,
) -> Path:
    """The folder of the trained adapter, made unless an earlier run finished it.

    `joint` trains gates with it and leaves them in `work` beside the report.
    """
    finished = work / "adapter"
    if finished.is_dir():
        watcher.advanced(training.steps)
        return finished
    collator = Collator(base.model, base.tokenizer.pad_token_id, packs=True)
    pairs = [
        [encoder.pair(example.input, example.target, example.passage) for example in split]
        for split in (task.train, task.validation[: training.eval_examples])
    ]
    cuts = encoder.cuts(pairs[0])
    if processes.is_first():
        cuts.tell(task.name)
    torch.manual_seed(training.seed)
    with fresh_expert(base, peft, joint=joint) as fresh:
        report = fit(
            fresh.model,
            train=pairs[0],
            validation=pairs[1],
            collator=collator,
            training=training,
            steps=training.steps,
            learning_rate=training.learning_rate,
            work=work / "expert",
            checkpoint_every=min(training.eval_every, training.steps),
            label=f"{task.name}: expert",
            watcher=watcher,
        )
        gates = fresh.take_gates() if joint else None
        if processes.is_first():
            if gates is not None:
                save_file(gates, work / JOINT_GATES)
            _save_adapter(fresh, work, report, cuts)
            shutil.rmtree(work / "expert")
            watcher.kept()
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


def _kind_of(peft: Peft) -> str:
    return next(kind for kind, config in PEFT_KINDS.items() if isinstance(peft, config))
