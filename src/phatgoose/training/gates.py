"""Gates: one vector per module, trained for 100 steps after the expert (paper section 3).

Glossary: u input activation of a site [.., n], v the gate [n]. The gate sees u whatever kind of
module the expert has at the site, so that all gates of a site can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.fingerprint import check_base
from ..base.loading import Base
from ..base.sites import find_sites
from ..config import Formatting, GateTraining, Training, given_or_default
from ..errors import ConfigError
from ..experts.adapter import ModifiedLinear, adapter_files, applied, check_fit, read_modules
from ..experts.expert import LAYOUT, Expert
from ..experts.kinds.kind import SiteModule, openness
from ..files.strict import sha256_of
from ..tasks.cuts import CUTS
from ..tasks.encoding import TokenPair
from ..tasks.neutral import moments
from ..tasks.task import Task
from . import processes
from .statistics import statistics_of
from .trainer import FitReport, TrainingRun, finished_expert, fit
from .workdir import open_work

GATE_CHECKPOINT_EVERY = 25
# Settings of `Training` that gates are trained with, too.
SHARED = ("batch_size", "micro_batch_size", "warmup_ratio", "weight_decay", "max_grad_norm")
SMALLEST_DEVIATION = 0.01  # of a site's mean deviation, for features that never change


class GatedLinear(ModifiedLinear):
    """A linear layer with one expert's module behind a gate v, which starts at zeros.

    A LoRA's output is `W u + scale * B A u * sigmoid(v . u)`, without a bias in the sigmoid (paper
    section 3). A module of another kind acts at the strength of the sigmoid (`experts.kinds`).
    """

    def __init__(self, base: nn.Module, module: SiteModule) -> None:
        super().__init__(base, module)
        self.gate = nn.Parameter(torch.zeros(self.in_features, device=self.weight.device))
        self._usual: tuple[Tensor, Tensor] | None = None

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """From now on the gate sees (u - mean) / deviation, [n] each, in place of u."""
        device = self.gate.device
        floor = SMALLEST_DEVIATION * deviation.mean()
        self._usual = mean.to(device), deviation.clamp(min=floor).to(device)

    def strength(self, u: Tensor) -> Tensor:
        """How far the gate is open for u [.., n], [.., 1]."""
        if self._usual is not None:
            mean, deviation = self._usual
            u = ((u.float() - mean) / deviation).to(u.dtype)
        return openness(u, self.gate)

    def vector(self) -> Tensor:
        """The gate v, on the CPU: what vᵀu adds to the sigmoid's argument, but for a constant."""
        gate = self.gate.detach() if self._usual is None else self.gate.detach() / self._usual[1]
        return gate.cpu()


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
) -> Expert:
    """The expert made of an existing adapter and gates trained for it on `task`.

    Everything but the gates is frozen; steps, learning rate and statistics follow `gate_training`,
    the rest `training` (paper section 3). The expert is written to `out`, named `name` or after it.
    `adapter` is a PEFT LoRA or (IA)³ or a bottleneck adapter, or an expert without gates (an
    imported one), whose records are kept: the settings of `training` are not recorded as its own,
    but as the gates' (docs/format.md). `resume` continues an interrupted run (and loads a finished
    expert), `restart` throws its work away. Raises ExpertError when the adapter can't be used or
    doesn't fit the base, `out` exists or training diverges; WrongBaseError when it records another
    base; ConfigError when resumed work had other settings or joint training is asked for;
    RoutingError when means are wanted and the base pads inside; TaskError when the task can't be
    used.
    """
    out, adapter = Path(out), Path(adapter)
    if gate_training is not None and gate_training.joint:
        raise ConfigError(
            "joint is on, but an adapter that exists can't be trained together with its gates; "
            "turn it off here, or train a new expert."
        )
    training = given_or_default(Training, training, "training")
    gate_training = given_or_default(GateTraining, gate_training, "gate_training")
    formatting = given_or_default(Formatting, formatting, "formatting")
    settings = _gate_settings(training, gate_training) | asdict(formatting)
    finished = finished_expert(out, settings, resume=resume)
    if finished is not None:
        return finished
    modules = read_modules(adapter)
    run = TrainingRun.of(
        base,
        task,
        out,
        training=training,
        gate_training=gate_training,
        formatting=formatting,
        name=name,
    )
    record = Record(found=True)
    if (adapter / LAYOUT.info).is_file():
        earlier = Expert.load(adapter)
        check_base(earlier.info.base, run.base.reference, f"expert {earlier.name!r}")
        record = Record(earlier.info.hyperparameters, earlier.info.metrics, found=True)
    check_fit(adapter.name, modules, find_sites(run.base.model))
    identity = run.identity(adapter=sha256_of(adapter / adapter_files(adapter).weights))
    with open_work(out, identity, resume=resume, restart=restart):
        return add_gates(run, adapter, record)


@dataclass(frozen=True)
class Record:
    """What an expert records of its making before its gates.

    `gates` are those trained jointly with the expert; None means that they are still to be trained.
    `found` means that the adapter is of an earlier training, of which `hyperparameters` say all
    that is known. `cuts_told` means that the user knows how many of the task's inputs were cut.
    """

    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    gates: Mapping[str, Tensor] | None = None
    found: bool = False
    cuts_told: bool = False


def add_gates(run: TrainingRun, adapter: Path, record: Record) -> Expert:
    """The stage shared by `train_gates` and `train_expert`: gates, statistics, the directory.

    Training continues from checkpoints in the work folder. Gates in `record` are taken as they
    are. Of several processes the first measures and writes.
    """
    modules = read_modules(adapter)
    metrics, gates = dict(record.metrics), record.gates
    if gates is None:
        pairs = run.encoder.pairs(run.task.train)
        cuts = run.encoder.cuts(pairs)
        if processes.is_first() and not record.cuts_told:
            cuts.report(run.task.name)
        metrics = {key: value for key, value in metrics.items() if key not in CUTS} | cuts.record()
        usual = _usual_inputs(run, modules)
        with applied(run.base.model, modules, GatedLinear) as layers:
            for site, (mean, deviation) in usual.items():
                layers[site].standardise(mean, deviation)
            report = _fit_gates(run, layers, pairs)
            gates = {site: layer.vector() for site, layer in layers.items()}
        known = {key: value for key, value in asdict(report).items() if value is not None}
        metrics |= {f"gate_{key}": value for key, value in known.items()}
    if not processes.is_first():
        processes.wait_for_all()
        return Expert.load(run.out)
    settings, seed = run.gate_training, run.training.seed
    bars = run.callback.shows_bar
    measured = statistics_of(
        run.base, modules, run.task, run.encoder, settings, seed, shows_bars=bars
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
        task=_task_record(run.task),
        hyperparameters=_hyperparameters(run, record),
        metrics=metrics,
    )
    saved = expert.save(run.out)
    processes.wait_for_all()
    return saved


def _usual_inputs(
    run: TrainingRun, modules: Mapping[str, SiteModule]
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """What the sites of `modules` see of neutral text, by which inputs are to be standardised.

    Not in the paper: a gate moves along what is large for every token, which tells no task. Empty
    where gates are trained on raw inputs.
    """
    if run.gate_training.gate_inputs == "raw":
        return {}
    return moments(run.base.model, run.base.tokenizer, modules)


def _fit_gates(
    run: TrainingRun, layers: Mapping[str, GatedLinear], pairs: Sequence[TokenPair]
) -> FitReport:
    run.base.model.requires_grad_(False)
    for layer in layers.values():
        layer.gate.requires_grad_(True)
    steps = run.gate_training.gate_steps
    return fit(
        run.base.model,
        run=run,
        stage="gates",
        train=pairs,
        validation=(),  # the paper selects no gate checkpoint: the last step's gates are kept
        steps=steps,
        learning_rate=_gate_learning_rate(run.training, run.gate_training),
        checkpoint_every=min(GATE_CHECKPOINT_EVERY, steps),
    )


def _hyperparameters(run: TrainingRun, record: Record) -> dict[str, object]:
    """The settings to be recorded; those of an adapter that was found stay what they are."""
    training, gates = asdict(run.training), asdict(run.gate_training)
    if record.found:
        training, gates = {}, _gate_settings(run.training, run.gate_training)
    if run.gate_training.joint:  # gates have the expert's
        del gates["gate_steps"], gates["gate_learning_rate"]
    formatting = asdict(run.encoder.formatting)
    return {**record.hyperparameters, **training, **gates, **formatting}


def _gate_settings(training: Training, gates: GateTraining) -> dict[str, object]:
    """What is recorded of gates' training for an adapter that was there already.

    The seed is the statistics' too, which `measure` draws anew.
    """
    shared = {f"gate_{name}": getattr(training, name) for name in SHARED}
    rate = _gate_learning_rate(training, gates)
    return {"seed": training.seed, **asdict(gates), **shared, "gate_learning_rate": rate}


def _gate_learning_rate(training: Training, gates: GateTraining) -> float:
    """The learning rate of gate training."""
    return gates.gate_learning_rate or training.learning_rate


def _task_record(task: Task) -> dict[str, object]:
    return {
        "name": task.name,
        "source": task.source,
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "validation_origin": task.validation_origin,
    }


# -------------------------------------------------------------------------------------------------
# Joint gates: trained together with the expert (paper Appendix A), for comparison with `gates`.
#
# A joint gate v is part of the new module at its site (`experts.kinds`), which acts at the strength
# sigmoid(v . u), as it does behind a gate trained later.
# -------------------------------------------------------------------------------------------------


def take_gates(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trained gates, by site, of modules that hold one as `gate`; they lose it.

    PEFT would save a gate that stayed in its layer.
    """
    gates = {}
    for site, owner in owners.items():
        gate: Tensor = owner.gate  # type: ignore[assignment]
        gates[site] = gate.detach().cpu()
        del owner.gate
    return gates
