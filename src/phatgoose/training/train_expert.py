"""Training an expert: an adapter on a task, then its gates, then statistics (paper section 3).

Each stage leaves its result in the work folder, where an interrupted run resumes. The expert's
directory is written last, whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
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
from ..config import Formatting, GateTraining, Lora, Peft, Training
from ..errors import ConfigError, ExpertError, WrongBaseError
from ..experts.expert import (
    LAYOUT,
    Expert,
    ExpertInfo,
    adapter_files,
    check_name,
    invocation_of,
    read_modules,
)
from ..experts.kind import applied, check_fit
from ..experts.peft_files import record_invocation
from ..experts.registry import kind_for
from ..files import WRITING_ERRORS, reason, sha256_of, shortened, write_text
from ..passes import ActsOn
from ..sites import find_sites
from ..tasks.embeddings import load_embedder
from ..tasks.encoding import CUTS, Encoder, TokenPair, as_read
from ..tasks.loading import load_task
from ..tasks.prompt_passes import read_pairs
from ..tasks.task import Task, draw
from .modules import GatedLinear, fresh_expert, placed_sites
from .statistics import statistics_of
from .trainer import Hyperparameters, Run, fit, is_first, join_processes, wait_for_all, work_of

IDENTITY, LOCK = "run.json", "lock"
REPORT, JOINT_GATES = "report.json", "gates.safetensors"  # in the work's adapter, beside its files
# Settings that unfinished work may differ in: statistics are measured at the end.
FREE = (*("statistics_examples", "means", "readings", "embeddings", "embedder", "embedding_form"),)


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
        callbacks: transformers' TrainerCallbacks, for the training of the expert and of its gates.

    Raises:
        ExpertError: `out` exists, the name can't be an expert's, or training diverges.
        ConfigError: Work to be resumed had other settings.
        WrongBaseError: The finished expert to be resumed is of another base.
        RoutingError: Mean activations are asked for, but the base pads its tokens inside.
        TaskError: The task can't be used.
    """
    out, peft = Path(out), peft or Lora()
    rest = (training or Training(), gate_training or GateTraining(), formatting or Formatting())
    settings = Hyperparameters(peft, *rest)
    if out.exists():
        return finished_expert(out, base, settings, resume=resume)
    run = _begun(base, task, settings, out, name, callbacks)
    placed_sites(run.base.model, peft)  # refuses bad settings before anything is written
    with open_work(out, _identity(run), resume=resume, restart=restart):
        adapter = _trained_adapter(run, peft)
        metrics = json.loads((adapter / REPORT).read_text(encoding="utf-8"))
        gates = load_file(adapter / JOINT_GATES) if settings.gates.joint else None
        return _finished(run, adapter, {}, metrics, gates)


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
    rest = (training or Training(), gate_training or GateTraining(), formatting or Formatting())
    settings = Hyperparameters(None, *rest)
    if settings.gates.joint:
        raise ConfigError(
            "joint is on, but an adapter that exists can't be trained together with its gates; "
            "turn it off here, or train a new expert."
        )
    if out.exists():
        return finished_expert(out, base, settings, resume=resume)
    modules = read_modules(adapter)
    run = _begun(base, task, settings, out, name, callbacks)
    earlier, metrics = dict[str, Any](), dict[str, Any]()
    acting = invocation_of(adapter)
    if (adapter / LAYOUT.info).is_file():
        expert = Expert.load(adapter)
        check_base(expert.info.base, run.base.reference, f"expert {expert.name!r}")
        earlier, metrics = dict(expert.info.hyperparameters), dict(expert.info.metrics)
        acting = expert.acts_on
    run = replace(run, acting=acting)
    check_fit(adapter.name, modules, find_sites(run.base.model))
    weights = sha256_of(adapter / adapter_files(adapter).weights)
    with open_work(out, _identity(run, weights), resume=resume, restart=restart):
        return _finished(run, adapter, earlier, metrics, None)


def _begun(
    base: Base | str | Path,
    task: Task | str | Path,
    settings: Hyperparameters,
    out: Path,
    name: str | None,
    callbacks: Iterable[TrainerCallback],
) -> Run:
    """The run with these settings; what would fail after hours is refused now."""
    check_name(name or out.name)
    task = task if isinstance(task, Task) else load_task(task)
    if settings.gates.embeddings:
        load_embedder(settings.gates.embedder)
    join_processes()
    base = load_base(base) if isinstance(base, str | Path) else base
    task = task.with_validation(settings.training.seed)
    encoder = Encoder.of(base, as_read(settings.formatting, task.train))
    settings = replace(settings, formatting=encoder.formatting)
    acting = None if settings.peft is None else acting_for(encoder, settings.training.acts_on)
    run = Run(base, task, encoder, settings, out, name or out.name, acting, tuple(callbacks))
    if settings.gates.means:  # read one example as they will be measured
        model, padding = base.model, base.tokenizer.pad_token_id
        pairs = encoder.pairs(task.validation[:1])
        read_pairs(model, find_sites(model), pairs, padding, lambda *_: None)
    return run


def _identity(run: Run, weights: str | None = None) -> dict[str, Any]:
    """What a run must share to resume another's work; `weights`: of the adapter that was given."""
    record = run.settings.record()
    return {
        "base": run.base.fingerprint,
        "dtype": number_format(run.base.model),
        "adapter": weights,
        "task": run.task.digest,
        "settings": {name: record[name] for name in record if name not in FREE},
    }


@contextmanager
def open_work(
    out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool
) -> Iterator[Path]:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    Its name starts with a dot, so that nothing takes it for a finished result. It is locked while
    the context is open, or until the process is killed; of several processes of one training the
    first holds the lock. When the context ends and `out` is there, the work is removed. Raises
    ExpertError when `out` is there at first, when there is unfinished work and neither `resume` nor
    `restart` is set, another process holds the lock, or the folder can't be written; ConfigError
    when the work to resume has another identity.
    """
    work = work_of(out)
    if not is_first():
        wait_for_all()
        yield work
        return
    try:
        if work.is_symlink() or any(path.is_symlink() for path in work.rglob("*")):
            raise ExpertError(f"{work} is or holds a symbolic link, as no work of ours; remove it.")
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / LOCK).acquire(timeout=0):
            if out.exists():
                raise ExpertError(f"Another process has made {out} meanwhile.")
            _claim(work, json.dumps(identity, indent=2), resume=resume, restart=restart)
            wait_for_all()
            yield work
        if out.exists():  # the lock is free: some file systems remove no open file
            shutil.rmtree(work, ignore_errors=True)
    except Timeout as problem:
        raise ExpertError(f"Another process is at work on {out}, in {work}.") from problem
    except WRITING_ERRORS as problem:
        raise ExpertError(f"{out} can't be written: {reason(problem)}.") from problem


def _claim(work: Path, identity: str, *, resume: bool, restart: bool) -> None:
    file = work / IDENTITY
    if file.is_file() and not restart:
        if not resume:
            raise ExpertError(
                f"Unfinished work was found in {work}; use resume to continue it or restart to "
                f"throw it away."
            )
        if file.read_text(encoding="utf-8") != identity:
            raise ConfigError(
                f"The unfinished work in {work} had other settings, data or another base; "
                f"repeat them, or use restart to throw it away."
            )
        return
    # First of all: if it is killed here, what is left counts as no work, without an identity.
    file.unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    write_text(file, identity, ExpertError)


def acting_for(encoder: Encoder, acts_on: str) -> ActsOn | None:
    """What the setting `acts_on` means; None for all tokens."""
    if acts_on == "all":
        return None
    if acts_on == "generation-prompt":
        return ActsOn(invocation=tuple(encoder.generation_prompt()))
    return ActsOn(tail=1 if acts_on == "answer" else int(acts_on))


def _encoded(run: Run, *, tells: bool) -> tuple[list[TokenPair], dict[str, int]]:
    """The training examples, and the record of how many were cut."""
    pairs = run.encoder.pairs(run.task.train)
    cuts = run.encoder.cuts(pairs)
    if tells and is_first():
        cuts.report(run.task.name)
    return pairs, cuts.record()


def _trained_adapter(run: Run, peft: Peft) -> Path:
    """The folder of the trained adapter's files, its metrics and its joint gates."""
    training, joint = run.settings.training, run.settings.gates.joint
    finished, unfinished = run.work / "adapter", run.work / "adapter.unfinished"
    if finished.is_dir():
        return finished
    pairs, cuts = _encoded(run, tells=True)
    drawn = draw(run.task.validation, training.eval_examples, training.seed)
    validation = run.encoder.pairs(drawn)
    torch.manual_seed(training.seed)
    with fresh_expert(run.base, peft, joint=joint) as fresh:
        found = fit(run, fresh.model, "expert", pairs, validation)
        gates: dict[str, Tensor] = {}
        for site, module in fresh.parts.items() if joint else ():
            gates[site] = module.gate.detach().cpu()  # type: ignore[operator]
            del module.gate  # PEFT would save it with its layer
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fresh.save(unfinished)
            invocation = run.acting.invocation if run.acting else None
            if invocation and kind_for(peft).holds_invocation:
                record_invocation(unfinished, invocation)
            if joint:
                save_file(gates, unfinished / JOINT_GATES)
            metrics = {f"expert_{name}": value for name, value in found.items()} | cuts
            (unfinished / REPORT).write_text(json.dumps(metrics), encoding="utf-8")
            os.rename(unfinished, finished)
            shutil.rmtree(run.work / "expert")
        wait_for_all()
    return finished


def _finished(
    run: Run,
    adapter: Path,
    earlier: Mapping[str, Any],
    metrics: Mapping[str, Any],
    gates: Mapping[str, Tensor] | None,
) -> Expert:
    """The expert with its statistics, and with gates unless it has joint ones.

    `earlier` are the hyper-parameters of an adapter that was given, `metrics` those so far.
    """
    modules, task = read_modules(adapter), run.task
    if gates is None:
        gates, found = _trained_gates(run, modules)
        metrics = {name: metrics[name] for name in metrics if name not in CUTS} | found
    if not is_first():
        wait_for_all()
        return Expert.load(run.out)
    measured = statistics_of(run, modules)
    embeds = run.settings.gates.embeddings
    expert = Expert.from_peft(
        adapter,
        gates,
        base=run.base.reference,
        name=run.name,
        means=measured.means,
        readings=measured.readings,
        embeddings=measured.embeddings,
        embedder=run.settings.gates.embedder if embeds else None,
        embedding_form=run.settings.gates.embedding_form if embeds else None,
        measured_in=measured.measured_in,
        task={
            "name": task.name,
            "source": task.source,
            "train_examples": len(task.train),
            "validation_examples": len(task.validation),
            "validation_origin": task.validation_origin,
        },
        hyperparameters={**earlier, **run.settings.record()},
        metrics=metrics,
        acts_on=run.acting,
    )
    saved = expert.save(run.out)
    wait_for_all()
    return saved


def _trained_gates(
    run: Run, modules: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Gates trained for the frozen `modules`, and their metrics (paper section 3)."""
    model = run.base.model
    pairs, cuts = _encoded(run, tells=run.settings.peft is None)
    with applied(model, modules, GatedLinear) as layers:
        model.requires_grad_(False)
        for layer in layers.values():
            layer.gate.requires_grad_(True)
        # The paper selects no checkpoint: the last step's gates are kept.
        found = fit(run, model, "gates", pairs)
        gates = {site: layer.gate.detach().cpu() for site, layer in layers.items()}
    return gates, cuts | {f"gate_{name}": value for name, value in found.items()}


def finished_expert(
    out: Path, base: Base | str | Path, settings: Hyperparameters, *, resume: bool
) -> Expert:
    """The expert that an earlier run finished at `out`; warns of other settings.

    Raises ExpertError when what is there isn't to be resumed, and WrongBaseError when that is an
    expert of another base.
    """
    if not resume:
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    expert = Expert.load(out)
    check_finished(expert.info, str(out), base, settings)
    shutil.rmtree(work_of(out), ignore_errors=True)  # not before: it may be all that there is
    return expert


def check_finished(
    info: ExpertInfo, place: str, base: Base | str | Path, settings: Hyperparameters
) -> None:
    """Raise WrongBaseError if the finished expert at `place` is surely not one of `base`.

    Warns that it is kept, if it has other `settings`.
    """
    if isinstance(base, Base):
        known = base.reference
    elif recorded_id(base) == info.base.id:
        known = info.base
    else:
        known = BaseReference(str(base), fingerprint=fingerprint_here(str(base)))
    if known.fingerprint and info.base.fingerprint and not same_base(known, info.base):
        raise WrongBaseError(
            f"{place} is an expert of {info.base.id!r}, not of {known.id!r}; choose another place."
        )
    recorded = info.hyperparameters
    other = [
        f"{name} {shortened(recorded[name], 40)}, not {shortened(value, 40)}"
        for name, value in settings.record().items()
        # Rows that are chats need no setting to be read as such.
        if name in recorded and name not in (*FREE, "chat") and recorded[name] != value
    ]
    if other:
        warnings.warn(
            f"{place} is kept as it is, with other settings: {'; '.join(other)}.", stacklevel=4
        )
