"""Training an expert: an adapter on a task, then its gates, then statistics (paper section 3).

Each stage leaves its result in the work folder, where an interrupted run resumes. The expert's
directory is written last, whole or not at all. Of the statistics, mean activations are for Average
Activation, embeddings of training inputs for Retrieval, prompt statistics for router
discriminant, which isn't the paper's.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..base.identity import Base, check_base, number_format, recorded_id
from ..base.loading import fingerprint_here, load_base
from ..config import Formatting, GateTraining, Lora, Peft, Training
from ..errors import ConfigError, ExpertError, TaskError, WrongBaseError
from ..experts import kind_for
from ..experts.alone import FreshExpert, applied
from ..experts.expert import (
    LAYOUT,
    MOST_EMBEDDINGS,
    Expert,
    adapter_files,
    expert_files,
    read_modules,
    recorded_formatting,
)
from ..experts.module import Modules, check_fit
from ..files import sha256_of, write_text, writing
from ..names import check_name
from ..reader import open_reader
from ..sites import Site, Sites, Tensors, find_sites
from ..tasks.batching import Collator, messages_by, read_pairs
from ..tasks.embeddings import PAPER_TEXT, embed_texts, load_embedder, paper_texts
from ..tasks.encoding import CUTS, Cuts, Encoder, TokenPair, as_read
from ..tasks.loading import load_task
from ..tasks.task import Example, Task, draw, request_in
from .trainer import Hyperparameters, Record, Run, fit, work_of

IDENTITY = "run.json"
LOCK = "lock"
REPORT = "report.json"  # in the work's adapter, beside its files
JOINT_GATES = "gates.safetensors"  # there too
WRITTEN = 32, 120  # prompts that an expert writes itself, and tokens of each
# Settings that unfinished work may differ in: statistics are measured at the end.
FREE = {
    "statistics_examples",
    "means",
    "readings",
    "reader",
    "embeddings",
    "embedder",
    "embedding_form",
}


class Options(TypedDict, total=False):
    """What `train_expert` and `train_gates` take by keyword, beside where the expert goes."""

    peft: Peft | None
    training: Training | None
    gate_training: GateTraining | None
    formatting: Formatting | None
    name: str | None
    resume: bool
    callbacks: Iterable[TrainerCallback]


def train_expert(
    base: Base | str | Path, task: Task | str | Path, *, out: str | Path, **options: Unpack[Options]
) -> Expert:
    """A finished expert for `task`, written to `out`, with gates and statistics (paper section 3).

    Checkpoints are kept in `.<out's name>.work` beside `out`.

    Args:
        base: A loaded base, which serves many tasks, or its name.
        task: A task, a file, or `hub:DATASET`.
        out: The folder to write.
        options: All of them may be left out.

            - `peft`: The kind and shape of the adapter: `Lora()`, `Dora`, `IA3` or `Bottleneck`.
            - `training`: Steps, rate and so on; `Training()`. With its `acts_on` the expert acts
              from its prompts' end on; so do its gates, and its means are measured there.
            - `gate_training`: Gates are trained after the adapter, or if it is `joint` together
              with it, for its steps and at its learning rate (paper Appendix A); the files are the
              same either way. `GateTraining()`.
            - `formatting`: How inputs are cut and wrapped; `Formatting()`.
            - `name`: The expert's name, instead of that of `out`.
            - `resume`: Continue an interrupted run, or load a finished expert, with a warning if
              that has other settings. Its data aren't compared with `task`. Without this, what an
              earlier run left is an error.
            - `callbacks`: transformers' TrainerCallbacks, for the training of the expert and of its
              gates.

    Raises:
        ExpertError: `out` exists, work to be resumed had other settings, the name can't be an
            expert's, or training diverges.
        ConfigError: Settings don't fit the base, or the embedder can't be used.
        WrongBaseError: The finished expert to be resumed is of another base.
        TaskError: The task can't be used.
    """
    return _trained(base, options.get("peft") or Lora(), task, Path(out), options)


def train_gates(
    base: Base | str | Path,
    adapter: str | Path,
    task: Task | str | Path,
    *,
    out: str | Path,
    **options: Unpack[Options],
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
        options: As in `train_expert`, but for `peft`. `gate_training` has steps, learning rate and
            statistics, `training` all that it doesn't say.

    Raises:
        ExpertError: The adapter can't be used or doesn't fit the base, `out` exists, work to be
            resumed had other settings, or training diverges.
        WrongBaseError: The adapter records another base, or the finished expert does.
        ConfigError: Settings don't fit the base, or the embedder can't be used.
        TaskError: The task can't be used.
    """
    gates = replace(options.get("gate_training") or GateTraining(), joint=False)
    return _trained(base, Path(adapter), task, Path(out), {**options, "gate_training": gates})


def _trained(
    base: Base | str | Path,
    adapter: Path | Peft,
    task: Task | str | Path,
    out: Path,
    options: Options,
) -> Expert:
    """The expert at `out`, made of the adapter in a folder, or of a new one of this shape."""
    settings = Hyperparameters(
        adapter if isinstance(adapter, Peft) else None,
        options.get("training") or Training(),
        options.get("gate_training") or GateTraining(),
        options.get("formatting") or Formatting(),
    )
    resume = options.get("resume", False)
    if out.exists():
        return finished_expert(out, base, settings, resume=resume)
    name = options.get("name") or out.name
    check_name(name)
    task = task if isinstance(task, Task) else load_task(task)
    task = task.with_validation(settings.training.seed)
    if settings.gate_training.embeddings:
        load_embedder(settings.gate_training.embedder)  # what would fail after hours fails now
    if settings.gate_training.readings:
        open_reader(settings.gate_training.reader)
    base = load_base(base) if isinstance(base, str | Path) else base
    encoder = Encoder.of(base, as_read(settings.formatting, task.train))
    settings = replace(settings, formatting=encoder.formatting)
    tail = settings.training.tail if isinstance(adapter, Peft) else None
    callbacks = tuple(options.get("callbacks", ()))
    run = Run(base, task, encoder, settings, out, name, tail, callbacks)
    earlier: Record = {}
    metrics: Record = {}
    weights = gates = None
    if isinstance(adapter, Peft):
        placed_sites(run.base.model, adapter)  # refuses bad settings before it is written
    else:
        modules = read_modules(adapter)
        if (adapter / LAYOUT.info).is_file():
            expert = Expert.load(adapter)
            check_base(expert.info.base, run.base.reference, f"expert {expert.name!r}")
            earlier |= expert.info.hyperparameters
            metrics |= expert.info.metrics
            run = replace(run, tail=expert.info.tail)
        check_fit(adapter.name, modules, find_sites(run.base.model))
        weights = sha256_of(adapter / adapter_files(adapter).weights)
    record = settings.record()
    identity: Record = {  # what a run must share to resume another's work
        "base": run.base.fingerprint,
        "dtype": number_format(run.base.model),
        "adapter": weights,
        "task": run.task.digest,
        "settings": {name: record[name] for name in record if name not in FREE},
    }
    with open_work(out, identity, resume=resume):
        if isinstance(adapter, Peft):
            adapter = _trained_adapter(run, adapter)
            metrics = json.loads((adapter / REPORT).read_text(encoding="utf-8"))
            gates = load_file(adapter / JOINT_GATES) if settings.gate_training.joint else None
        return _finished(run, adapter, earlier, metrics, gates)


@contextmanager
def open_work(out: Path, identity: Record, *, resume: bool) -> Iterator[Path]:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    Its name starts with a dot, so that nothing takes it for a finished result. It is locked while
    the context is open, or until the process is killed. When the context ends and `out` is there,
    the work is removed. Raises ExpertError when there is unfinished work and `resume` isn't set or
    it has another identity, another process holds the lock, or the folder can't be written.
    """
    work = work_of(out)
    text = json.dumps(identity, indent=2)
    file = work / IDENTITY
    with writing(out, ExpertError):
        if work.is_symlink() or any(path.is_symlink() for path in work.rglob("*")):
            raise ExpertError(f"{work} is or holds a symbolic link, as no work of ours; remove it.")
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / LOCK).acquire(timeout=0):  # else another process is at work
            if not file.is_file():  # written first of all
                write_text(file, text, ExpertError)
            elif not resume or file.read_text(encoding="utf-8") != text:
                raise ExpertError(
                    f"Unfinished work was found in {work}; use resume to continue it, with the "
                    f"same settings, data and base, or remove it."
                )
            yield work
        if out.exists():  # the lock is free: some file systems remove no open file
            shutil.rmtree(work, ignore_errors=True)


def _encoded(run: Run, *, tells: bool) -> tuple[list[TokenPair], dict[str, int]]:
    """The training examples, and the record of how many were cut."""
    pairs = run.encoder.pairs(run.task.train)
    cuts = run.encoder.cuts(pairs)
    if tells:
        cuts.report(run.task.name)
    return pairs, cuts.record()


def _trained_adapter(run: Run, peft: Peft) -> Path:
    """The folder of the trained adapter's files, its metrics and its joint gates."""
    training = run.settings.training
    joint = run.settings.gate_training.joint
    finished = run.work / "adapter"
    unfinished = run.work / "adapter.unfinished"
    if finished.is_dir():
        return finished
    pairs, cuts = _encoded(run, tells=True)
    validation = draw(run.task.validation, training.eval_examples, training.seed)
    torch.manual_seed(training.seed)
    with fresh_expert(run.base, peft, joint=joint) as fresh:
        metrics = fit(run, fresh.model, "expert", pairs, run.encoder.pairs(validation))
        gates = {s: part.gate.detach().cpu() for s, part in fresh.parts.items() if joint}  # type: ignore[operator]
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        fresh.save(unfinished)
    if joint:
        save_file(gates, unfinished / JOINT_GATES)
    (unfinished / REPORT).write_text(json.dumps(metrics | cuts), encoding="utf-8")
    os.rename(unfinished, finished)
    shutil.rmtree(run.work / "expert")
    return finished


def _finished(
    run: Run,
    adapter: Path,
    earlier: Record,
    metrics: Record,
    gates: Tensors | None,
) -> Expert:
    """The expert with its statistics, and with gates unless it has joint ones.

    `earlier` are the hyper-parameters of an adapter that was given, `metrics` those so far.
    """
    task = run.task
    if gates is None:
        gates, updates = _trained_gates(run, read_modules(adapter))
        metrics = {name: metrics[name] for name in metrics if name not in CUTS} | updates
    expert = Expert.from_peft(
        adapter,
        gates,
        base=run.base.reference,
        name=run.name,
        task={
            "name": task.name,
            "source": task.source,
            "train_examples": len(task.train),
            "validation_examples": len(task.validation),
            "validation_origin": task.validation_origin,
        },
        hyperparameters={**earlier, **run.settings.record()},
        metrics=metrics,
        acts_on={"tail": run.tail} if run.tail else None,
    )
    gate_training = run.settings.gate_training
    expert = _with_texts_read(expert, task, gate_training, run.settings.training.seed)
    if gate_training.means:
        expert, _ = _with_means(run, expert)
    return expert.save(run.out)


def _trained_gates(run: Run, modules: Modules) -> tuple[Tensors, Record]:
    """Gates trained for the frozen `modules`, and their metrics (paper section 3)."""
    model = run.base.model
    pairs, cuts = _encoded(run, tells=run.settings.peft is None)
    with applied(model, modules, gated=True) as layers:
        model.requires_grad_(False)
        for layer in layers.values():
            layer.gate.requires_grad_(True)
        # The paper selects no checkpoint: the last step's gates are kept.
        metrics = fit(run, model, "gates", pairs)
        gates = {site: layer.gate.detach().cpu() for site, layer in layers.items()}
    return gates, cuts | metrics


# Statistics for other routers, measured when an expert is trained, or later (paper section 4.2).


def measure(
    expert: Expert | str | Path, base: Base | None, task: Task, settings: GateTraining
) -> Expert:
    """The expert with the statistics of `settings` measured on `task`, its directory rewritten.

    `task` should be the data that the expert was trained on. A random sample of its training split
    is measured: at most `statistics_examples`, for embeddings at most 1000. Its seed and formatting
    are those that the expert records of its training, which gives the same numbers as then. What
    isn't asked for stays as it is, as do adapter and gates; the model card is written again. Means
    alone need the `base`, and targets: without either (None; `load_prompts`) they stay.

    Raises ConfigError when embedding or reading isn't possible, WrongBaseError when `base` isn't
    the expert's, ExpertError when the directory holds foreign files, which rewriting would lose,
    TaskError when the task can't be used.
    """
    expert = expert if isinstance(expert, Expert) else Expert.load(expert)
    foreign = {path.name for path in expert.directory.iterdir()} - set(expert_files())
    if foreign:
        raise ExpertError(
            f"{expert.directory} also holds {', '.join(sorted(foreign))}, which rewriting the "
            f"expert would lose; move that away first."
        )
    seed = expert.seed
    place = expert.directory.resolve()
    has_targets = any(example.target for example in task.train)
    if has_targets or not task.train:
        task = task.with_validation(seed)
    if base is not None:
        check_base(expert.info.base, base.reference, f"expert {expert.name!r}")
    measured = _with_texts_read(expert, task, settings, seed)
    if base is not None and settings.means and has_targets:
        recorded = expert.info.hyperparameters
        formatting = recorded_formatting(recorded, f"Expert {expert.name!r}, hyperparameters")
        encoder = Encoder.of(base, formatting)
        hyperparameters = Hyperparameters(None, Training(seed=seed), settings)
        run = Run(base, task, encoder, hyperparameters, place, expert.name, expert.info.tail)
        measured, cuts = _with_means(run, measured)
        cuts.report(task.name)
    return measured.save(place, overwrite=True)


def written_prompts(expert: Expert, base: Base) -> Task:
    """The task without targets of the prompts that `expert` writes itself: up to 32, for `measure`.

    It writes them at full strength where the base's chat template has the user's message, by the
    seed that it records. Only an expert trained on whole chats writes prompts there; others write
    answers. They may be its training data word for word: don't store them.

    Raises WrongBaseError when `base` isn't the expert's, BaseModelError when that has no chat
    template, ExpertError when the expert doesn't fit, TaskError when it writes nothing.
    """
    check_base(expert.info.base, base.reference, f"expert {expert.name!r}")
    with applied(base.model, expert.modules):
        texts = messages_by(base.model, Encoder.of(base), *WRITTEN, expert.seed)
    if not any(texts):
        raise TaskError(f"Expert {expert.name!r} writes no prompts; give some.")
    return Task("prompts", tuple(Example(text, "") for text in texts if text))


def _with_texts_read(expert: Expert, task: Task, settings: GateTraining, seed: int) -> Expert:
    """The expert with those statistics that `settings` ask for and texts are enough for."""
    examples = draw(task.train, settings.statistics_examples, seed)
    prompts = [request_in(example.input) for example in examples]
    if settings.embeddings:
        texts = prompts
        if settings.embedding_form == PAPER_TEXT:
            texts = paper_texts(examples)
        sample = draw(tuple(texts), MOST_EMBEDDINGS, seed)
        how = {"embedder": settings.embedder, "embedding_form": settings.embedding_form}
        embeddings = embed_texts(sample, settings.embedder)
        expert = expert.with_statistics(how, embeddings=embeddings, **how)
    if settings.readings:
        expert = expert.with_prompts_read(open_reader(settings.reader), prompts)
    return expert.with_statistics({"statistics_examples": settings.statistics_examples})


def _with_means(run: Run, expert: Expert) -> tuple[Expert, Cuts]:
    """The expert with mean activations, measured with it at full strength, as it is routed to.

    Of an expert that acts on prompts' ends they are those of the tokens that it acts on. Raises
    ExpertError when the expert doesn't fit the base.
    """
    settings = run.settings.gate_training
    model = run.base.model
    modules = expert.modules
    examples = draw(run.task.train, settings.statistics_examples, run.settings.training.seed)
    pairs = run.encoder.pairs(examples)
    sites = {name: site for name, site in find_sites(model).items() if name in modules}
    collator = Collator(model, run.base.tokenizer.pad_token_id, tail=run.tail)
    with applied(model, modules):
        means = mean_activations(model, sites, pairs, collator, run.task.name)
    result = expert.with_statistics(means=means, measured_in=number_format(model))
    return result, run.encoder.cuts(pairs)


def mean_activations(
    model: PreTrainedModel,
    sites: Sites,
    pairs: Sequence[TokenPair],
    collator: Collator,
    label: str | None = None,
) -> Tensors:
    """The mean input of each site over all real tokens of `pairs`, float32 [n] by site name.

    Prompt and right target pass in one go (paper section 4.2, Average Activation; the released code
    keeps the decoder's last step only). Zero at a site that no token reached.
    """
    totals = {}
    for name, site in sites.items():
        totals[name] = torch.zeros(site.in_features, dtype=torch.float64)
    counts = Counter[str]()

    def add(site: Site, u: Tensor) -> None:
        totals[site.name] += u.double().sum(dim=0).cpu()
        counts[site.name] += len(u)

    read_pairs(model, sites.values(), pairs, collator, add, label)
    return {name: (total / max(counts[name], 1)).float() for name, total in totals.items()}


# Finished experts.


def finished_expert(
    out: Path, base: Base | str | Path, settings: Hyperparameters, *, resume: bool
) -> Expert:
    """The expert that an earlier run finished at `out`; warns of other settings.

    Raises ExpertError when what is there isn't to be resumed, and WrongBaseError when that is
    surely an expert of another base.
    """
    if not resume:
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    expert = Expert.load(out)
    info = expert.info
    recorded_mark = fingerprint = info.base.fingerprint
    if isinstance(base, Base):
        fingerprint = base.fingerprint
    elif recorded_id(base) != info.base.id:
        fingerprint = fingerprint_here(str(base))
    is_other = fingerprint != recorded_mark
    if fingerprint and recorded_mark and is_other:
        raise WrongBaseError(f"{out} is an expert of {info.base.id!r}; choose another place.")
    others = []
    for name, value in settings.record().items():
        # Rows that are chats need no setting to be read as such.
        is_free = name in FREE or name == "chat"
        if not is_free and info.hyperparameters.get(name, value) != value:
            others.append(name)
    if others:
        other = ", ".join(others)
        warnings.warn(f"{out} is kept as it is, with another {other}.", stacklevel=3)
    shutil.rmtree(work_of(out), ignore_errors=True)  # not before: it may be all that there is
    return expert


# What is trained on a base: an expert's new modules, and gates, one vector per module. A gate sees
# the input u whatever kind of module the expert has at its site, so that gates can be compared.


def placed_sites(model: PreTrainedModel, peft: Peft) -> Sites:
    """The sites of `model` at which a new expert with these settings acts, by name.

    Raises ConfigError when there are none, or none are known for such a model and `sites` is None,
    or when such an expert can't be trained on the model's quantised weights.
    """
    kind = kind_for(peft)
    if getattr(model, "is_quantized", False) and not kind.new_modules.on_packed:
        raise ConfigError(
            f"{kind.label} is trained on the base's own weights, not on quantised ones: leave out "
            f"--dtype 4bit, or train a lora."
        )
    return find_sites(model, peft.sites or kind.new_modules.default_sites(model, peft))


def fresh_expert(base: Base, peft: Peft, *, joint: bool) -> AbstractContextManager[FreshExpert]:
    """`base` with a new expert on it while the context is open; `joint`: behind gates."""
    return kind_for(peft).new_modules.create(
        base, peft, placed_sites(base.model, peft), joint=joint
    )
