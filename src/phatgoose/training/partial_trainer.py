"""transformers' Trainer for a model of which a small part is trained: it saves only that part.

The loss is the mean negative log-likelihood of the target tokens of a whole optimiser batch. (The
released code averages per micro-batch first, which weighs tokens by the batch that they happen to
fall in.) Logits are computed at target positions only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ..errors import ExpertError
from ..files.quoting import first_line, one_line
from ..tasks.collating import IGNORED
from ..tasks.encoding import TokenPair
from ..tasks.target_logits import target_logits
from . import processes
from .progress import TrainingCallback

__all__ = ["PartialTrainer", "ValidateLastStep", "newest_checkpoint", "visiting_order"]

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
