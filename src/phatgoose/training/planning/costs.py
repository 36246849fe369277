"""What training one expert costs in time, memory and disk, counted beforehand.

Time is a count of floating-point operations over a speed. LoRA training with a frozen base takes 4
operations for each parameter of a linear layer and each token that passes it: 2 (multiply, add) in
the forward pass, and 2 in the backward pass through the activations. Full training needs 2 more,
for the gradients of the weights. Validation and statistics take the forward 2. Left out are adapter
and gates (2 % of T5-XL's), attention scores (they grow with the square of the length), padding, the
optimiser, reading data, and sentence embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ...config import Formatting, GateTraining, Training
from ...experts.expert import MOST_EMBEDDINGS
from ...tasks.encoding import Encoder
from ...tasks.suites.training_tasks import TrainingTask
from ...tasks.task import Task, draw
from .sample import SAMPLE, pairs_of
from .sizes import Shapes
from .speed import Speed

__all__ = ["EMBEDDING_DIMS", "MEASURED", "TFLOPS", "TOKENS_PER_WORD", "TRAINED"]
__all__ += ["CostModel", "PlannedTask"]

TFLOPS = 100.0  # sustained by an A100- or H100-class GPU in bfloat16; assumed, not measured
TRAINED, MEASURED = 4, 2  # operations per parameter and token: see above
TOKENS_PER_WORD = 1.3
EMBEDDING_DIMS = 384  # of the default embedder, all-MiniLM-L6-v2
FLOAT32 = 4
CHECKPOINTS = 3  # the best and the last one, while the next is written
CHECKPOINT_COPIES = 3  # a parameter and its two moments in AdamW
TRAINABLE_COPIES = 4  # the same and its gradient
KEPT = 2  # times: norms, activation functions and rotations keep as much as the linears between
LOGIT_BYTES = 10  # of one logit: bfloat16, float32, its gradient
RUNTIME_BYTES = 600_000_000  # of torch, transformers and what they load


@dataclass(frozen=True)
class PlannedTask:
    """What training one expert will cost.

    `examples` is the number of training examples, `counted` in the data or else from the suite's
    list; None means unknown. `trained` sequences go forward and back, `measured` ones (validation,
    statistics) forward only; `tokens` counts both. `prompt_tokens` and `target_tokens` are means
    per sequence, `micro_batch` and `micro_batch_targets` the most tokens of a micro-batch, all and
    those of targets. `lengths` says how they are known: "measured" on a sample, estimated from its
    "words", or the "limits" to which sequences are cut, an upper bound. `disk_bytes` is the size of
    the expert's directory.
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
    micro_batch: float
    micro_batch_targets: float
    lengths: str
    tokens: int
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class _Lengths:
    """Tokens of some sequences' prompts and targets; `basis` says how they are known."""

    prompts: Sequence[float]
    targets: Sequence[float]
    basis: str

    @property
    def prompt(self) -> float:
        """The mean of a prompt."""
        return fmean(self.prompts)

    @property
    def target(self) -> float:
        """The mean of a target."""
        return fmean(self.targets)

    def longest(self, rows: int) -> tuple[float, float]:
        """The most tokens of so many sequences: all of them, and those of targets."""
        whole = [sum(pair) for pair in zip(self.prompts, self.targets, strict=True)]
        return _most(whole, rows), _most(self.targets, rows)


def _most(lengths: Sequence[float], rows: int) -> float:
    """The sum of the `rows` largest, the largest standing for any that are missing."""
    highest = sorted(lengths, reverse=True)[:rows]
    return sum(highest) + (rows - len(highest)) * highest[0]


@dataclass(frozen=True)
class CostModel:
    """The costs of training with certain settings; what is the same for all tasks.

    Each task has its own micro-batch where its suite names one, else that of `training`.
    `itemsize` is the bytes of one stored number. `encoder` None means that the base's tokenizer
    isn't on this machine; `speed` None that time follows from `tflops`.
    """

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
        """The size of unfinished work: checkpoints (with joint gates) and the trained adapter."""
        joint = self.shapes.gates if self.gate_training.joint else 0
        held = CHECKPOINTS * CHECKPOINT_COPIES * FLOAT32 * (self.shapes.expert + joint)
        return held + self.itemsize * self.shapes.expert

    def memory_bytes(self, tasks: Sequence[PlannedTask]) -> int:
        """The memory of a process: measured, or else counted for the longest sequences together.

        Counted are the base, trained parameters with gradients and moments, and what the backward
        pass needs of one micro-batch: every site's input and output, as much again for what lies
        between them, and the logits. Attention's probabilities are left out.
        """
        if self.speed is not None and self.speed.memory_bytes is not None:
            return self.speed.memory_bytes
        shapes = self.shapes
        trained = shapes.expert + (shapes.gates if self.gate_training.joint else 0)
        tokens = max((task.micro_batch for task in tasks), default=0.0)
        targets = max((task.micro_batch_targets for task in tasks), default=0.0)
        activations = KEPT * tokens * shapes.features * self.itemsize
        logits = targets * shapes.vocabulary * LOGIT_BYTES
        held = self.itemsize * shapes.base + TRAINABLE_COPIES * FLOAT32 * trained
        return RUNTIME_BYTES + held + round(activations + logits)

    def plan(self, task: TrainingTask, data: Task | None) -> PlannedTask:
        """The costs of one task; `data` is None where it can't be read here."""
        training, gates, shapes = task.settings(self.training), self.gate_training, self.shapes
        examples = task.entry.train_examples if data is None else len(data.train)
        lengths = self._lengths(data)
        length = lengths.prompt + lengths.target
        rows = min(training.micro_batch_size, training.batch_size)
        micro_batch, micro_batch_targets = lengths.longest(rows)
        gate_steps = 0 if gates.joint else gates.gate_steps
        trained = training.batch_size * (training.steps + gate_steps)
        passes = gates.means + gates.readings
        measured = self._validated(data) + passes * self._sampled(examples)
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
            micro_batch=micro_batch,
            micro_batch_targets=micro_batch_targets,
            lengths=lengths.basis,
            tokens=round((trained + measured) * length),
            seconds=seconds,
            disk_bytes=self._disk(examples),
        )

    def _validated(self, data: Task | None) -> int:
        """Sequences of all validations: every `eval_every` steps, and after the last step."""
        most = self.training.eval_examples
        count = most if data is None else min(most, len(data.validation))
        return count * math.ceil(self.training.steps / self.training.eval_every)

    def _sampled(self, examples: int | None) -> int:
        most = self.gate_training.statistics_examples
        return most if examples is None else min(most, examples)

    def _disk(self, examples: int | None) -> int:
        """Bytes of adapter, gates and statistics; the JSON beside them is small."""
        settings, shapes = self.gate_training, self.shapes
        vectors = shapes.gates * (1 + settings.means) + shapes.readings * settings.readings
        size = self.itemsize * shapes.expert + FLOAT32 * vectors
        if self.gate_training.embeddings:
            size += FLOAT32 * EMBEDDING_DIMS * min(MOST_EMBEDDINGS, self._sampled(examples))
        return size

    def _lengths(self, data: Task | None) -> _Lengths:
        """The tokens of a sample of `data`, as well as they can be known."""
        limits = self.formatting
        if data is None:
            return _Lengths([limits.max_input_tokens], [limits.max_target_tokens], "limits")
        sample = draw(data.train, SAMPLE, self.training.seed)
        if self.encoder is None:
            return _Lengths(
                _by_words([row.input for row in sample], limits.max_input_tokens),
                _by_words([row.target for row in sample], limits.max_target_tokens),
                "words",
            )
        pairs = pairs_of(self.encoder, sample)
        return _Lengths(
            [len(pair.prompt) for pair in pairs],
            [len(pair.target) for pair in pairs],
            "measured",
        )


def _by_words(texts: Sequence[str], most: int) -> list[float]:
    """Tokens of each text, estimated from its words, with one for the end of the sequence."""
    return [min(most, TOKENS_PER_WORD * len(text.split()) + 1) for text in texts]
