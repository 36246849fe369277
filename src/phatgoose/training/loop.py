"""The training loop of experts and gates, on the parameters of a model that want gradients.

Hyper-parameters are the paper's (section 4.1); the schedule is constant after the warm-up.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..config import Training
from ..errors import ConfigError
from ..tasks.collating import Collator
from ..tasks.encoding import TokenPair
from ..tasks.target_logits import contiguous_head
from . import processes
from .partial_trainer import PartialTrainer, ValidateLastStep, newest_checkpoint, visiting_order
from .progress import ProgressBar
from .run import TrainingRun

__all__ = ["FitReport", "fit"]


@dataclass(frozen=True)
class FitReport:
    """The result of a training run; `best_step` and `validation_loss` are None without validation.

    `tokens` counts prompt and target tokens without padding, `seconds` leaves out validation; both
    and `tokens_per_second` cover this run only, not what was done before a resume.
    """

    steps: int
    train_loss: float | None
    validation_loss: float | None
    best_step: int | None
    tokens: int
    seconds: float
    tokens_per_second: float


def fit(
    model: nn.Module,
    *,
    run: TrainingRun,
    stage: str,
    train: Sequence[TokenPair],
    validation: Sequence[TokenPair],
    steps: int,
    learning_rate: float,
    checkpoint_every: int,
) -> FitReport:
    """Train the trainable parameters of `model` in place; with validation, end on the best ones.

    This is a `stage` of `run`, "expert" or "gates". Checkpoints go to the work folder's folder of
    that name; training continues from the newest complete one, to the same result. With an empty
    `validation` the last state stays. Several processes (`training.processes`) take turns at the
    micro-batches of each batch, and the first one writes. Raises ExpertError as soon as a loss is
    not finite, or what was trained isn't in the end.
    """
    base, training, work = run.base, run.training, run.work / stage
    order = visiting_order(train, training.batch_size, steps, training.seed)
    lengths = [pair.length for pair in train]
    label = f"{run.task.name}: {stage}"
    bar = ProgressBar(label, lengths, order, training.batch_size, run.callback)
    arguments = _arguments(
        training, steps, learning_rate, work, checkpoint_every, select=bool(validation)
    )
    trainer = PartialTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation or None,
        data_collator=Collator(base.model, base.tokenizer.pad_token_id, packs=True),
        callbacks=[bar, ValidateLastStep()] if validation else [bar],
        label=label,
        order=order,
        callback=run.callback,
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the same numbers
    with warnings.catch_warnings(), contiguous_head(model):
        # A remark on resuming with constant settings, which a user can't act on.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        result = trainer.train(resume_from_checkpoint=newest_checkpoint(work))
    trainer.check_trained()
    model.eval()
    return _report(trainer, result.training_loss, bar, steps)


def _arguments(
    training: Training,
    steps: int,
    learning_rate: float,
    work: Path,
    checkpoint_every: int,
    *,
    select: bool,
) -> TrainingArguments:
    """The Trainer's own settings; `select` validates at every checkpoint and ends on the best."""
    micro = _micro_batch(training)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=2 * micro,
        gradient_accumulation_steps=training.batch_size // (micro * processes.count()),
        learning_rate=learning_rate,
        warmup_steps=round(training.warmup_ratio * steps),
        lr_scheduler_type="constant_with_warmup",
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        eval_strategy="steps" if select else "no",
        eval_steps=checkpoint_every,
        save_strategy="steps",
        save_steps=checkpoint_every,
        save_total_limit=2,
        load_best_model_at_end=select,
        metric_for_best_model="loss" if select else None,
        logging_steps=max(1, min(10, steps // 10)),
        seed=training.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one GPU; more would cut batches anew
    return arguments


def _report(trainer: Trainer, train_loss: float, bar: ProgressBar, steps: int) -> FitReport:
    best = trainer.state.best_metric
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return FitReport(
        steps=steps,
        train_loss=float(logged[-1] if logged else train_loss),
        validation_loss=None if best is None else float(best),
        best_step=trainer.state.best_global_step if best is not None else None,
        tokens=bar.tokens,
        seconds=round(bar.seconds, 1),
        tokens_per_second=round(bar.tokens_per_second, 1),
    )


def _micro_batch(training: Training) -> int:
    """The largest micro-batch up to the wanted one that divides a process's share evenly."""
    share, rest = divmod(training.batch_size, processes.count())
    if rest:
        raise ConfigError(
            f"batch_size is {training.batch_size}, but must be a multiple of the "
            f"{processes.count()} processes, which share each batch."
        )
    most = min(training.micro_batch_size, share)
    return next(size for size in range(most, 0, -1) if share % size == 0)
