"""Gates: one vector per module, trained for 100 steps after the expert (METHOD section 3.2).

Glossary: u input activation of a site [.., n], W its frozen base weight, A and B the expert's LoRA
factors, v the gate [n].
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import (
    ADAPTER_WEIGHTS,
    LoraFactors,
    check_fit,
    read_adapter_config,
    read_lora,
)
from .bases import Base, load_base
from .collating import Collator
from .config import Formatting, GateTraining, Training
from .embeddings import embed_examples
from .encoding import Encoder, TokenPair, batches_of_tokens
from .errors import ExpertError
from .expert import Expert, sha256_of
from .fitting import FitReport, fit
from .sites import Site, WrappedLinear, find_sites, replace_module, watch_inputs
from .tasks import Task
from .work import open_work

__all__ = ["GatedLinear", "Record", "add_gates", "gated", "mean_activations", "train_gates"]

GATE_CHECKPOINT_EVERY = 25
STATISTICS_TOKEN_BUDGET = 4096


class GatedLinear(WrappedLinear):
    """A linear layer with one LoRA expert whose update passes a gate.

    `W u + scale * B A u * sigmoid(v . u)` with v starting at zeros and no bias (METHOD section 3.2;
    paper section 3.1, equation 2). With `use_gate` False the sigmoid is left out: the expert alone.
    """

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, lora: LoraFactors) -> None:
        super().__init__(base, lora.A.shape[1], lora.B.shape[0])
        weight = self.weight
        self.register_buffer("A", lora.A.to(weight), persistent=False)
        self.register_buffer("B", (lora.scale * lora.B.float()).to(weight), persistent=False)
        self.gate = nn.Parameter(torch.zeros(lora.A.shape[1], device=weight.device))
        self.use_gate = True

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]."""
        y: Tensor = self.base(u)
        update = functional.linear(functional.linear(u, self.A), self.B)
        if not self.use_gate:
            return y + update
        score = u @ self.gate.to(u.dtype)
        return y + torch.sigmoid(score.float()).to(u.dtype).unsqueeze(-1) * update


@contextmanager
def gated(
    model: PreTrainedModel, lora: Mapping[str, LoraFactors]
) -> Iterator[dict[str, GatedLinear]]:
    """The expert's sites as gated layers inside `model`, by name, while the context is open.

    Raises ExpertError when a site or its shape doesn't fit the model.
    """
    check_fit("adapter", lora, find_sites(model))
    originals = {name: model.get_submodule(name) for name in lora}
    layers = {name: GatedLinear(originals[name], lora[name]) for name in lora}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield layers
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


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
    """The expert that consists of an existing PEFT LoRA adapter and gates trained for it on `task`.

    Everything but the gates is frozen; steps, learning rate and statistics follow `gate_training`,
    the rest `training` (METHOD section 3.2). Mean activations and embeddings are measured as asked
    for. The finished expert is written to `out`, named `name` or after it. An interrupted run is
    continued with `resume` and thrown away with `restart`. Raises ExpertError when the adapter
    can't be used or doesn't fit the base, or `out` exists; ConfigError when resumed work had other
    settings; TaskError when the task can't be used.
    """
    out, adapter = Path(out), Path(adapter)
    training, gate_training = training or Training(), gate_training or GateTraining()
    formatting = formatting or Formatting()
    if out.exists():
        raise ExpertError(f"{out} exists already; choose another place.")
    read_adapter_config(adapter)
    base = load_base(base) if isinstance(base, str) else base
    identity = {
        "base": base.fingerprint,
        "adapter": sha256_of(adapter / ADAPTER_WEIGHTS),
        "task": task.digest,
        "settings": [asdict(training), asdict(gate_training), asdict(formatting)],
    }
    # What can't be trained is refused here, before anything is written.
    task, encoder = task.with_validation(training.seed), Encoder.of(base, formatting)
    check_fit(adapter.name, read_lora(adapter), find_sites(base.model))
    work = open_work(out, identity, resume=resume, restart=restart)
    expert = add_gates(
        base,
        adapter,
        task,
        encoder,
        out=out,
        work=work,
        training=training,
        gate_training=gate_training,
        name=name,
    )
    shutil.rmtree(work)
    return expert


@dataclass(frozen=True)
class Record:
    """What is known of an expert's making before its gates."""

    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)


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
) -> Expert:
    """The stage shared by `train_gates` and `train_expert`: gates, statistics, the directory.

    `task` has its validation split. Checkpoints go to `work`; those found there are continued from.
    """
    record = record or Record()
    lora = read_lora(adapter)
    train = [encoder.pair(example.input, example.target) for example in task.train]
    collator = Collator(base.model, base.tokenizer.pad_token_id)
    sites = {name: site for name, site in find_sites(base.model).items() if name in lora}
    measured = _sample(range(len(train)), gate_training.statistics_examples, training.seed)
    means = embeddings = None
    with gated(base.model, lora) as layers:
        report = _fit_gates(base, layers, train, collator, training, gate_training, work, task.name)
        gates = {site: layer.gate.detach().cpu() for site, layer in layers.items()}
        if gate_training.means:
            for layer in layers.values():
                layer.use_gate = False
            pairs = [train[i] for i in measured]
            means = mean_activations(base.model, sites, pairs, collator, task.name)
    if gate_training.embeddings:
        embeddings = embed_examples([task.train[i] for i in measured], gate_training.embedder)
    expert = Expert.from_peft(
        adapter,
        gates,
        base=base.reference,
        name=name or out.name,
        means=means,
        embeddings=embeddings,
        embedder=gate_training.embedder if gate_training.embeddings else None,
        task=_task_record(task),
        hyperparameters={
            **record.hyperparameters,
            **asdict(training),
            **asdict(gate_training),
            **asdict(encoder.formatting),
        },
        metrics={
            **record.metrics,
            **{f"gate_{key}": value for key, value in asdict(report).items() if value is not None},
        },
    )
    return expert.save(out)


def _fit_gates(
    base: Base,
    layers: Mapping[str, GatedLinear],
    train: Sequence[TokenPair],
    collator: Collator,
    training: Training,
    gate_training: GateTraining,
    work: Path,
    label: str,
) -> FitReport:
    base.model.requires_grad_(False)
    for layer in layers.values():
        layer.gate.requires_grad_(True)
    return fit(
        base.model,
        train=train,
        validation=(),  # the paper selects no gate checkpoint: the last step's gates are kept
        collator=collator,
        training=training,
        steps=gate_training.gate_steps,
        learning_rate=gate_training.gate_learning_rate or training.learning_rate,
        work=work / "gates",
        checkpoint_every=min(GATE_CHECKPOINT_EVERY, gate_training.gate_steps),
        label=f"{label}: gates",
    )


def _sample(indices: range, count: int, seed: int) -> list[int]:
    """At most `count` of the indices, the same ones for the same seed, in order."""
    return sorted(random.Random(seed).sample(indices, min(count, len(indices))))


def _task_record(task: Task) -> dict[str, object]:
    return {
        "name": task.name,
        "source": task.source,
        "train_examples": len(task.train),
        "validation_examples": len(task.validation),
        "validation_origin": task.validation_origin,
    }


def mean_activations(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    pairs: Sequence[TokenPair],
    collator: Collator,
    label: str = "",
) -> dict[str, Tensor]:
    """The mean input of each site over all real tokens of `pairs`, float32 [n] by site name.

    Teacher forcing: prompt and right target are passed in one go, padding left out (METHOD section
    5, Average Activation; the released code keeps only the last generated step in the decoder).
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(site: Site, u: Tensor, real: Tensor | None) -> None:
        tokens = u.flatten(0, -2) if real is None else u[real]
        totals[site.name] = totals.get(site.name, 0) + tokens.double().sum(dim=0)
        counts[site.name] = counts.get(site.name, 0) + tokens.shape[0]

    lengths = [pair.length for pair in pairs]
    with (
        torch.no_grad(),
        watch_inputs(model, sites, add),
        tqdm(total=len(pairs), desc=f"{label}: means", unit="example", disable=None) as bar,
    ):
        model.eval()
        for batch in batches_of_tokens(lengths, STATISTICS_TOKEN_BUDGET):
            inputs = collator([pairs[i] for i in batch])
            inputs.pop("labels")
            inner = model if model.config.is_encoder_decoder else model.base_model
            inner(**{key: value.to(model.device) for key, value in inputs.items()}, use_cache=False)
            bar.update(len(batch))
    return {site: (totals[site] / counts[site]).float().cpu() for site in sites}
