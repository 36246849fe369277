"""What training a pool will cost: steps, tokens, parameters, memory, disk, and time at a speed.

Nothing is trained and nothing downloaded, but for `Planner.measure`.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, T5Config

from ..base import choose_dtype, dtype_name, load_base, load_skeleton, load_tokenizer
from ..config import FOUR_BITS, Formatting, GateTraining, Lora, Peft, Training
from ..errors import BaseModelError, TaskError
from ..experts.expert import MOST_EMBEDDINGS
from ..experts.registry import kind_for
from ..experts.statistics import readings_size
from ..sites import find_sites
from ..tasks.encoding import Encoder
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import Example, Task, draw
from .modules import check_packed, parameters_at, placed_sites
from .train_expert import train_expert
from .trainer import TrainingCallback

SAMPLE = 200  # examples whose tokens are counted
EMBEDDING_DIMS = 384  # of the default embedder, all-MiniLM-L6-v2
FLOAT32 = 4  # bytes
CHECKPOINT_COPIES = 3 * 3  # a parameter and AdamW's two moments; best, last, and the next one
TRAINABLE_COPIES = 4  # a parameter, its gradient and two moments
KEPT = 2  # times: norms, activation functions and rotations keep as much as the linears between
LOGIT_BYTES = 10  # of one logit: bfloat16, float32, its gradient
RUNTIME_BYTES = 600_000_000  # of torch, transformers and what they load
BYTES_OF_4_BITS = 0.52  # of a weight, with its scale: bitsandbytes' NF4, quantised twice
TRIAL_STEPS = 3  # the first is a warm-up and isn't timed
T5_XL = "google/t5-xl-lm-adapt"  # the paper's base, whose config plans don't have to find
T5_XL_CONFIG = T5Config(
    **{"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class PlannedTask:
    """What training one expert will cost.

    `examples` are the training examples, None if unknown; `is_bound` means that the data or the
    base's tokenizer aren't here, so that sequences count with the length to which they are cut.
    `tokens` include validation and statistics. `seconds` is None if no speed is known.
    """

    name: str
    source: str
    examples: int | None
    steps: int
    gate_steps: int
    tokens: int
    is_bound: bool
    seconds: float | None
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What training a pool will cost, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert, `working_bytes` its
    checkpoints while it trains, `memory_bytes` the peak of the process in a training step.
    """

    dtype: str
    sites: int
    expert_parameters: int
    gate_parameters: int
    tasks: tuple[PlannedTask, ...]
    working_bytes: int
    memory_bytes: int

    def total(self) -> PlannedTask:
        """Sums over all tasks."""
        names = ("steps", "gate_steps", "tokens", "disk_bytes")
        sums = {name: sum(getattr(task, name) for task in self.tasks) for name in names}
        return PlannedTask(
            name="total",
            source=f"{len(self.tasks)} tasks",
            examples=None,
            is_bound=any(task.is_bound for task in self.tasks),
            seconds=sum(task.seconds or 0.0 for task in self.tasks) or None,
            **sums,
        )


class Speed(NamedTuple):
    """Trained tokens a second, without padding, and the peak memory if it was measured too."""

    tokens_per_second: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Planner:
    """Plans trainings of experts of `base` with these settings."""

    base: str
    peft: Peft = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    gate_training: GateTraining = field(default_factory=GateTraining)
    formatting: Formatting = field(default_factory=Formatting)
    dtype: str = "auto"

    def plan(self, tasks: Sequence[TrainingTask], speed: Speed | None = None) -> Plan:
        """What training an expert on each task will cost, with the task's own micro-batch if any.

        Data on this machine are read, one dataset at a time; datasets on the Hub are not. Raises
        BaseModelError when the base's config isn't on this machine (the paper's is built in),
        ConfigError when no site matches or the expert can't be trained on 4 bits, and TaskError for
        data that can't be used.
        """
        check_packed(self.peft, packed=self.dtype == FOUR_BITS)
        model = load_skeleton(T5_XL_CONFIG if self.base == T5_XL else self.base)
        try:
            tokenizer = load_tokenizer(self.base, offline=True)
            encoder = Encoder.for_model(model, tokenizer, self.formatting)
        except BaseModelError:
            encoder = None
        sites, gates = placed_sites(model, self.peft).values(), self.gate_training
        expert, gate = parameters_at(model, self.peft), sum(site.in_features for site in sites)
        learnt, modules = expert + gates.joint * gate, kind_for(self.peft).new_modules
        stored = modules.dtype or choose_dtype(self.dtype)
        adapter = modules.copies * stored.itemsize * expert  # bytes of its files
        vectors = gate * (1 + gates.means) + readings_size(model.config) * gates.readings
        disk, planned, activations = adapter + FLOAT32 * vectors, [], [0]
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None):
            found, lengths = self._task(task, encoder, speed)
            planned.append(replace(found, disk_bytes=disk + found.disk_bytes))
            activations.append(self._rows(task) * self._activations(model, lengths))
        memory = self._base_bytes(model) + TRAINABLE_COPIES * FLOAT32 * learnt + max(activations)
        return Plan(
            dtype=dtype_name(stored),
            sites=len(sites),
            expert_parameters=expert,
            gate_parameters=gate,
            tasks=tuple(planned),
            working_bytes=CHECKPOINT_COPIES * FLOAT32 * learnt + adapter,
            memory_bytes=(speed and speed.memory_bytes) or RUNTIME_BYTES + memory,
        )

    def _task(
        self, task: TrainingTask, encoder: Encoder | None, speed: Speed | None
    ) -> tuple[PlannedTask, Sequence[tuple[int, int]]]:
        """The costs, disk for embeddings alone, and the tokens of some prompts and targets."""
        gates, limits, seed = self.gate_training, self.formatting, self.training.seed
        validated, examples = self.training.eval_examples, task.entry.train_examples
        lengths = [(limits.max_input_tokens, limits.max_target_tokens)]
        data = None if task.origin == "hub" else task.load().with_validation(seed)
        if data is not None:
            validated, examples = min(validated, len(data.validation)), len(data.train)
        if data is not None and encoder is not None:
            pairs = encoder.pairs(draw(data.train, SAMPLE, seed))
            lengths = [(len(pair.prompt), len(pair.target)) for pair in pairs]
        training = self.training if examples is None else self.training.on(examples)
        gate_steps = 0 if gates.joint else gates.gate_steps
        trained = training.batch_size * (training.steps + gate_steps)
        read = min(gates.statistics_examples, examples or gates.statistics_examples)
        forward = validated * math.ceil(training.steps / training.eval_every)
        forward += read * (gates.means + gates.readings)
        length = fmean(map(sum, lengths))
        # A pass forward takes half the time of one that trains.
        tokens, passed = (trained + forward) * length, (trained + forward / 2) * length
        return PlannedTask(
            name=task.name,
            source=task.entry.source or task.named,
            examples=examples,
            steps=training.steps,
            gate_steps=gate_steps,
            tokens=round(tokens),
            is_bound=data is None or encoder is None,
            seconds=speed and passed / speed.tokens_per_second,
            disk_bytes=FLOAT32 * EMBEDDING_DIMS * min(MOST_EMBEDDINGS, read) * gates.embeddings,
        ), lengths

    def _activations(self, model: PreTrainedModel, lengths: Sequence[tuple[int, int]]) -> int:
        """Bytes that training keeps of the longest sequence, attention's probabilities apart."""
        features = {"encoder": 0, "decoder": 0}
        for site in placed_sites(model, self.peft).values():
            features[site.stream] += site.in_features + site.out_features
        # An encoder-decoder reads prompts in its encoder.
        reading = features["encoder"] or features["decoder"]
        longest = max(reading * prompt + features["decoder"] * own for prompt, own in lengths)
        head: Any = model.get_output_embeddings()
        logits = 0 if head is None else len(head.weight) * max(own for _, own in lengths)
        return KEPT * choose_dtype(self.dtype).itemsize * longest + LOGIT_BYTES * logits

    def _base_bytes(self, model: PreTrainedModel) -> int:
        itemsize = choose_dtype(self.dtype).itemsize
        size = itemsize * sum(int(parameter.numel()) for parameter in model.parameters())
        sites = find_sites(model).values() if self.dtype == FOUR_BITS else ()
        linear = sum(site.in_features * site.out_features for site in sites)
        return size - round((itemsize - BYTES_OF_4_BITS) * linear)

    def _rows(self, task: TrainingTask) -> int:
        training = task.settings(self.training)
        return min(training.micro_batch_size, training.batch_size)

    def measure(self, tasks: Sequence[TrainingTask]) -> Speed:
        """The speed and peak memory of two micro-batches: one drawn, the longest of a sample.

        Raises TaskError when no task has its data on this machine, and what training raises.
        """
        trials = [_trial(task, self._rows(task)) for task in tasks if task.origin != "hub"]
        if not trials:
            raise TaskError("No task has its data on this machine: no speed can be measured here.")
        task = max(trials, key=lambda trial: sum(map(_characters, trial.validation)))
        size, times = len(task.train), list[float]()
        short = replace(self.training, steps=TRIAL_STEPS, epochs=None, eval_every=TRIAL_STEPS)
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
            expert = train_expert(
                load_base(self.base, dtype=self.dtype),
                task,
                out=Path(folder) / "trial",
                peft=self.peft,
                training=replace(short, batch_size=size, micro_batch_size=size // 2),
                gate_training=replace(self.gate_training, gate_steps=1, embeddings=False),
                formatting=self.formatting,
                callback=TrainingCallback(on_steps=lambda _: times.append(time.perf_counter())),
            )
        tokens = expert.info.metrics["expert_tokens"] * (TRIAL_STEPS - 1) / TRIAL_STEPS
        return Speed(tokens / (times[TRIAL_STEPS] - times[1]), most_memory())


def _characters(example: Example) -> int:
    return len(example.input) + len(example.target)


def _trial(task: TrainingTask, rows: int) -> Task:
    """The longest micro-batch of a sample of `task`, after as many examples drawn."""
    data = task.load()
    sample = draw(data.train, SAMPLE, seed=0)
    longest = tuple(sorted(sample, key=_characters, reverse=True)[:rows])
    return replace(data, train=(*sample[:rows], *longest), validation=longest)


def most_memory() -> int | None:
    """The peak memory of this process, or of its GPU, in bytes; None if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    status = Path("/proc/self/status")  # getrusage tells a new process what its parent held
    if not status.is_file():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="ascii"), re.M)
    return 1024 * int(found[1]) if found else None
