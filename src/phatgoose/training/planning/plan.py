"""What a training run will cost, worked out beforehand: nothing is trained and nothing downloaded.

Time is a count of floating-point operations over a speed. LoRA training with a frozen base costs 4
of them for each parameter of a linear layer and each token that passes it: 2 (multiply, add) for
the forward pass, and 2 for the way back through the activations. The other 2 of full training,
for the gradients of the weights, fall away. Validation and statistics cost the forward 2. Left out
are the adapter and gates (2 % of T5-XL's), attention scores (they grow with the square of the
length), padding, the optimiser, reading data, and sentence embeddings.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm.auto import tqdm

from ...base.loading import choose_dtype, load_tokenizer
from ...config import IA3, PEFT_KINDS, Formatting, GateTraining, Lora, Peft, Training
from ...errors import BaseModelError, ConfigError, TaskError
from ...experts.expert import MOST_EMBEDDINGS
from ...tasks.encoding import Encoder
from ...tasks.suites.training_tasks import TrainingTask
from ...tasks.task import Task
from .sizes import Shapes
from .speed import Speed

__all__ = ["TFLOPS", "Plan", "PlannedTask", "plan_training"]

TFLOPS = 100.0  # what an A100- or H100-class GPU keeps up in bfloat16; assumed, not measured
TRAINED, MEASURED = 4, 2  # operations for a parameter and a token: see above
SAMPLE = 200
TOKENS_PER_WORD = 1.3
EMBEDDING_DIMS = 384  # of the default embedder, all-MiniLM-L6-v2
FLOAT32 = 4
CHECKPOINTS = 3  # the best and the last one, while the next is written
CHECKPOINT_COPIES = 3  # a parameter and its two moments in AdamW
TRAINABLE_COPIES = 4  # the same and its gradient
LOGIT_BYTES = 10  # of a logit: bfloat16, float32, its gradient
RUNTIME_BYTES = 600_000_000  # of torch, transformers and what they load


@dataclass(frozen=True)
class PlannedTask:
    """What training one expert will take.

    `examples` are those to train on, `counted` in the data or else as the suite lists them; None
    means unknown. `trained` sequences go forward and back, `measured` ones (validation, statistics)
    forward only; `tokens` are those of both. `prompt_tokens` and `target_tokens` are a sequence's
    mean, by `lengths`: "measured" on a sample, estimated from its "words", or the "limits" to which
    sequences are cut, hence an upper bound. `disk_bytes` is the expert's directory.
    """

    name: str
    source: str
    place: str
    examples: int | None
    counted: bool
    steps: int
    gate_steps: int
    trained: int
    measured: int
    prompt_tokens: float
    target_tokens: float
    lengths: str
    tokens: int
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What training a pool of experts of the kind `peft` will take, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert. `working_bytes` is
    the room for the checkpoints of the expert in training, `memory_bytes` what its process takes,
    and `start_seconds` when it begins. `notes` say what was assumed.
    """

    base: str
    peft: str
    dtype: str
    sites: int
    expert_parameters: int
    gate_parameters: int
    tasks: tuple[PlannedTask, ...]
    working_bytes: int
    memory_bytes: int
    start_seconds: float
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps of all experts, gates included."""
        return sum(task.steps + task.gate_steps for task in self.tasks)

    @property
    def sequences(self) -> int:
        """Sequences of all experts, those that are only measured included."""
        return sum(task.trained + task.measured for task in self.tasks)

    @property
    def tokens(self) -> int:
        """Tokens of all experts."""
        return sum(task.tokens for task in self.tasks)

    @property
    def seconds(self) -> float:
        """The time of all experts, one after the other."""
        return sum(task.seconds for task in self.tasks)

    @property
    def disk_bytes(self) -> int:
        """The size of all expert directories."""
        return sum(task.disk_bytes for task in self.tasks)


def plan_training(
    base: str,
    tasks: Sequence[TrainingTask],
    *,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    dtype: str = "auto",
    tflops: float | None = None,
    tokens_per_second: float | None = None,
    speed: Speed | None = None,
) -> Plan:
    """What training an expert of `base` on each task will take.

    Data that are on this machine are read, one dataset at a time; datasets of the Hub are not. The
    base's weights are never needed. `tflops` is the speed that is kept up, in 10^12 operations a
    second (None: TFLOPS); `tokens_per_second`, as training reports it, is used instead where known,
    and so is a measured `speed`.

    Raises ConfigError for a speed that isn't one, BaseModelError when the base's config isn't on
    this machine (the two bases of the recipes are known without), TaskError for a task file of the
    user's own that can't be used.
    """
    peft, training = peft or Lora(), training or Training()
    gate_training, formatting = gate_training or GateTraining(), formatting or Formatting()
    for name, given in (("tflops", tflops), ("tokens_per_second", tokens_per_second)):
        if given is not None and not (0 < given < math.inf):
            raise ConfigError(f"{name} is {given!r}, but must be above 0 and finite.")
    shapes = Shapes.of(base, peft)
    kind = next(kind for kind, config in PEFT_KINDS.items() if isinstance(peft, config))
    kept = torch.float32 if isinstance(peft, IA3) else choose_dtype(dtype)
    planner = _Planner(
        shapes,
        training,
        gate_training,
        formatting,
        _encoder(base, shapes, formatting),
        kept.itemsize,
        TFLOPS if tflops is None else tflops,
        speed or (None if tokens_per_second is None else Speed.of(tokens_per_second)),
    )
    unread: list[str] = []
    planned = tuple(
        planner.plan(task, _read(task, training.seed, unread))
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None)
    )
    return Plan(
        base=base,
        peft=kind,
        dtype=str(kept).removeprefix("torch."),
        sites=shapes.sites,
        expert_parameters=shapes.expert,
        gate_parameters=shapes.gates,
        tasks=planned,
        working_bytes=planner.working_bytes,
        memory_bytes=planner.memory_bytes(planned),
        start_seconds=planner.speed.start_seconds if planner.speed else 0.0,
        notes=tuple(_notes(base, planner, planned, unread)),
    )


@dataclass(frozen=True)
class _Lengths:
    """Mean tokens of a sequence, and how they are known: see PlannedTask."""

    prompt: float
    target: float
    basis: str


@dataclass(frozen=True)
class _Planner:
    """Everything that is the same for all tasks. `encoder` None: no tokenizer is at hand."""

    shapes: Shapes
    training: Training
    gate_training: GateTraining
    formatting: Formatting
    encoder: Encoder | None
    itemsize: int
    tflops: float
    speed: Speed | None

    @property
    def working_bytes(self) -> int:
        """Checkpoints of the adapter (its gates' too when joint), and the adapter made of them."""
        joint = self.shapes.gates if self.gate_training.joint else 0
        held = CHECKPOINTS * CHECKPOINT_COPIES * FLOAT32 * (self.shapes.expert + joint)
        return held + self.itemsize * self.shapes.expert

    def memory_bytes(self, tasks: Sequence[PlannedTask]) -> int:
        """What a process takes: measured, or else counted for the task of the longest sequences.

        Counted are the base, trained parameters with gradients and moments, and what the way back
        needs of one micro-batch: every site's input and output, and the logits.
        """
        if self.speed is not None and self.speed.memory_bytes is not None:
            return self.speed.memory_bytes
        shapes, rows = self.shapes, min(self.training.micro_batch_size, self.training.batch_size)
        trained = shapes.expert + (shapes.gates if self.gate_training.joint else 0)
        length = max((task.prompt_tokens + task.target_tokens for task in tasks), default=0.0)
        target = max((task.target_tokens for task in tasks), default=0.0)
        activations = rows * length * shapes.features * self.itemsize
        logits = rows * target * shapes.vocabulary * LOGIT_BYTES
        held = self.itemsize * shapes.base + TRAINABLE_COPIES * FLOAT32 * trained
        return RUNTIME_BYTES + held + round(activations + logits)

    def plan(self, task: TrainingTask, data: Task | None) -> PlannedTask:
        """The costs of one task; `data` is None where it can't be read here."""
        training, gates, shapes = self.training, self.gate_training, self.shapes
        examples = task.entry.train_examples if data is None else len(data.train)
        lengths = self._lengths(data)
        length = lengths.prompt + lengths.target
        gate_steps = 0 if gates.joint else gates.gate_steps
        trained = training.batch_size * (training.steps + gate_steps)
        measured = self._validated(data) + (self._sampled(examples) if gates.means else 0)
        operations = lengths.prompt * shapes.prompt + lengths.target * shapes.target
        if self.speed is None:
            work = (TRAINED * trained + MEASURED * measured) * operations
            seconds = work / (self.tflops * 1e12)
        else:
            speed, batch = self.speed, training.batch_size
            expert, gate = batch * training.steps, batch * gate_steps
            seconds = length * (
                expert / speed.expert + gate / speed.gates + measured / speed.forward
            )
        return PlannedTask(
            name=task.name,
            source=task.entry.source or task.named,
            place=task.origin,
            examples=examples,
            counted=data is not None,
            steps=training.steps,
            gate_steps=gate_steps,
            trained=trained,
            measured=measured,
            prompt_tokens=lengths.prompt,
            target_tokens=lengths.target,
            lengths=lengths.basis,
            tokens=round((trained + measured) * length),
            seconds=seconds,
            disk_bytes=self._disk(examples),
        )

    def _validated(self, data: Task | None) -> int:
        """Sequences of all validations: every so many steps, and after the last one."""
        most = self.training.eval_examples
        count = most if data is None else min(most, len(data.validation))
        return count * math.ceil(self.training.steps / self.training.eval_every)

    def _sampled(self, examples: int | None) -> int:
        most = self.gate_training.statistics_examples
        return most if examples is None else min(most, examples)

    def _disk(self, examples: int | None) -> int:
        """Adapter, gates, means and embeddings; the descriptions beside them are small."""
        vectors = 1 + self.gate_training.means
        size = self.itemsize * self.shapes.expert + FLOAT32 * self.shapes.gates * vectors
        if self.gate_training.embeddings:
            size += FLOAT32 * EMBEDDING_DIMS * min(MOST_EMBEDDINGS, self._sampled(examples))
        return size

    def _lengths(self, data: Task | None) -> _Lengths:
        """The tokens of one of its sequences, as far as that can be told."""
        limits = self.formatting
        if data is None:
            return _Lengths(limits.max_input_tokens, limits.max_target_tokens, "limits")
        count = min(SAMPLE, len(data.train))
        sample = random.Random(self.training.seed).sample(data.train, count)
        if self.encoder is None:
            return _Lengths(
                _by_words([row.input for row in sample], limits.max_input_tokens),
                _by_words([row.target for row in sample], limits.max_target_tokens),
                "words",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of targets that are cut: training will tell
            pairs = [self.encoder.pair(row.input, row.target, row.passage) for row in sample]
        return _Lengths(
            fmean(len(pair.prompt) for pair in pairs),
            fmean(len(pair.target) for pair in pairs),
            "measured",
        )


def _encoder(base: str, shapes: Shapes, formatting: Formatting) -> Encoder | None:
    """The base's encoder, None when its tokenizer isn't on this machine."""
    try:
        tokenizer = load_tokenizer(base, offline=True)
    except BaseModelError:
        return None
    return Encoder(tokenizer, is_encoder_decoder=shapes.is_encoder_decoder, formatting=formatting)


def _read(task: TrainingTask, seed: int, unread: list[str]) -> Task | None:
    """The task, divided as for training; None where its data are not on this machine.

    Why a copy can't be read is added to `unread`.
    """
    if task.origin == "hub":
        return None
    try:
        return task.load().with_validation(seed)
    except TaskError as error:
        if task.origin == "file":
            raise
        unread.append(str(error))
        return None


def _by_words(texts: Sequence[str], most: int) -> float:
    """Tokens of a text on average, by its words, one for the end of the sequence included."""
    return fmean(min(most, TOKENS_PER_WORD * len(text.split()) + 1) for text in texts)


def _notes(
    base: str, planner: _Planner, tasks: Sequence[PlannedTask], unread: Sequence[str]
) -> list[str]:
    """What was assumed, in sentences."""
    limits = planner.formatting
    most = f"{limits.max_input_tokens} + {limits.max_target_tokens}"
    meanings = {
        "measured": f"measured on up to {SAMPLE} of its examples",
        "words": (
            f"estimated as {TOKENS_PER_WORD} a word of up to {SAMPLE} examples, since the base's "
            f"tokenizer isn't on this machine"
        ),
        "limits": (
            f"taken as the {most} to which it is cut, an upper bound that is usually far too high, "
            f"since the data aren't on this machine"
        ),
    }
    counts = Counter(task.lengths for task in tasks)
    notes = [
        f"For {count} of {len(tasks)} tasks, the tokens of a sequence are {meanings[basis]}."
        for basis, count in counts.items()
    ]
    if planner.speed is None:
        notes.append(
            f"Time is {TRAINED} operations for each linear parameter and trained token, {MEASURED} "
            f"for validation and statistics, at {planner.tflops:g} TFLOP/s kept up; "
            f"{TFLOPS:g} is assumed of an A100- or H100-class GPU in bfloat16, not measured."
        )
    else:
        notes.append(planner.speed.told())
    if planner.speed is None or planner.speed.memory_bytes is None:
        notes.append(
            "Memory is counted, not measured: base, trained parameters with gradients and moments, "
            "and the activations of one micro-batch."
        )
    if planner.shapes.from_table:
        notes.append(f"The config of {base} isn't on this machine; its published shapes are used.")
    if planner.gate_training.embeddings:
        notes.append(f"Embeddings are taken to have {EMBEDDING_DIMS} dimensions.")
    if unread:
        notes.append(f"{len(unread)} copies can't be read, the first because: {unread[0]}")
    return notes
