"""Experts: a LoRA trained through PEFT on somebody's task, then its gates and statistics.

Gates follow the expert, or are trained together with it (`GateTraining.joint`).

Precision: the base stays in its own dtype (bfloat16 where that is fast); A and B are trained as
float32 master copies that are cast in the forward pass, so that nothing of the base path is
upcast (PEFT's default casts every activation up; docs/design.md has the speeds). The adapter
is saved in the base's dtype: exactly the numbers that were validated.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from . import processes
from .bases import Base, load_base
from .collating import Collator
from .config import Formatting, GateTraining, Lora, Training
from .encoding import Encoder
from .errors import ExpertError
from .expert import Expert, check_name
from .fitting import FitReport, Watcher, fit
from .gates import Record, add_gates, openness
from .sites import find_sites
from .tasks import Task
from .work import discard_work, open_work

__all__ = ["train_expert"]

ADAPTER = "default"
REPORT = "report.json"
JOINT_GATES = "gates.safetensors"


class _MasterLinear(nn.Linear):
    """A linear layer whose float32 weight is cast to the dtype of its input."""

    def forward(self, u: Tensor) -> Tensor:
        return functional.linear(u, self.weight.to(u.dtype))


class _GatedMasterLinear(_MasterLinear):
    """A LoRA's A whose output passes the module's gate v, zeros at the start (joint training).

    PEFT then computes `W u + scale * B A u * sigmoid(v . u)`, since the sigmoid is one number a
    token: B (A u * sigmoid) is B A u * sigmoid.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.gate = nn.Parameter(torch.zeros(in_features, device=device))

    def forward(self, u: Tensor) -> Tensor:
        return openness(u, self.gate) * super().forward(u)


def train_expert(
    base: Base | str,
    task: Task,
    *,
    out: str | Path,
    lora: Lora | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    name: str | None = None,
    resume: bool = False,
    restart: bool = False,
    watcher: Watcher | None = None,
) -> Expert:
    """A finished expert for `task`, written to `out`: LoRA, gates, statistics (METHOD section 3).

    Gates are trained after the LoRA, or with `gate_training.joint` together with it, for the LoRA's
    steps and at its learning rate (the paper's Appendix A); the adapter is plain LoRA either way.
    `base` is a loaded base or its name; loading it once serves many tasks. Checkpoints are kept in
    `.<out's name>.work` beside `out`. An interrupted run is continued with `resume` (a finished one
    is simply loaded) and thrown away with `restart`; with neither, existing work is an error.
    `watcher` is told of steps and of what is kept. Where `accelerate launch` started several
    processes, all of them call this, share each batch, and the first one writes.
    Raises ExpertError when `out` exists or the name can't be an expert's, ConfigError when resumed
    work had other settings, TaskError when the task can't be used.
    """
    out = Path(out)
    lora, training = lora or Lora(), training or Training()
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
        "settings": [asdict(lora), asdict(training), asdict(gate_training), asdict(formatting)],
    }
    # What can't be trained is refused here, before anything is written.
    task, encoder = task.with_validation(training.seed), Encoder.of(base, formatting)
    find_sites(base.model, lora.sites)
    with open_work(out, identity, resume=resume, restart=restart) as work:
        joint = gate_training.joint
        adapter = _train_lora(
            base, task, encoder, work, lora, training, watcher or Watcher(), joint=joint
        )
        record = Record(
            hyperparameters=asdict(lora),
            metrics=json.loads((work / REPORT).read_text(encoding="utf-8")),
            gates=load_file(work / JOINT_GATES) if joint else None,
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


def _train_lora(
    base: Base,
    task: Task,
    encoder: Encoder,
    work: Path,
    lora: Lora,
    training: Training,
    watcher: Watcher,
    *,
    joint: bool,
) -> Path:
    """The folder of the trained PEFT adapter, made unless an earlier run finished it.

    `joint` trains gates with it and leaves them in `work` beside the report.
    """
    finished = work / "adapter"
    if finished.is_dir():
        watcher.advanced(training.steps)
        return finished
    collator = Collator(base.model, base.tokenizer.pad_token_id)
    pairs = [
        [encoder.pair(example.input, example.target) for example in split]
        for split in (task.train, task.validation[: training.eval_examples])
    ]
    torch.manual_seed(training.seed)
    with _lora_on(base, lora, joint=joint) as model:
        report = fit(
            model,
            train=pairs[0],
            validation=pairs[1],
            collator=collator,
            training=training,
            steps=training.steps,
            learning_rate=training.learning_rate,
            work=work / "lora",
            checkpoint_every=min(training.eval_every, training.steps),
            label=f"{task.name}: expert",
            watcher=watcher,
        )
        gates = _take_gates(base) if joint else None
        if processes.is_first():
            if gates is not None:
                save_file(gates, work / JOINT_GATES)
            _save_adapter(model, base, work, report)
            shutil.rmtree(work / "lora")
            watcher.kept()
        processes.wait_for_all()
    return finished


@contextmanager
def _lora_on(base: Base, lora: Lora, *, joint: bool) -> Iterator[PeftModel]:
    """The base with a fresh LoRA at every site, ready to train, while the context is open.

    `joint` puts a gate beside each A.
    """
    sites = find_sites(base.model, lora.sites)
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        target_modules=list(sites),
        fan_in_fan_out=isinstance(base.model.get_submodule(next(iter(sites))), Conv1D),
        revision=base.revision,
    )
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(base.model, config)
    try:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _use_master_copies(layer, lora.init_std, joint=joint)
        yield model
    finally:
        model.unload()


def _use_master_copies(layer: LoraLayer, init_std: float, *, joint: bool) -> None:
    """Float32 A ~ N(0, init_std^2) and B = 0 that are cast in the forward pass, not the input."""
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        plain = factors[ADAPTER]
        shape, device = (plain.in_features, plain.out_features), plain.weight.device
        master = (
            _GatedMasterLinear(*shape, device)
            if joint and factors is layer.lora_A
            else _MasterLinear(*shape, bias=False, device="meta")
        )
        master.weight = nn.Parameter(plain.weight.detach().float())
        factors[ADAPTER] = master
    nn.init.normal_(layer.lora_A[ADAPTER].weight, std=init_std)
    nn.init.zeros_(layer.lora_B[ADAPTER].weight)


def _take_gates(base: Base) -> dict[str, Tensor]:
    """The jointly trained gates by site, taken out of the model: PEFT would save them with A."""
    gates = {}
    for site, layer in base.model.named_modules():
        if isinstance(layer, LoraLayer):
            gates[site] = layer.lora_A[ADAPTER].gate.detach().cpu()
            del layer.lora_A[ADAPTER].gate
    return gates


def _save_adapter(model: PeftModel, base: Base, work: Path, report: FitReport) -> None:
    """The adapter in the base's dtype and the report, complete or not at all."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(base.model.dtype)
    model.peft_config[ADAPTER].base_model_name_or_path = base.id
    unfinished = work / "adapter.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, save_embedding_layers=False)
    (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's card; the expert has its own
    metrics = {f"expert_{key}": value for key, value in asdict(report).items()}
    (work / REPORT).write_text(json.dumps(metrics), encoding="utf-8")
    os.rename(unfinished, work / "adapter")
