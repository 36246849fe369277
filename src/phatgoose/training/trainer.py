"""Training a few tensors of a model with transformers' Trainer, resumable at any moment.

The loss is the mean negative log-likelihood of the target tokens of a whole optimiser batch. (The
released code averages per micro-batch first, which weighs tokens by the batch that they happen to
fall in.) Logits are computed at target positions only.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..base.identity import Base
from ..config import Formatting, GateTraining, Lora, Peft, Training
from ..errors import ConfigError, ExpertError, TrainingError
from ..experts import kind_for
from ..files import first_line, one_line
from ..tasks.batching import IGNORED, Collator, contiguous_head, target_logits
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.task import Task

TRAINABLE = "trainable.safetensors"
COMPLETE = "complete"  # written last: a checkpoint without it was cut short
GATE_CHECKPOINT_EVERY = 25
WARMUP = 0.06  # share of the steps in which the rate rises (paper section 4.1)
logger = logging.getLogger(__name__)

Record = dict[str, object]  # as JSON has it


@dataclass(frozen=True)
class Hyperparameters:
    """All settings of a training; `peft` None if the adapter is there already."""

    peft: Peft | None = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    gate_training: GateTraining = field(default_factory=GateTraining)
    formatting: Formatting = field(default_factory=Formatting)

    @property
    def gate_steps(self) -> int:
        """The steps of the gates' own training, 0 for joint gates."""
        return 0 if self.gate_training.joint else self.gate_training.gate_steps

    def record(self) -> Record:
        """All of them by their flat names, as an expert records them; rates are those used."""
        gates = asdict(self.gate_training)
        if self.peft is None:
            for name in ("batch_size", "micro_batch_size"):
                gates[f"gate_{name}"] = getattr(self.training, name)
            return {"seed": self.training.seed, **gates, **asdict(self.formatting)}
        if self.gate_training.joint:  # they have the expert's
            del gates["gate_steps"], gates["gate_learning_rate"]
        shape = {"peft": kind_for(self.peft).name, **asdict(self.peft)}
        return {**shape, **asdict(self.training), **gates, **asdict(self.formatting)}


@dataclass(frozen=True)
class Run:
    """The training of one expert, to be written to `out`; unfinished work lies in `work`.

    `task` has a validation split. `tail` is the number of a prompt's last tokens that the expert
    acts on, None for all tokens. `callbacks` are transformers' own.
    """

    base: Base
    task: Task
    encoder: Encoder
    settings: Hyperparameters
    out: Path
    name: str
    tail: int | None = None
    callbacks: tuple[TrainerCallback, ...] = ()

    def __post_init__(self) -> None:
        if self.tail and self.base.is_encoder_decoder:
            raise ConfigError(
                f"{self.base.id!r} is an encoder-decoder, whose prompts have a stack of their own; "
                f"experts that act from a prompt's end on need a decoder-only base."
            )

    @property
    def work(self) -> Path:
        return work_of(self.out)


def work_of(out: Path) -> Path:
    """The folder of unfinished work on `out`, beside it."""
    return out.parent / f".{out.name}.work"


@dataclass
class Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A bar on a terminal, else log lines; a line for each validation.

    `lengths` are the tokens of each example in the order of training. If it `validates`, the last
    step is a candidate even if it isn't a multiple of the validation interval.
    """

    label: str
    lengths: Sequence[int]
    batch: int
    validates: bool
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.best_global_step:  # transformers forgets its checkpoint if the folder moved
            best = f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(Path(args.output_dir) / best)
        logger.info("%s: step %d of %d", self.label, state.global_step, state.max_steps)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=one_line(self.label),
            unit="step",
            disable=None,
        )

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self._begun
        start = (state.global_step - 1) * self.batch
        self.tokens += sum(self.lengths[start : start + self.batch])
        self._bar.update(1)
        # Logged losses are means since the last log, of which a run that resumes knows nothing.
        control.should_log |= control.should_save
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if self.validates and is_last:
            control.should_evaluate = control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        where = f"{self.label}: step {state.global_step} of {state.max_steps}"
        if "loss" in logs:
            rate = logs.get("learning_rate", 0.0)
            speed = f"{self.tokens_per_second:.0f} tokens/s"
            loss = f"loss {logs['loss']:.3f}, rate {rate:.4g}, {speed}"
            self._bar.set_postfix_str(loss)
            if self._bar.disable:
                logger.info("%s, %s", where, loss)
        if "eval_loss" in logs:
            logger.info("%s, validation loss %.4f", where, logs["eval_loss"])

    def on_train_end(self, *_: object, **__: object) -> None:
        self._bar.close()


def visited(pairs: Sequence[TokenPair], batch: int, steps: int, seed: int) -> list[TokenPair]:
    """All of `pairs` that a run visits, in order, known beforehand for runs that resume."""
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[int] = []
    while len(shuffled) < batch * steps:
        shuffled += torch.randperm(len(pairs), generator=generator).tolist()
    order = []
    for start in range(0, batch * steps, batch):
        chunk = [pairs[index] for index in shuffled[start : start + batch]]
        # Within an optimiser batch the order changes no gradient, and like lengths need less
        # padding.
        order += sorted(chunk, key=lambda pair: pair.length)
    return order


class PartialTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer that saves and restores only the parameters that want gradients.

    Raises TrainingError as soon as a loss is not finite; `label` names the training in messages.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole batch's target tokens

    def __init__(self, *, label: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self._label = label
        self.model_accepts_loss_kwargs = True  # so that the batch's target tokens are counted
        self._loss_shifts_labels = False  # each label is at the position that predicts it

    def training_step(self, *inputs: object, **more: object) -> Tensor:
        loss: Tensor = super().training_step(*inputs, **more)
        self._check_finite("loss", float(loss), self.state.global_step + 1)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *, num_items_in_batch: Tensor | int
    ) -> Tensor:
        """The summed loss over the number of target tokens of the optimiser batch."""
        logits = target_logits(model, inputs)
        labels = inputs["labels"]
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / num_items_in_batch

    def evaluate(self, **_: object) -> dict[str, float]:
        self.model.eval()
        total = tokens = 0.0
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                total += float(self.compute_loss(self.model, inputs, num_items_in_batch=1))
                tokens += float(inputs["labels"].ne(IGNORED).sum())
        self._check_finite("validation loss", total / tokens, self.state.global_step)
        metrics = {"eval_loss": total / tokens}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{one_line(self._label)}: training diverged, the {what} is {value} at step {step} "
                f"of {self.state.max_steps}; lower the learning rate, and remove "
                f"{Path(self.args.output_dir).parent}."
            )

    def _save(self, output_dir: str, **_: object) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._trained()}
        save_file(trained, folder / TRAINABLE)

    def _save_checkpoint(self, model: nn.Module, trial: object = None) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch has no OSError for a full disk
            raise ExpertError(
                f"Checkpoint {folder} can't be written: {first_line(error)}."
            ) from error
        (folder / COMPLETE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(kept[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in self.model.named_parameters() if pair[1].requires_grad)


def newest_checkpoint(work: Path) -> str | None:
    """The last complete checkpoint; those that were cut short are deleted."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            complete[int(folder.name.split("-")[1])] = folder
        else:
            shutil.rmtree(folder)
    return str(complete[max(complete)]) if complete else None


def fit(
    run: Run,
    model: nn.Module,
    stage: str,
    train: Sequence[TokenPair],
    validation: Sequence[TokenPair] = (),
) -> Record:
    """Train the trainable parameters of `model` in place; with validation, end on the best ones.

    `stage` is "expert" or "gates", whose steps and rate are used. Training continues from the
    newest complete checkpoint in the run's work, to the same result. Without `validation` the last
    state stays. Raises TrainingError as soon as a loss is not finite, ExpertError if a checkpoint
    can't be written.

    Returned are the metrics that the expert records: `tokens` counts prompt and target tokens
    without padding; `seconds`, which leaves out validation, and `tokens_per_second` cover this call
    only, not what was done before a resume.
    """
    training = run.settings.training
    work = run.work / stage
    label = f"{run.task.name}: {stage}"
    steps = training.steps
    rate = training.learning_rate
    interval = training.eval_every
    if stage == "gates":
        steps = run.settings.gate_steps
        rate = run.settings.gate_training.gate_learning_rate
        interval = GATE_CHECKPOINT_EVERY
    validates = bool(validation)
    order = visited(train, training.batch_size, steps, training.seed)
    lengths = [pair.length for pair in order]
    progress = Progress(label, lengths, training.batch_size, validates=validates)
    callbacks: list[TrainerCallback] = [*run.callbacks, progress]
    if not validates:  # transformers' own refuse to train without one
        callbacks = [
            callback for callback in callbacks if not isinstance(callback, EarlyStoppingCallback)
        ]
    if getattr(model, "is_quantized", False):  # Trainer takes gates of ours for the base itself
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    padding = run.base.tokenizer.pad_token_id
    trainer = PartialTrainer(
        model=model,
        args=_arguments(training, steps, rate, min(interval, steps), work, validates=validates),
        train_dataset=order,
        eval_dataset=validation or None,
        data_collator=Collator(run.base.model, padding, packs=True, tail=run.tail),
        callbacks=callbacks,
        label=label,
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the same numbers
    try:
        with warnings.catch_warnings(), contiguous_head(model):
            # A remark on resuming with constant settings, which a user can't act on.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            result = trainer.train(resume_from_checkpoint=newest_checkpoint(work))
    finally:
        model.__dict__.pop("_hf_peft_config_loaded", None)
        model.eval()
    state = trainer.state
    logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
    metrics = {
        "steps": state.global_step,
        "train_loss": float([result.training_loss, *logged][-1]),
    }
    if state.best_metric is not None:
        metrics["validation_loss"] = state.best_metric
        metrics["best_step"] = state.best_global_step
    metrics["tokens"] = sum(lengths[: state.global_step * training.batch_size])
    metrics["seconds"] = round(progress.seconds, 1)
    metrics["tokens_per_second"] = round(progress.tokens_per_second, 1)
    return {f"{stage.removesuffix('s')}_{name}": value for name, value in metrics.items()}


def _arguments(
    training: Training, steps: int, rate: float, interval: int, work: Path, *, validates: bool
) -> TrainingArguments:
    batch = training.batch_size
    sizes = range(min(training.micro_batch_size, batch), 0, -1)
    micro = next(size for size in sizes if batch % size == 0)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=2 * micro,
        gradient_accumulation_steps=batch // micro,
        learning_rate=rate,
        warmup_steps=round(WARMUP * steps),
        lr_scheduler_type="constant_with_warmup",
        eval_strategy="steps" if validates else "no",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=2,
        load_best_model_at_end=validates,
        logging_steps=max(1, min(10, steps // 10)),
        seed=training.seed,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process has one GPU; more would cut batches anew
    return arguments
