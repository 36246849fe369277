"""Progress of a training: a callback for callers, and a bar on the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..files.strict import one_line
from . import processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCallback:
    """Functions that hear of training progress; the defaults ignore it.

    `on_steps` gets the number of optimiser steps just done, at the beginning of a training those of
    earlier runs. `on_saved` is called when a checkpoint or another part of the unfinished work is
    complete on the disk. `shows_bar` False leaves the progress bar to the caller.
    """

    on_steps: Callable[[int], None] = lambda count: None
    on_saved: Callable[[], None] = lambda: None
    shows_bar: bool = True


class ProgressBar(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """One line on the terminal (steps, loss, tokens per second); a log line per validation.

    `order` holds the examples in the order of training, `lengths` the tokens of each.
    """

    def __init__(
        self,
        label: str,
        lengths: list[int],
        order: list[int],
        batch: int,
        callback: TrainingCallback,
    ) -> None:
        self.label, self.tokens, self.seconds = label, 0, 0.0
        self._callback = callback
        self._lengths, self._order, self._batch = lengths, order, batch
        self._bar: Any = None
        self._begun = 0.0

    @property
    def tokens_per_second(self) -> float:
        """The speed so far, validation left out; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar at the step where a resumed run stands.

        Its folder may have moved, for which transformers forgets its best checkpoint.
        """
        if state.best_global_step:
            best = f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(Path(args.output_dir) / best)
        self._callback.on_steps(state.global_step)
        if processes.is_first():
            logger.info("%s: step %d of %d", self.label, state.global_step, state.max_steps)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=one_line(self.label),
            unit="step",
            disable=None if processes.is_first() and self._callback.shows_bar else True,
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
        self._callback.on_steps(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show loss and speed beside the bar; log validations."""
        if logs and "loss" in logs:
            speed = f"{self.tokens_per_second:.0f} tokens/s"
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed}")
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
