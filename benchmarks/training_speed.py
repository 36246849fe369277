"""LoRA training beside PEFT with transformers' Trainer."""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import phatgoose as pg
from bench import Bench, Sizes, words
from findings import Finding, row
from measuring import in_turns
from phatgoose.base.identity import Base, twin
from phatgoose.base.loading import quiet_loading
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.tasks.batching import IGNORED
from phatgoose.tasks.encoding import Encoder, TokenPair
from phatgoose.tasks.task import Task

# A word is a token here. Inputs and targets are about as long as in T0's and FLAN's training tasks.
INPUTS, TARGETS = (49, 0.85, 8, 400), (2, 1.0, 1, 60)  # median, spread of the log, least, most


@row("training", "LoRA training")
def measure_lora_training(bench: Bench) -> Iterator[Finding]:
    """Tokens a second of `train_expert` beside PEFT and Trainer with their defaults.

    The same rows for all, padding not counted; the clock runs from the begin to the end of each
    optimiser step. "Defaults" are LoraConfig(r=16, target_modules="all-linear"), get_peft_model's
    float32 adapters, and TrainingArguments but for the batch and the number of steps.
    """
    sizes = bench.sizes
    task = _task(sizes.training_batch * sizes.training_steps)
    pairs = _pairs(bench.base, task)
    tokens = sum(pair.length for pair in pairs)
    with quiet_loading():
        plain = AutoModelForCausalLM.from_pretrained(bench.base.model.name_or_path)
    # One line where both are of one type.
    bases = {sizes.dtype: bench.base.model, str(plain.dtype).removeprefix("torch."): plain}
    contenders: dict[str, Callable[[], float]] = {
        name: partial(_peft_seconds, model, pairs, bench) for name, model in bases.items()
    }
    contenders["phatgoose"] = lambda: _seconds(bench.base, task, sizes)
    timings = in_turns(contenders, sizes.rounds)
    for name in bases:
        by_default = ", from_pretrained's default" if len(bases) == 1 else ""
        case = f"{sizes.base} in {name}{by_default}: tokens a second, phatgoose / PEFT + Trainer"
        ours, theirs = (tokens / timings[each].median for each in ("phatgoose", name))
        note = f"{ours:.0f} and {theirs:.0f} tokens/s"
        yield Finding.of(case, timings, name, "phatgoose", note)


def _seconds(base: Base, task: Task, sizes: Sizes) -> float:
    """The seconds of the LoRA's steps in `train_expert`, which sees every row once."""
    rows = sizes.training_batch
    steps = len(task.train) // rows
    with tempfile.TemporaryDirectory() as folder:
        expert = pg.train_expert(
            twin(base),
            task,
            out=Path(folder) / "expert",
            peft=Lora(rank=sizes.rank, alpha=sizes.rank),
            training=Training(
                steps=steps, batch_size=rows, micro_batch_size=rows, learning_rate=1e-3
            ),
            gate_training=GateTraining(gate_steps=1, means=False, readings=False),
        )
    metrics = expert.info.metrics
    return float(metrics["expert_tokens"] / metrics["expert_tokens_per_second"])


def _peft_seconds(model: torch.nn.Module, pairs: Sequence[TokenPair], bench: Bench) -> float:
    """The seconds of an epoch over `pairs` with Trainer on a PEFT model."""
    rank, batch = bench.sizes.rank, bench.sizes.training_batch
    base = twin(Base(model, bench.base.tokenizer, "", None, ""))
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
    rows = [
        {
            "input_ids": pair.prompt + pair.target,
            "labels": [IGNORED] * len(pair.prompt) + pair.target,
        }
        for pair in pairs
    ]
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=get_peft_model(base.model, config),
            args=TrainingArguments(
                folder,
                per_device_train_batch_size=batch,
                max_steps=len(pairs) // batch,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(base.tokenizer),
            callbacks=[clock],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.train()
    return clock.seconds


class _StepClock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Counts the seconds of optimiser steps, as `training.trainer` does."""

    def __init__(self) -> None:
        self.seconds = self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds += time.perf_counter() - self._begun


def _task(examples: int) -> Task:
    """Random rows of very different lengths."""
    generator = random.Random(0)

    def text(median: int, spread: float, least: int, most: int) -> str:
        drawn = round(median * generator.lognormvariate(0, spread))
        return words(generator, min(max(drawn, least), most))

    rows = [
        {"input": text(*INPUTS), "target": text(*TARGETS), "split": split}
        for split in ["train"] * examples + ["validation"]
    ]
    return pg.load_task(rows, name="speed")


def _pairs(base: Base, task: Task) -> list[TokenPair]:
    return Encoder.of(base).pairs(task.train)
