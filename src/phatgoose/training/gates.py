"""Gates: one vector per module, trained for 100 steps after the expert (METHOD section 3.2).

Glossary: u input activation of a site [.., n], v the gate [n]. Whatever kind of module the expert
has at a site, its gate looks at u, so that all gates of a site can be compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.fingerprint import check_base
from ..base.loading import Base, load_base
from ..base.sites import find_sites
from ..config import Formatting, GateTraining, Training
from ..errors import ConfigError, ExpertError
from ..experts.adapter import adapter_files, check_fit, read_modules
from ..experts.applied import ModifiedLinear, put_in
from ..experts.expert import LAYOUT, Expert
from ..experts.expert_info import check_name
from ..experts.kinds.kind import SiteModule
from ..files.regular_file import sha256_of
from ..tasks.collating import Collator
from ..tasks.cuts import CUTS
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.task import Task
from . import processes
from .loop import FitReport, Watcher, fit
from .router_statistics import statistics_of
from .unfinished import discard_work, open_work

__all__ = ["GatedLinear", "Record", "add_gates", "gated", "openness", "train_gates"]

GATE_CHECKPOINT_EVERY = 25


def openness(u: Tensor, v: Tensor) -> Tensor:
    """How far a gate is open for each token, `sigmoid(v . u)`: [.., n] and [n] to [.., 1]."""
    score = u @ v.to(u.dtype)
    return torch.sigmoid(score.float()).to(u.dtype).unsqueeze(-1)


class GatedLinear(ModifiedLinear):
    """A linear layer with one expert's module, all of which passes a gate.

    For a LoRA `W u + scale * B A u * sigmoid(v . u)` with v starting at zeros and no bias (METHOD
    section 3.2; paper section 3.1, equation 2); for other kinds as `kinds.modules` has it, with
    the sigmoid as the strength.
    """

    def __init__(self, base: nn.Module, module: SiteModule) -> None:
        super().__init__(base, module)
        self.gate = nn.Parameter(torch.zeros(self.in_features, device=self.weight.device))

    def strength(self, u: Tensor) -> Tensor:
        """How far the gate is open for u [.., n], [.., 1]."""
        return openness(u, self.gate)


def gated(
    model: PreTrainedModel, modules: Mapping[str, SiteModule]
) -> AbstractContextManager[dict[str, GatedLinear]]:
    """The expert's sites as gated layers inside `model`, by name, while the context is open.

    Raises ExpertError when a site or its shape doesn't fit the model.
    """
    return put_in(model, modules, GatedLinear)


def train_gates(
    base: Base | str,
    adapter: str | Path,
    task: Task,
    *,
    out: str | Path,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    name: str | None = None,
    resume: bool = False,
    restart: bool = False,
) -> Expert:
    """The expert that consists of an existing adapter and gates trained for it on `task`.

    Everything but the gates is frozen; steps, learning rate and statistics follow `gate_training`,
    the rest `training` (METHOD section 3.2). Mean activations and embeddings are measured as asked
    for. The finished expert is written to `out`, named `name` or after it. `adapter` is a PEFT LoRA
    or (IA)³ or a bottleneck adapter, or an expert without gates (an imported one): what that
    records is kept. An interrupted run is continued
    with `resume` (a finished one is simply loaded) and thrown away with `restart`. Raises
    ExpertError when the adapter can't be used or doesn't fit the base, or `out` exists;
    WrongBaseError when it records another base; ConfigError when resumed work had other settings or
    joint training is asked for; TaskError when the task can't be used.
    """
    out, adapter = Path(out), Path(adapter)
    training, gate_training = training or Training(), gate_training or GateTraining()
    formatting = formatting or Formatting()
    if gate_training.joint:
        raise ConfigError(
            "joint is on, but an adapter that exists can't be trained together with its gates; "
            "turn it off here, or train a new expert."
        )
    if out.exists() and resume:
        discard_work(out)
        return Expert.load(out)
    if out.exists():
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    check_name(name or out.name)
    processes.join()
    modules = read_modules(adapter)
    base = load_base(base) if isinstance(base, str) else base
    record = None
    if (adapter / LAYOUT.info).is_file():
        earlier = Expert.load(adapter)
        check_base(earlier.info.base, base.reference, f"expert {earlier.name!r}")
        record = Record(earlier.info.hyperparameters, earlier.info.metrics)
    identity = {
        "base": base.fingerprint,
        "adapter": sha256_of(adapter / adapter_files(adapter).weights),
        "task": task.digest,
        "settings": [asdict(training), asdict(gate_training), asdict(formatting)],
    }
    # What can't be trained is refused here, before anything is written.
    task, encoder = task.with_validation(training.seed), Encoder.of(base, formatting)
    check_fit(adapter.name, modules, find_sites(base.model))
    with open_work(out, identity, resume=resume, restart=restart) as work:
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
        )


@dataclass(frozen=True)
class Record:
    """What is known of an expert's making before its gates.

    `gates` are those trained jointly with the expert; None means that they are still to be trained.
    `told` says that the user knows by now what is cut of the task's inputs.
    """

    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    gates: Mapping[str, Tensor] | None = None
    told: bool = False


def add_gates(
    base: Base,
    adapter: Path,
    task: Task,
    encoder: Encoder,
    *,
    out: Path,
    work: Path,
    training: Training,
    gate_training: GateTraining,
    name: str | None = None,
    record: Record | None = None,
    watcher: Watcher | None = None,
) -> Expert:
    """The stage shared by `train_gates` and `train_expert`: gates, statistics, the directory.

    `task` has its validation split. Checkpoints go to `work`; those found there are continued from;
    it is removed at the end. Gates that `record` brings along are taken as they are. Of several
    processes the first measures and writes.
    """
    record = record or Record()
    modules = read_modules(adapter)
    metrics, gates = dict(record.metrics), record.gates
    if gates is None:
        pairs = [encoder.pair(row.input, row.target, row.passage) for row in task.train]
        cuts = encoder.cuts(pairs)
        if processes.is_first() and not record.told:
            cuts.tell(task.name)
        metrics = {key: value for key, value in metrics.items() if key not in CUTS} | cuts.record()
        with gated(base.model, modules) as layers:
            report = _fit_gates(
                base, layers, pairs, training, gate_training, work, watcher, task.name
            )
            gates = {site: layer.gate.detach().cpu() for site, layer in layers.items()}
        known = {key: value for key, value in asdict(report).items() if value is not None}
        metrics |= {f"gate_{key}": value for key, value in known.items()}
    if not processes.is_first():
        processes.wait_for_all()
        return Expert.load(out)
    measured = statistics_of(base, modules, task, encoder, gate_training, training.seed)
    expert = Expert.from_peft(
        adapter,
        gates,
        base=base.reference,
        name=name or out.name,
        means=measured.means,
        embeddings=measured.embeddings,
        embedder=gate_training.embedder if gate_training.embeddings else None,
        task=_task_record(task),
        hyperparameters={
            **record.hyperparameters,
            **asdict(training),
            **asdict(gate_training),
            **asdict(encoder.formatting),
        },
        metrics=metrics,
    )
    saved = expert.save(out)
    shutil.rmtree(work)
    processes.wait_for_all()
    return saved


def _fit_gates(
    base: Base,
    layers: Mapping[str, GatedLinear],
    pairs: Sequence[TokenPair],
    training: Training,
    gate_training: GateTraining,
    work: Path,
    watcher: Watcher | None,
    label: str,
) -> FitReport:
    base.model.requires_grad_(False)
    for layer in layers.values():
        layer.gate.requires_grad_(True)
    return fit(
        base.model,
        train=pairs,
        validation=(),  # the paper selects no gate checkpoint: the last step's gates are kept
        collator=Collator(base.model, base.tokenizer.pad_token_id, packs=True),
        training=training,
        steps=gate_training.gate_steps,
        learning_rate=gate_training.gate_learning_rate or training.learning_rate,
        work=work / "gates",
        checkpoint_every=min(GATE_CHECKPOINT_EVERY, gate_training.gate_steps),
        label=f"{label}: gates",
        watcher=watcher,
    )


def _task_record(task: Task) -> dict[str, object]:
    return {
        "name": task.name,
        "source": task.source,
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "validation_origin": task.validation_origin,
    }
