"""What training costs: tokens, parameters, memory, disk and time.

The examples of a task whose tokens are counted for a plan.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, T5Config

from ..base.loading import Base, load_base, load_skeleton
from ..base.sites import find_sites
from ..config import Formatting, GateTraining, Peft, Training
from ..errors import BaseModelError, TaskError
from ..experts.expert import MOST_EMBEDDINGS
from ..experts.readings import readings_size
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import Example, Task, draw
from .new_modules import parameters_at, placed_sites
from .progress import TrainingCallback
from .train_expert import train_expert

SAMPLE = 200  # examples


def pairs_of(encoder: Encoder, examples: Sequence[Example]) -> list[TokenPair]:
    """Their tokens, without a word about targets that are cut: training will warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(encoder.pairs(examples))


# -------------------------------------------------------------------------------------------------
# Numbers of parameters of a base and of its experts, from the base's config alone.
# -------------------------------------------------------------------------------------------------

# The bases of the recipes, for machines that lack their configs.
KNOWN_BASES: dict[str, PreTrainedConfig] = {
    "google/t5-xl-lm-adapt": T5Config(
        d_model=2048,
        d_ff=5120,
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters, and of the sites that they belong to.

    `expert` and `gates` are those of one expert at `sites` sites, `readings` the numbers that it
    shares of how the base reads prompts. `prompt` and `target` are those
    of the base's linear layers that a prompt's and a target's token passes: logits are computed for
    targets only, and an encoder-decoder model reads prompts in its encoder. `base` counts all of
    the base's parameters, `features` the inputs and outputs of the sites for one token, and
    `vocabulary` its logits. `from_table` says that the base was found in KNOWN_BASES.
    """

    sites: int
    expert: int
    gates: int
    readings: int
    prompt: int
    target: int
    base: int
    features: int
    vocabulary: int
    is_encoder_decoder: bool
    from_table: bool

    @classmethod
    def of(cls, base: str, peft: Peft) -> Shapes:
        """The shapes of an expert `peft` of the base model `base`, by its config or KNOWN_BASES.

        Nothing is downloaded and no weight is read. Raises BaseModelError when neither knows it,
        ConfigError when no site matches.
        """
        try:
            model, from_table = load_skeleton(base), False
        except BaseModelError as error:
            if base not in KNOWN_BASES:
                raise BaseModelError(
                    f"{error} Nothing is downloaded here: have the base's config.json at hand."
                ) from error
            model, from_table = load_skeleton(KNOWN_BASES[base]), True
        chosen, every = placed_sites(model, peft).values(), find_sites(model).values()
        passed = {
            stream: sum(s.in_features * s.out_features for s in every if s.stream == stream)
            for stream in ("encoder", "decoder")
        }
        head = model.get_output_embeddings()
        is_encoder_decoder = bool(model.config.is_encoder_decoder)
        return cls(
            sites=len(chosen),
            expert=parameters_at(model, peft),
            gates=sum(site.in_features for site in chosen),
            readings=readings_size(model.config),
            prompt=passed["encoder" if is_encoder_decoder else "decoder"],
            target=passed["decoder"] + (0 if head is None else head.weight.numel()),
            base=sum(parameter.numel() for parameter in model.parameters()),
            features=sum(site.in_features + site.out_features for site in chosen),
            vocabulary=0 if head is None else head.weight.shape[0],
            is_encoder_decoder=is_encoder_decoder,
            from_table=from_table,
        )


# -------------------------------------------------------------------------------------------------
# What training one expert costs in time, memory and disk, counted beforehand.
#
# Time is a count of floating-point operations over a speed. LoRA training with a frozen base takes
# 4 operations for each parameter of a linear layer and each token that passes it: 2 (multiply,
# add) in the forward pass, and 2 in the backward pass through the activations. Full training needs
# 2 more, for the gradients of the weights. Validation and statistics take the forward 2. Left out
# are adapter and gates (2 % of T5-XL's), attention scores (they grow with the square of the
# length), padding, the optimiser, reading data, and sentence embeddings.
# -------------------------------------------------------------------------------------------------

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


# -------------------------------------------------------------------------------------------------
# How fast a worker trains: given, or measured by training on a few batches.
# -------------------------------------------------------------------------------------------------

if sys.platform != "win32":
    import resource


STEPS = 6  # of the expert and of the gates each; the first is a warm-up and isn't counted
MICRO_BATCHES = 2  # in a batch of the trial, at most
VALIDATED = 16  # examples
STATUS = Path("/proc/self/status")  # Linux


@dataclass(frozen=True)
class Speed:
    """The speed of a worker: tokens per second, without padding, of each kind of work.

    `expert` and `gates` are trained tokens, `forward` those of validation and statistics. Loading
    the base takes `start_seconds`. `memory_bytes` is the peak; None means that it wasn't measured.
    """

    expert: float
    gates: float
    forward: float
    start_seconds: float = 0.0
    memory_bytes: int | None = None

    @classmethod
    def of(cls, tokens_per_second: float) -> Speed:
        """The speed of a worker that trains `tokens_per_second`."""
        forward = 2 * tokens_per_second  # the way back costs as much again
        return cls(tokens_per_second, tokens_per_second, forward)

    def note(self) -> str:
        """How the speed is known, in a sentence."""
        if self.memory_bytes is None:
            return f"Time is at {self.expert:g} trained tokens a second, as given."
        return (
            f"Time is at {self.expert:.0f} tokens a second of an expert, {self.gates:.0f} of gates "
            f"and {self.forward:.0f} of validation and statistics, measured here on a few batches."
        )


def measure_speed(
    base: str,
    tasks: Sequence[TrainingTask],
    *,
    peft: Peft | None = None,
    training: Training | None = None,
    gate_training: GateTraining | None = None,
    formatting: Formatting | None = None,
    dtype: str = "auto",
) -> Speed:
    """The speed of one worker like this machine, on the first of `tasks` with data here.

    A throw-away expert is trained with the given settings, but STEPS steps, batches of at most
    MICRO_BATCHES micro-batches and no statistics; then, for the memory, another for one step on the
    longest micro-batch that a sample of each task with data here comes to. Each task has its own
    micro-batch where its suite names one. Raises TaskError when no task has its data on this
    machine, and what loading the base and training raise.
    """
    training, gates = training or Training(), gate_training or GateTraining()
    here = [task for task in tasks if task.origin != "hub"]
    if not here:
        raise TaskError("No task has its data on this machine, so no speed can be measured here.")
    first = here[0].load().with_validation(training.seed)
    begun = time.perf_counter()
    loaded = load_base(base, dtype=dtype)
    start = time.perf_counter() - begun
    trials = _Trials(loaded, peft, gates, formatting or Formatting())
    measured = trials.speed(first, here[0].settings(training))
    trials.train_longest(here, training)
    return replace(measured, start_seconds=start, memory_bytes=most_memory())


@dataclass(frozen=True)
class _Trials:
    """Throw-away experts on one base, with the settings of a plan."""

    base: Base
    peft: Peft | None
    gates: GateTraining
    formatting: Formatting

    @property
    def encoder(self) -> Encoder:
        """How their examples become tokens."""
        return Encoder.of(self.base, self.formatting)

    def speed(self, task: Task, training: Training) -> Speed:
        """The speed of a short training on `task`, without start and memory."""
        most = min(VALIDATED, training.eval_examples)
        task = replace(task, validation=draw(task.validation, most, training.seed))
        batch = min(training.batch_size, MICRO_BATCHES * training.micro_batch_size)
        clock = _Clock()
        metrics = self._train(
            task,
            replace(training, steps=STEPS, batch_size=batch, eval_every=STEPS),
            replace(self.gates, gate_steps=STEPS, means=False, readings=False, embeddings=False),
            TrainingCallback(clock.steps, clock.saved),
        )
        validated = sum(pair.length for pair in self.encoder.pairs(task.validation))
        expert = clock.rate(0, metrics["expert_tokens"])
        return Speed(
            expert=expert,
            gates=expert if self.gates.joint else clock.rate(1, metrics["gate_tokens"]),
            forward=validated / (clock.saved_at - clock.stages[0][-1]),
        )

    def train_longest(self, tasks: Sequence[TrainingTask], training: Training) -> None:
        """One step on the longest micro-batch of `tasks`, for the memory that it takes."""
        longest, own = _longest(tasks, self.encoder, training)
        self._train(
            longest,
            replace(own, steps=1, batch_size=_rows(own), eval_every=1),
            replace(self.gates, gate_steps=1, embeddings=False),
        )

    def _train(
        self,
        task: Task,
        training: Training,
        gates: GateTraining,
        callback: TrainingCallback | None = None,
    ) -> Mapping[str, Any]:
        """The metrics of an expert that is thrown away."""
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
            expert = train_expert(
                self.base,
                task,
                out=Path(folder) / "trial",
                peft=self.peft,
                training=training,
                gate_training=gates,
                formatting=self.formatting,
                callback=callback,
            )
            return expert.info.metrics


def _rows(training: Training) -> int:
    """Sequences of a micro-batch."""
    return min(training.micro_batch_size, training.batch_size)


def _longest(
    tasks: Sequence[TrainingTask], encoder: Encoder, training: Training
) -> tuple[Task, Training]:
    """The task whose longest micro-batch in a sample has most tokens, and its own settings.

    It has no examples but those, and twice as many for validation, which takes as many at a time.
    """
    most, found = -1, None
    for each in tasks:
        own, task = each.settings(training), each.load()
        rows = _rows(own)
        sample = draw(task.train, SAMPLE, own.seed)
        lengths = [pair.length for pair in pairs_of(encoder, sample)]
        order = sorted(range(len(sample)), key=lambda row: -lengths[row])
        if (total := sum(lengths[row] for row in order[:rows])) > most:
            longest = tuple(sample[row] for row in order[: 2 * rows])
            most = total
            found = replace(task, train=longest[:rows], validation=longest), own
    if found is None:
        raise TaskError("No task has an example.")
    return found


@dataclass
class _Clock:
    """When each step of the expert and of its gates ended, and when the expert was saved."""

    stages: list[list[float]] = field(default_factory=list)
    saved_at: float = 0.0

    def steps(self, count: int) -> None:
        if count == 0:  # a stage begins
            self.stages.append([])
        else:
            self.stages[-1].append(time.perf_counter())

    def rate(self, stage: int, tokens: int) -> float:
        """Tokens a second of a stage that took so many in all, without its first step."""
        times = self.stages[stage]
        return tokens * (STEPS - 1) / STEPS / (times[-1] - times[0])

    def saved(self) -> None:
        self.saved_at = self.saved_at or time.perf_counter()  # first after the expert's validation


def most_memory() -> int | None:
    """The peak memory of this process in bytes: of its GPU if there is one, else of the machine.

    None on Windows, where Python isn't told. (On Linux getrusage tells a new process what its
    parent held when it was started, if that is more.)
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    if STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.M)
        if found is not None:
            return 1024 * int(found[1])
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
