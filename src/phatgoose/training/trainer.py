"""Training a few tensors with transformers' Trainer, resumable at any moment.

transformers' Trainer for a model of which a small part is trained: it saves only that part.

The loss is the mean negative log-likelihood of the target tokens of a whole optimiser batch. (The
released code averages per micro-batch first, which weighs tokens by the batch that they happen to
fall in.) Logits are computed at target positions only.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..base.fingerprint import dtype_name
from ..base.loading import Base, load_base
from ..base.sites import find_sites
from ..config import Formatting, GateTraining, Peft, Training
from ..errors import BaseModelError, ConfigError, ExpertError
from ..experts.expert import Expert, check_name
from ..experts.kinds.registry import kind_for
from ..files.atomic import is_there
from ..files.strict import first_line, one_line, shortened
from ..tasks.batching import IGNORED, Collator, contiguous_head, target_logits
from ..tasks.embeddings import load_embedder
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.loading import given_task
from ..tasks.prompt_passes import read_pairs
from ..tasks.task import Task
from . import processes
from .progress import ProgressBar, TrainingCallback
from .workdir import discard_work, work_of

TRAINABLE = "trainable.safetensors"
COMPLETE = "complete"  # written last: a checkpoint without it was cut short


def visiting_order(pairs: Sequence[TokenPair], batch: int, steps: int, seed: int) -> list[int]:
    """Every index of `pairs` that a run will visit, so that a resumed run visits the same ones.

    The data is shuffled anew for each pass. Inside an optimiser batch examples are sorted by
    length, which changes no gradient but saves padding in the micro-batches.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[int] = []
    while len(shuffled) < batch * steps:
        shuffled += torch.randperm(len(pairs), generator=generator).tolist()
    order: list[int] = []
    for start in range(0, batch * steps, batch):
        chunk = shuffled[start : start + batch]
        order += sorted(chunk, key=lambda index: pairs[index].length)
    return order


class PartialTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """A Trainer that saves and restores only the parameters that want gradients."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole batch's target tokens

    def __init__(
        self, *, label: str, order: list[int], callback: TrainingCallback, **arguments: Any
    ) -> None:
        """`label` names the training in messages."""
        super().__init__(**arguments)
        self._label, self._order, self._callback = label, order, callback
        self.model_accepts_loss_kwargs = True  # so that the batch's target tokens are counted
        self._loss_shifts_labels = False  # each label is at the position that predicts it

    def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
        return self._order

    def training_step(self, *inputs: Any, **more: Any) -> Tensor:
        """The loss of a micro-batch, learnt from. Raises ExpertError where it is not finite."""
        loss: Tensor = super().training_step(*inputs, **more)
        self._check_finite("loss", float(loss), self.state.global_step + 1)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The summed negative log-likelihood over the number of target tokens in the batch.

        The batch is that of all processes. Gradients are averaged over processes, hence the factor.
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
        """The mean loss over all target tokens, independent of the batches.

        Raises ExpertError where it is not finite.
        """
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
        self._check_finite("validation loss", total / tokens, self.state.global_step)
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def check_trained(self) -> None:
        """Raise ExpertError where a trained number is not finite, for which no loss came after."""
        for _, parameter in self._trained():
            total = float(parameter.detach().abs().max())
            self._check_finite("largest trained number", total, self.state.global_step)

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise ExpertError(
                f"{one_line(self._label)}: training diverged, the {what} is {value} at step {step} "
                f"of {self.state.max_steps}; lower the learning rate and use restart."
            )

    def _share_of(self, pairs: Sequence[TokenPair]) -> DataLoader[TokenPair]:
        """Batches of this process's share of `pairs`, none of them twice."""
        share: Any = pairs[processes.rank() :: processes.count()]
        size = self.args.per_device_eval_batch_size
        return DataLoader(share, batch_size=size, collate_fn=self.data_collator)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._trained()}
        save_file(trained, folder / TRAINABLE)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch has no OSError for a full disk
            raise ExpertError(
                f"Checkpoint {folder} can't be written: {first_line(error)}"
            ) from error
        processes.wait_for_all()  # each has written its random state
        if processes.is_first():
            (folder / COMPLETE).write_text(json.dumps({"step": self.state.global_step}))
            self._callback.on_saved()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        kept = load_file(folder / TRAINABLE)
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(kept[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return (named for named in self.model.named_parameters() if named[1].requires_grad)


class ValidateLastStep(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Makes the last step a candidate even if it isn't a multiple of the validation interval."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a validation and a checkpoint at the end."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


def newest_checkpoint(work: Path) -> str | None:
    """The newest complete checkpoint in `work`, None without one; incomplete ones are removed."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            complete[int(folder.name.split("-")[1])] = folder
        elif processes.is_first():
            shutil.rmtree(folder)
    return str(complete[max(complete)]) if complete else None


# -------------------------------------------------------------------------------------------------
# The training loop of experts and gates, on the parameters of a model that want gradients.
#
# Hyper-parameters are the paper's (section 4.1); the schedule is constant after the warm-up.
# -------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------
# One training run: an expert's base, data and settings, and where the expert goes.
# -------------------------------------------------------------------------------------------------

STATISTICS = (
    "statistics_examples",
    "means",
    "readings",
    "embeddings",
    "embedder",
    "embedding_form",
)


@dataclass(frozen=True)
class TrainingRun:
    """The training of the expert `name`, to be written to `out`.

    `task` has a validation split; `digest` is that of the task as it was given.
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

    @classmethod
    def of(
        cls,
        base: Base | str | Path,
        task: Task | str | Path,
        out: Path,
        *,
        training: Training | None,
        gate_training: GateTraining | None,
        formatting: Formatting | None,
        name: str | None,
        callback: TrainingCallback | None = None,
    ) -> TrainingRun:
        """The run with these settings, None for defaults; a base given by name is loaded.

        What is made last, after hours perhaps, is refused here: raises ConfigError where embeddings
        are wanted and their embedder can't be loaded, RoutingError where means are and the base
        pads inside. Raises ExpertError for a name that can't be an expert's, TaskError when the
        task can't be used.
        """
        check_name(name or out.name)
        task = given_task(task)
        gate_training = gate_training or GateTraining()
        if gate_training.embeddings:
            load_embedder(gate_training.embedder)
        processes.join()
        training = training or Training()
        base = load_base(base) if isinstance(base, str | Path) else base
        if not isinstance(base, Base):
            raise BaseModelError(
                f"base is a {type(base).__name__}; wanted its name, its folder, or a loaded Base "
                f"(phatgoose.base.loading.load_base)."
            )
        run = cls(
            base=base,
            task=task.with_validation(training.seed),
            digest=task.digest,
            encoder=Encoder.of(base, formatting),
            training=training,
            gate_training=gate_training,
            out=out,
            name=name or out.name,
            callback=callback or TrainingCallback(),
        )
        if gate_training.means:
            run._rehearse_means()
        return run

    def _rehearse_means(self) -> None:
        """Read one example as means are measured."""
        model, padding = self.base.model, self.base.tokenizer.pad_token_id
        pairs = self.encoder.pairs(self.task.validation[:1])
        read_pairs(model, find_sites(model), pairs, padding, lambda *_: None)

    @property
    def work(self) -> Path:
        """The folder of its unfinished work."""
        return work_of(self.out)

    def identity(self, *shape: Peft, **more: str) -> dict[str, Any]:
        """What unfinished work must share to be resumed by this run, for `open_work`.

        Statistics are measured anew at the end, so they may be others.
        """
        settings = (*shape, self.training, self.gate_training, self.encoder.formatting)
        return {
            "base": self.base.fingerprint,
            "dtype": dtype_name(self.base.model.dtype),
            **more,
            "task": self.digest,
            "settings": [
                {name: value for name, value in asdict(each).items() if name not in STATISTICS}
                for each in settings
            ],
        }


def finished_expert(out: Path, settings: Mapping[str, Any], *, resume: bool) -> Expert | None:
    """The expert that an earlier run finished at `out`, None where nothing is.

    Warns where it records other `settings` than these. Raises ExpertError when something is there
    and not to be resumed.
    """
    if not is_there(out):
        return None
    if not resume:
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    expert = Expert.load(out)
    discard_work(out)  # not before: it may be all that there is
    warn_of_other_settings(str(out), expert.info.hyperparameters, settings)
    return expert


def settings_of_training(
    peft: Peft, training: Training, gates: GateTraining, formatting: Formatting
) -> dict[str, Any]:
    """What an expert of these settings records of them, for `warn_of_other_settings`."""
    shape = {"peft": kind_for(peft).name, **asdict(peft)}
    return {**shape, **asdict(training), **asdict(gates), **asdict(formatting)}


def warn_of_other_settings(
    place: str, recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Warn that the finished expert at `place` is kept, where what it records isn't `settings`.

    Those of statistics, which can be measured later, are left out, and whatever it doesn't record.
    """
    pairs = {
        name: (_value_of(name, recorded), _value_of(name, settings))
        for name in settings
        if name in recorded and name not in STATISTICS
    }
    other = [
        f"{name} {shortened(found, 40)}, not {shortened(wanted, 40)}"
        for name, (found, wanted) in pairs.items()
        if found != wanted
    ]
    if other:
        warnings.warn(
            f"{place} is kept as it is, with other settings: {'; '.join(other)}.", stacklevel=4
        )


def _value_of(name: str, settings: Mapping[str, Any]) -> Any:
    """A setting's value; a rate of gates that is None is the expert's."""
    value = settings[name]
    is_expert_s = name == "gate_learning_rate" and value is None
    return settings.get("learning_rate") if is_expert_s else value
