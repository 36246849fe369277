"""The training loop shared by experts and gates: transformers' Trainer, on what is trainable only.

The loss is the mean negative log-likelihood of the target tokens of a whole optimiser batch
(METHOD section 3; the released code averages per micro-batch first, which weighs tokens by the
batch they happen to fall in). Logits are computed at target positions only.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..config import Training
from ..errors import ConfigError, ExpertError
from ..files.quoting import one_line
from ..tasks.collating import Collator, target_logits
from ..tasks.encoding import IGNORED, TokenPair, contiguous_head
from . import processes

__all__ = ["FitReport", "Watcher", "fit"]

logger = logging.getLogger(__name__)

TRAINABLE = "trainable.safetensors"
COMPLETE = "complete"  # written last: a checkpoint without it was cut short


@dataclass(frozen=True)
class FitReport:
    """What a training run came to. `best_step` and `validation_loss` are None without validation.

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


class Watcher:
    """Is told how a training gets on; this one makes nothing of it."""

    def advanced(self, steps: int) -> None:
        """So many more optimiser steps are done, or were found to be."""

    def kept(self) -> None:
        """A checkpoint or another part of the unfinished work has become complete on the disk."""


def fit(
    model: nn.Module,
    *,
    train: Sequence[TokenPair],
    validation: Sequence[TokenPair],
    collator: Collator,
    training: Training,
    steps: int,
    learning_rate: float,
    work: Path,
    checkpoint_every: int,
    label: str,
    watcher: Watcher | None = None,
) -> FitReport:
    """Train the trainable parameters of `model` in place; with validation, end on the best ones.

    Checkpoints go to `work` every `checkpoint_every` steps; if `work` holds some, the newest
    complete one is continued from, to the same result. With an empty `validation` nothing is
    selected and the last state stays. Several processes (`training.processes`) take turns at the
    micro-batches of each batch, and the first one writes. `watcher` is told of steps and
    checkpoints.
    """
    watcher = watcher or Watcher()
    order = _OrderedSampler(train, training.batch_size, steps, training.seed)
    lengths = [pair.length for pair in train]
    bar = _ProgressBar(label, lengths, order.indices, training.batch_size, watcher)
    arguments = _arguments(
        training, steps, learning_rate, work, checkpoint_every, select=bool(validation)
    )
    trainer = _PartTrainer(
        model=model,
        args=arguments,
        train_dataset=_Pairs(train),
        eval_dataset=_Pairs(validation) if validation else None,
        data_collator=collator,
        callbacks=[bar, _ValidateLastStep()] if validation else [bar],
        order=order,
        watcher=watcher,
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the same numbers
    with warnings.catch_warnings(), contiguous_head(model):
        # The loop's own remark on resuming with constant settings; nothing a user could act on.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        result = trainer.train(resume_from_checkpoint=_newest_checkpoint(work))
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


def _report(trainer: Trainer, train_loss: float, bar: _ProgressBar, steps: int) -> FitReport:
    best = trainer.state.best_metric
    return FitReport(
        steps=steps,
        train_loss=_last_logged(trainer, "loss", train_loss),
        validation_loss=None if best is None else float(best),
        best_step=trainer.state.best_global_step if best is not None else None,
        tokens=bar.tokens,
        seconds=round(bar.seconds, 1),
        tokens_per_second=round(bar.tokens / bar.seconds, 1) if bar.seconds else 0.0,
    )


def _last_logged(trainer: Trainer, key: str, default: float) -> float:
    logged = [entry[key] for entry in trainer.state.log_history if key in entry]
    return float(logged[-1] if logged else default)


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


def _newest_checkpoint(work: Path) -> str | None:
    """The newest complete checkpoint in `work`; those cut short are removed."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            complete[int(folder.name.split("-")[1])] = folder
        elif processes.is_first():
            shutil.rmtree(folder)
    return str(complete[max(complete)]) if complete else None


class _Pairs(Dataset[TokenPair]):
    """A sequence of token pairs as a torch dataset."""

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> TokenPair:
        return self._pairs[index]


class _OrderedSampler(Sampler[int]):
    """Every index a run will visit, known beforehand, so that a resumed run sees the same ones.

    Reshuffled each time the data is through; inside an optimiser batch sorted by length, which
    changes no gradient but saves padding in the micro-batches.
    """

    def __init__(self, pairs: Sequence[TokenPair], batch: int, steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < batch * steps:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        self.indices: list[int] = []
        for start in range(0, batch * steps, batch):
            chunk = order[start : start + batch]
            self.indices += sorted(chunk, key=lambda index: pairs[index].length)

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _PartTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer for models of which a small part is trained: it keeps and restores that part."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole batch's target tokens

    def __init__(self, *, order: _OrderedSampler, watcher: Watcher, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._order, self._watcher = order, watcher
        self.model_accepts_loss_kwargs = True  # so that the batch's target tokens are counted
        self._loss_shifts_labels = False  # the collator's labels stand where they are predicted

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The summed negative log-likelihood over the number of target tokens in the batch.

        That is of all processes; gradients are averaged over these, hence times their number.
        """
        logits, labels = target_logits(model, inputs), inputs["labels"]
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total * processes.count() / count
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all target tokens, whatever the batches."""
        self.model.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for batch in self._share_of(eval_dataset or self.eval_dataset):
                inputs = self._prepare_inputs(batch)
                loss = self.compute_loss(self.model, inputs, num_items_in_batch=processes.count())
                total += float(loss)
                tokens += float(inputs["labels"].ne(IGNORED).sum())
        if processes.count() > 1:
            sums = torch.tensor([total, tokens], dtype=torch.float64, device=self.args.device)
            total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _share_of(self, pairs: Dataset[TokenPair]) -> DataLoader[TokenPair]:
        """Batches of this process's share of `pairs`, none of them twice."""
        share = Subset(pairs, range(processes.rank(), len(pairs), processes.count()))  # type: ignore[arg-type]
        size = self.args.per_device_eval_batch_size
        return DataLoader(share, batch_size=size, collate_fn=self.data_collator)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trainable(self.model), folder / TRAINABLE)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch has no OSError for a full disk
            reason = str(error).splitlines()[0]
            raise ExpertError(f"Checkpoint {folder} can't be written: {reason}") from error
        processes.wait_for_all()  # each has written its random state
        if processes.is_first():
            (folder / COMPLETE).write_text(json.dumps({"step": self.state.global_step}))
            self._watcher.kept()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        kept = load_file(folder / TRAINABLE)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(kept[name])


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class _ValidateLastStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The last step is a candidate too when it is no multiple of the validation interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a validation and a checkpoint at the end."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class _ProgressBar(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """One line on the terminal (steps, loss, tokens per second); a log line per validation."""

    def __init__(
        self, label: str, lengths: list[int], order: list[int], batch: int, watcher: Watcher
    ) -> None:
        self.label, self.tokens, self.seconds = label, 0, 0.0
        self._watcher = watcher
        self._lengths, self._order, self._batch = lengths, order, batch
        self._bar: Any = None
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar where a resumed run stands, which may be in another place than it was."""
        if state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint).name
            state.best_model_checkpoint = str(Path(args.output_dir) / best)
        self._watcher.advanced(state.global_step)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=one_line(self.label),
            unit="step",
            disable=None if processes.is_first() else True,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock of an optimiser step."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step's tokens and time."""
        self.seconds += time.perf_counter() - self._begun
        start = (state.global_step - 1) * self._batch
        self.tokens += sum(self._lengths[i] for i in self._order[start : start + self._batch])
        self._bar.update(1)
        self._watcher.advanced(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show loss and speed beside the bar; log validations."""
        if logs and "loss" in logs:
            rate = self.tokens / self.seconds if self.seconds else 0.0
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")
        if logs and "eval_loss" in logs and processes.is_first():
            logger.info(
                "%s: step %d of %d, validation loss %.4f",
                self.label,
                state.global_step,
                state.max_steps,
                logs["eval_loss"],
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self._bar.close()
