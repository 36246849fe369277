"""Training an expert: an adapter on a task, then its gates, then statistics (paper section 3).

Each stage leaves its result in the work folder (`workdir`), where an interrupted run resumes. The
expert's directory is written last, whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..base import (
    Base,
    BaseReference,
    check_base,
    fingerprint_here,
    load_base,
    number_format,
    recorded_id,
    same_base,
)
from ..config import GATE_RATE, Formatting, GateTraining, Lora, Peft, Training
from ..errors import BaseModelError, ConfigError, ExpertError, WrongBaseError
from ..experts.expert import LAYOUT, Expert, adapter_files, check_name, invocation_of, read_modules
from ..experts.kind import applied, check_fit
from ..experts.peft_files import record_invocation
from ..experts.registry import kind_for
from ..files import sha256_of, shortened
from ..passes import ActsOn
from ..sites import find_sites
from ..tasks.embeddings import load_embedder
from ..tasks.encoding import CUTS, Encoder, as_read
from ..tasks.loading import given_task
from ..tasks.prompt_passes import read_pairs
from ..tasks.task import Task, draw
from .modules import GatedLinear, fresh_expert, parameters_at, take_gates
from .statistics import statistics_of
from .trainer import TrainingCallback, fit, is_first, join_processes, reporters, wait_for_all
from .workdir import discard_work, open_work, work_of

REPORT = "report.json"
JOINT_GATES = "gates.safetensors"
GATE_CHECKPOINT_EVERY = 25
# Settings of `Training` that gates are trained with, too.
SHARED = (
    *("batch_size", "micro_batch_size", "lr_schedule", "warmup_ratio", "weight_decay"),
    "max_grad_norm",
)
# Settings that unfinished work may differ in: statistics are measured at the end.
FREE = (
    "report_to",
    "statistics_examples",
    "means",
    "readings",
    "embeddings",
    "embedder",
    "embedding_form",
)


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
    callbacks: Iterable[TrainerCallback] = (),
) -> Expert:
    """A finished expert for `task`, written to `out`, with gates and statistics (paper section 3).

    Checkpoints are kept in `.<out's name>.work` beside `out`. If `accelerate launch` started
    several processes, all of them call this, share each batch, and the first one writes.

    Args:
        base: A loaded base, which serves many tasks, or its name.
        task: A task, a file, or `hub:DATASET`.
        out: The folder to write.
        peft: The kind and shape of the adapter: `Lora`, `Dora`, `IA3` or `Bottleneck`; None is
            `Lora()`.
        training: Steps, rate and so on; None is `Training()`. With its `acts_on` the expert acts
            from its prompts' end on; so do its gates, and its means are measured there.
        gate_training: Gates are trained after the adapter, or if it is `joint` together with it,
            for its steps and at its learning rate (paper Appendix A); the files are the same either
            way. None is `GateTraining()`.
        formatting: How inputs are cut and wrapped; None is `Formatting()`.
        name: The expert's name; None is that of `out`.
        resume: Continue an interrupted run, or load a finished expert, with a warning if that has
            other settings. Its data aren't compared with `task`.
        restart: Throw away the work of an earlier run. Without this or `resume`, it is an error.
        callback: A `TrainingCallback`, which hears of steps.
        callbacks: transformers' TrainerCallbacks, for the training of the expert and of its gates.

    Raises:
        ExpertError: `out` exists, the name can't be an expert's, or training diverges.
        ConfigError: Work to be resumed had other settings.
        WrongBaseError: The finished expert to be resumed is of another base.
        RoutingError: Mean activations are asked for, but the base pads its tokens inside.
        TaskError: The task can't be used.
    """
    out, peft = Path(out), peft or Lora()
    kind_for(peft)  # refuses what is none
    training = training or Training()
    gates = gate_training or GateTraining()
    formatting = formatting or Formatting()
    settings = settings_of_training(peft, training, gates, formatting)
    finished = finished_expert(out, base, settings, resume=resume)
    if finished is not None:
        return finished
    run = TrainingRun.of(base, task, out, training, gates, formatting, name, callback)
    acting = acting_for(run.base, run.encoder, training.acts_on)
    run = replace(run, acting=acting, callbacks=tuple(callbacks))
    if run.acting is not None and not kind_for(peft).new_modules.acts_from_ends:
        raise ConfigError(
            f"Experts of the kind {kind_for(peft).name} can't be trained to act from a prompt's "
            f"end on; leave acts_on out."
        )
    parameters_at(run.base.model, peft)  # refuses bad settings before anything is written
    with open_work(out, run.identity(peft), resume=resume, restart=restart) as work:
        adapter = _trained_adapter(run, peft)
        record = Record(
            hyperparameters=settings_of_training(peft, run.training, gates, run.encoder.formatting),
            metrics=json.loads((work / REPORT).read_text(encoding="utf-8")),
            gates=load_file(work / JOINT_GATES) if gates.joint else None,
            cuts_told=True,
        )
        return _with_gates_and_statistics(run, adapter, record)


def train_gates(
    base: Base | str | Path,
    adapter: str | Path,
    task: Task | str | Path,
    *,
    out: str | Path,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    name: str | None = None,
    resume: bool = False,
    restart: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
) -> Expert:
    """The expert made of an existing adapter and gates trained for it on `task`.

    Everything but the gates is frozen (paper section 3). Which tokens the expert acts on follows
    the adapter, not `training`.

    Args:
        base: A loaded base or its name.
        adapter: A PEFT LoRA or (IA)³ or a bottleneck adapter, or an expert without gates (an
            imported one), whose records are kept: the settings of `training` are not recorded as
            its own, but as the gates' (docs/format.md).
        task: The data it was trained on: a task, a file, or `hub:DATASET`.
        out: The folder to write.
        training: All that `gate_training` doesn't say; None is `Training()`.
        gate_training: Steps, learning rate and statistics; None is `GateTraining()`.
        formatting: How inputs are cut and wrapped; None is `Formatting()`.
        name: The expert's name; None is that of `out`.
        resume: Continue an interrupted run, or load a finished expert.
        restart: Throw away the work of an earlier run.
        callbacks: transformers' TrainerCallbacks.

    Raises:
        ExpertError: The adapter can't be used or doesn't fit the base, `out` exists, or training
            diverges.
        WrongBaseError: The adapter records another base, or the finished expert does.
        ConfigError: Work to be resumed had other settings, or joint training is asked for.
        RoutingError: Mean activations are asked for, but the base pads its tokens inside.
        TaskError: The task can't be used.
    """
    out, adapter = Path(out), Path(adapter)
    if gate_training is not None and gate_training.joint:
        raise ConfigError(
            "joint is on, but an adapter that exists can't be trained together with its gates; "
            "turn it off here, or train a new expert."
        )
    training = training or Training()
    gates = gate_training or GateTraining()
    formatting = formatting or Formatting()
    settings = _gate_settings(training, gates) | asdict(formatting)
    finished = finished_expert(out, base, settings, resume=resume)
    if finished is not None:
        return finished
    modules = read_modules(adapter)
    run = TrainingRun.of(base, task, out, training, gates, formatting, name)
    hyperparameters: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}
    acting = invocation_of(adapter)
    if (adapter / LAYOUT.info).is_file():
        earlier = Expert.load(adapter)
        check_base(earlier.info.base, run.base.reference, f"expert {earlier.name!r}")
        hyperparameters, metrics = earlier.info.hyperparameters, earlier.info.metrics
        acting = earlier.acts_on
    check_acting(run.base, acting)
    run = replace(run, acting=acting, callbacks=tuple(callbacks))
    settings = _gate_settings(run.training, gates) | asdict(run.encoder.formatting)
    record = Record({**hyperparameters, **settings}, metrics)
    check_fit(adapter.name, modules, find_sites(run.base.model))
    identity = run.identity(adapter=sha256_of(adapter / adapter_files(adapter).weights))
    with open_work(out, identity, resume=resume, restart=restart):
        return _with_gates_and_statistics(run, adapter, record)


@dataclass(frozen=True)
class TrainingRun:
    """The training of the expert `name`, to be written to `out`.

    `task` has a validation split; `digest` is that of the task as it was given. `acting` is the end
    of prompts that the expert acts on, None for all tokens. `callbacks` are transformers' own.
    """

    base: Base
    task: Task
    digest: str
    encoder: Encoder
    training: Training
    gate_training: GateTraining
    out: Path
    name: str
    callback: TrainingCallback
    acting: ActsOn | None = None
    callbacks: tuple[TrainerCallback, ...] = ()

    @classmethod
    def of(
        cls,
        base: Base | str | Path,
        task: Task | str | Path,
        out: Path,
        training: Training,
        gate_training: GateTraining,
        formatting: Formatting,
        name: str | None,
        callback: TrainingCallback | None = None,
    ) -> TrainingRun:
        """The run with these settings; what would fail after hours is refused now."""
        check_name(name or out.name)
        task = given_task(task)
        if gate_training.embeddings:
            load_embedder(gate_training.embedder)
        reporters(training.report_to, "")
        join_processes()
        base = load_base(base) if isinstance(base, str | Path) else base
        if not isinstance(base, Base):
            raise BaseModelError(
                f"base is a {type(base).__name__}; wanted its name, its folder, or a loaded Base "
                f"(phatgoose.base.load_base)."
            )
        split = task.with_validation(training.seed)
        encoder = Encoder.of(base, as_read(formatting, split.train))
        if gate_training.means:  # read one example as they will be measured
            model, padding = base.model, base.tokenizer.pad_token_id
            pairs = encoder.pairs(split.validation[:1])
            read_pairs(model, find_sites(model), pairs, padding, lambda *_: None)
        return cls(
            base=base,
            task=split,
            digest=task.digest,
            encoder=encoder,
            training=training.on(len(split.train)),
            gate_training=gate_training,
            out=out,
            name=name or out.name,
            callback=callback or TrainingCallback(),
        )

    @property
    def work(self) -> Path:
        return work_of(self.out)

    def identity(self, *shape: Peft, **more: str) -> dict[str, Any]:
        settings = (*shape, self.training, self.gate_training, self.encoder.formatting)
        return {
            "base": self.base.fingerprint,
            "dtype": number_format(self.base.model),
            **more,
            "task": self.digest,
            "settings": [
                {name: value for name, value in asdict(each).items() if name not in FREE}
                for each in settings
            ],
        }


def check_acting(base: Base, acting: ActsOn | None) -> None:
    """Raise ConfigError where no expert on `base` can act from a prompt's end on."""
    if acting is not None and base.is_encoder_decoder:
        raise ConfigError(
            f"{base.id!r} is an encoder-decoder, whose prompts have a stack of their own; experts "
            f"that act from a prompt's end on need a decoder-only base."
        )


def acting_for(base: Base, encoder: Encoder, acts_on: str) -> ActsOn | None:
    """What the setting `acts_on` means on `base`; None for all tokens. Raises ConfigError."""
    if acts_on == "all":
        return None
    if acts_on == "generation-prompt":
        found = ActsOn(invocation=tuple(encoder.generation_prompt()))
    else:
        found = ActsOn(tail=1 if acts_on == "answer" else int(acts_on))
    check_acting(base, found)
    return found


def _trained_adapter(run: TrainingRun, peft: Peft) -> Path:
    task, training, work, joint = run.task, run.training, run.work, run.gate_training.joint
    finished = work / "adapter"
    if finished.is_dir():
        run.callback.on_steps(training.steps)
        return finished
    validated = draw(task.validation, training.eval_examples, training.seed)
    train, validation = map(run.encoder.pairs, (task.train, validated))
    cuts = run.encoder.cuts(train)
    if is_first():
        cuts.report(task.name)
    torch.manual_seed(training.seed)
    with fresh_expert(run.base, peft, joint=joint) as fresh:
        report = fit(
            fresh.model,
            run.base,
            train=train,
            validation=validation,
            training=training,
            steps=training.steps,
            learning_rate=training.learning_rate,
            checkpoint_every=min(training.eval_every, training.steps),
            work=work / "expert",
            label=f"{task.name}: expert",
            callback=run.callback,
            acting=run.acting,
            callbacks=run.callbacks,
        )
        gates = take_gates(fresh.parts) if joint else None
        if is_first():
            if gates is not None:
                save_file(gates, work / JOINT_GATES)
            unfinished = work / "adapter.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fresh.save(unfinished)
            invocation = run.acting.invocation if run.acting else None
            if invocation and kind_for(peft).holds_invocation:
                record_invocation(unfinished, invocation)
            metrics = {f"expert_{key}": value for key, value in asdict(report).items()}
            (work / REPORT).write_text(json.dumps(metrics | cuts.record()), encoding="utf-8")
            os.rename(unfinished, finished)
            shutil.rmtree(work / "expert")
        wait_for_all()
    return finished


@dataclass(frozen=True)
class Record:
    """What an expert records: all its hyper-parameters, and the metrics so far.

    `gates` are those trained jointly with the expert; None means that they are still to be trained.
    `cuts_told` means that the user knows how many of the task's inputs were cut.
    """

    hyperparameters: Mapping[str, object]
    metrics: Mapping[str, object]
    gates: Mapping[str, Tensor] | None = None
    cuts_told: bool = False


def _with_gates_and_statistics(run: TrainingRun, adapter: Path, record: Record) -> Expert:
    modules, settings, task = read_modules(adapter), run.gate_training, run.task
    metrics, gates = dict(record.metrics), record.gates
    if gates is None:
        gates, found = _trained_gates(run, modules, tell_cuts=not record.cuts_told)
        metrics = {key: value for key, value in metrics.items() if key not in CUTS} | found
    if not is_first():
        wait_for_all()
        return Expert.load(run.out)
    measured = statistics_of(
        run.base,
        modules,
        task,
        run.encoder,
        settings,
        run.training.seed,
        shows_bars=run.callback.shows_bar,
        acting=run.acting,
    )
    expert = Expert.from_peft(
        adapter,
        gates,
        base=run.base.reference,
        name=run.name,
        means=measured.means,
        readings=measured.readings,
        embeddings=measured.embeddings,
        embedder=settings.embedder if settings.embeddings else None,
        embedding_form=settings.embedding_form if settings.embeddings else None,
        measured_in=measured.measured_in,
        task={
            "name": task.name,
            "source": task.source,
            "train_examples": len(task.train),
            "validation_examples": len(task.validation),
            "validation_origin": task.validation_origin,
        },
        hyperparameters=dict(record.hyperparameters),
        metrics=metrics,
        acts_on=run.acting,
    )
    saved = expert.save(run.out)
    wait_for_all()
    return saved


def _trained_gates(
    run: TrainingRun, modules: Mapping[str, Any], *, tell_cuts: bool
) -> tuple[Mapping[str, Tensor], dict[str, object]]:
    """Gates trained for the frozen `modules`, and their metrics (paper section 3)."""
    base, settings = run.base, run.gate_training
    pairs = run.encoder.pairs(run.task.train)
    cuts = run.encoder.cuts(pairs)
    if is_first() and tell_cuts:
        cuts.report(run.task.name)
    with applied(base.model, modules, GatedLinear) as layers:
        base.model.requires_grad_(False)
        for layer in layers.values():
            layer.gate.requires_grad_(True)
        report = fit(
            base.model,
            base,
            train=pairs,
            validation=(),  # the paper selects no gate checkpoint: the last step's gates are kept
            training=run.training,
            steps=settings.gate_steps,
            learning_rate=settings.gate_learning_rate or GATE_RATE,
            checkpoint_every=min(GATE_CHECKPOINT_EVERY, settings.gate_steps),
            work=run.work / "gates",
            label=f"{run.task.name}: gates",
            callback=run.callback,
            acting=run.acting,
            callbacks=run.callbacks,
        )
        gates = {site: layer.vector() for site, layer in layers.items()}
    known = {f"gate_{key}": value for key, value in asdict(report).items() if value is not None}
    return gates, cuts.record() | known


def _gate_settings(training: Training, gates: GateTraining) -> dict[str, object]:
    shared = {f"gate_{name}": getattr(training, name) for name in SHARED}
    rate = gates.gate_learning_rate or GATE_RATE
    return {"seed": training.seed, **asdict(gates), **shared, "gate_learning_rate": rate}


def finished_expert(
    out: Path, base: Base | str | Path, settings: Mapping[str, Any], *, resume: bool
) -> Expert | None:
    """The expert that an earlier run finished at `out`, if any; warns of other settings.

    Raises ExpertError when something is there and not to be resumed, and WrongBaseError when that
    is an expert of another base.
    """
    if not out.exists():
        return None
    if not resume:
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    expert = Expert.load(out)
    check_trained_on(base, expert.info.base, out)
    discard_work(out)  # not before: it may be all that there is
    warn_of_other_settings(str(out), expert.info.hyperparameters, settings)
    return expert


def check_trained_on(base: Base | str | Path, recorded: BaseReference, place: str | Path) -> None:
    """Raise WrongBaseError if the finished expert at `place` is surely not one of `base`."""
    if isinstance(base, Base):
        found = base.reference
    elif recorded_id(base) == recorded.id:
        return
    else:
        found = BaseReference(str(base), fingerprint=fingerprint_here(str(base)))
    if found.fingerprint and recorded.fingerprint and not same_base(found, recorded):
        raise WrongBaseError(
            f"{place} is an expert of {recorded.id!r}, not of {found.id!r}; choose another place."
        )


def settings_of_training(
    peft: Peft, training: Training, gates: GateTraining, formatting: Formatting
) -> dict[str, Any]:
    """All settings by their flat names, as an expert records them; rates are those used."""
    own = asdict(gates) | {"gate_learning_rate": gates.gate_learning_rate or GATE_RATE}
    if gates.joint:  # they have the expert's
        del own["gate_steps"], own["gate_learning_rate"]
    shape = {"peft": kind_for(peft).name, **asdict(peft)}
    return {**shape, **asdict(training), **own, **asdict(formatting)}


def warn_of_other_settings(
    place: str, recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Warn that the finished expert at `place` is kept, if it has other `settings`."""

    def value(name: str, held: Mapping[str, Any]) -> Any:
        follows_expert = name == "gate_learning_rate" and held[name] is None
        return held.get("learning_rate") if follows_expert else held[name]

    ignored = {*FREE}
    if recorded.get("chat") is True:  # rows that are chats need no setting to be read as such
        ignored.add("chat")
    if settings.get("epochs") is not None:  # they decide the steps
        ignored.add("steps")
    names = [name for name in settings if name in recorded and name not in ignored]
    other = [
        f"{name} {shortened(value(name, recorded), 40)}, not {shortened(value(name, settings), 40)}"
        for name in names
        if value(name, recorded) != value(name, settings)
    ]
    if other:
        warnings.warn(
            f"{place} is kept as it is, with other settings: {'; '.join(other)}.", stacklevel=4
        )
