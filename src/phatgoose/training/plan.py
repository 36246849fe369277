"""What training a pool will cost: steps, tokens, parameters, memory, disk and time.

Nothing is trained and nothing downloaded, but for `Planner.measure`. With a frozen base, a trained
token takes 4 operations for each parameter of the linear layers that it passes: 2 forward, and 2
back through the activations. Validation and statistics go forward only. Left out are adapter and
gates (2 % of T5-XL's), attention scores, padding, the optimiser, reading data, and embeddings.
"""

from __future__ import annotations

import heapq
import math
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, T5Config

from ..base.fingerprint import dtype_name
from ..base.loading import choose_dtype, load_base, load_skeleton, load_tokenizer
from ..base.sites import find_sites
from ..config import FOUR_BITS, Formatting, GateTraining, Lora, Peft, Training
from ..errors import BaseModelError, ConfigError, TaskError
from ..experts.expert import MOST_EMBEDDINGS
from ..experts.kinds.registry import kind_for
from ..experts.readings import readings_size
from ..tasks.encoding import Encoder, TokenPair
from ..tasks.suites.registry import TrainingTask
from ..tasks.task import Example, Task, draw
from .modules import check_packed, parameters_at, placed_sites
from .train_expert import train_expert
from .trainer import TrainingCallback

SAMPLE = 200  # examples whose tokens are counted
TFLOPS = 100.0  # sustained by an A100- or H100-class GPU in bfloat16; assumed, not measured
OPERATIONS = 4  # for each parameter and trained token: see above
EMBEDDING_DIMS = 384  # of the default embedder, all-MiniLM-L6-v2
FLOAT32 = 4  # bytes
CHECKPOINT_COPIES = 3 * 3  # a parameter and AdamW's two moments; best, last, and the next one
TRAINABLE_COPIES = 4  # a parameter, its gradient and two moments
KEPT = 2  # times: norms, activation functions and rotations keep as much as the linears between
LOGIT_BYTES = 10  # of one logit: bfloat16, float32, its gradient
RUNTIME_BYTES = 600_000_000  # of torch, transformers and what they load
CARDS = (24, 40, 80)  # GB of GPUs that people have
USABLE = 0.95  # of a card: the driver and fragments take the rest
BYTES_OF_4_BITS = 0.52  # of a weight, with its scale: bitsandbytes' NF4, quantised twice
format_sizeof = tqdm.format_sizeof  # 1234 as 1.23k
TRIAL_STEPS = 3  # the first is a warm-up and isn't timed
T5_XL = T5Config(
    **{"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
KNOWN_BASES: dict[str, PreTrainedConfig] = {"google/t5-xl-lm-adapt": T5_XL}  # the paper's


@dataclass(frozen=True)
class PlannedTask:
    """What training one expert will cost.

    `examples` are the training examples, None if unknown; `is_bound` means that the data or the
    base's tokenizer aren't here, so that sequences count with the length to which they are cut.
    `tokens` include validation and statistics.
    """

    name: str
    source: str
    examples: int | None
    steps: int
    gate_steps: int
    tokens: int
    is_bound: bool
    seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What training a pool of experts of the kind `peft` will cost, task by task.

    `sites`, `expert_parameters` and `gate_parameters` are those of one expert, `working_bytes` its
    checkpoints while it trains, `memory_bytes` the memory of the process. `notes` state what was
    assumed, and what to do if this machine has less memory.
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
    notes: tuple[str, ...]

    def totals(self) -> dict[str, float]:
        """Sums over all experts; steps include the gates'."""
        names = ("steps", "tokens", "seconds", "disk_bytes")
        sums = {name: sum(getattr(task, name) for task in self.tasks) for name in names}
        return sums | {"steps": sums["steps"] + sum(task.gate_steps for task in self.tasks)}

    def seconds_on(self, workers: int) -> float:
        """How long one or more `workers` take: tasks in order, each to the first that is free."""
        free = [0.0] * workers
        for task in self.tasks:
            heapq.heapreplace(free, free[0] + task.seconds)
        return max(free)


class Speed(NamedTuple):
    """Trained tokens a second, without padding, and the peak memory if it was measured too."""

    tokens_per_second: float
    memory_bytes: int | None = None


class Planner:
    """Plans trainings of experts of `base` with these settings, at a `speed` or at `tflops`.

    Without either, TFLOPS are assumed. Raises BaseModelError when the base's config isn't on this
    machine (the paper's is built in), ConfigError when no site matches, a speed is not positive and
    finite, or the expert can't be trained on 4 bits.
    """

    def __init__(
        self,
        base: str,
        *,
        peft: Peft | None = None,
        training: Training | None = None,
        gate_training: GateTraining | None = None,
        formatting: Formatting | None = None,
        dtype: str = "auto",
        tflops: float | None = None,
        speed: Speed | None = None,
    ) -> None:
        for name, value in (("tflops", tflops), *(speed._asdict().items() if speed else ())):
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} is {value!r}, but must be above 0 and finite.")
        self.base, self.dtype, self.tflops, self.speed = base, dtype, tflops, speed
        self.peft, self.training = peft or Lora(), training or Training()
        self.gates, self.formatting = gate_training or GateTraining(), formatting or Formatting()
        check_packed(self.peft, packed=dtype == FOUR_BITS)
        self._model = _skeleton(base)
        self._sites = list(placed_sites(self._model, self.peft).values())
        self._expert = parameters_at(self._model, self.peft)
        self._gate = sum(site.in_features for site in self._sites)
        self._learnt = self._expert + (self._gate if self.gates.joint else 0)
        self._computed = choose_dtype(dtype)
        made = kind_for(self.peft).new_modules
        self._stored = made.dtype or self._computed
        self._adapter = made.copies * self._stored.itemsize * self._expert  # bytes of its files
        head: Any = self._model.get_output_embeddings()
        self._logits: tuple[int, ...] = (0, 0) if head is None else tuple(head.weight.shape)

    def plan(self, tasks: Sequence[TrainingTask]) -> Plan:
        """What training an expert on each task will cost, with the task's own micro-batch if any.

        Data on this machine are read, one dataset at a time; datasets on the Hub are not. Raises
        TaskError for a file that can't be used.
        """
        try:
            tokenizer = load_tokenizer(self.base, offline=True)
            encoder = Encoder.for_model(self._model, tokenizer, self.formatting)
        except BaseModelError:
            encoder = None
        planned, batches, unread = [], [], list[str]()
        for task in tqdm(tasks, desc="plan", unit="task", leave=False, disable=None):
            data = None
            try:
                if task.origin != "hub":
                    data = task.load().with_validation(self.training.seed)
            except TaskError as error:
                if task.origin == "file":
                    raise
                unread = unread or [f"A copy can't be read: {error}"]
            lengths = self._lengths(data, encoder)
            planned.append(self._task(task, data, lengths))
            batches.append((lengths, _rows(task.settings(self.training))))
        checkpoints = CHECKPOINT_COPIES * FLOAT32 * self._learnt
        measured = self.speed and self.speed.memory_bytes
        memory_notes = [] if measured else self._memory_notes(batches)
        return Plan(
            base=self.base,
            peft=kind_for(self.peft).name,
            dtype=dtype_name(self._stored),
            sites=len(self._sites),
            expert_parameters=self._expert,
            gate_parameters=self._gate,
            tasks=tuple(planned),
            working_bytes=checkpoints + self._adapter,
            memory_bytes=measured or self._memory(batches).total,
            notes=(*self._notes(planned), *memory_notes, *unread),
        )

    def _lengths(self, data: Task | None, encoder: Encoder | None) -> _Lengths:
        if data is None or encoder is None:
            limits = self.formatting
            return _Lengths([limits.max_input_tokens], [limits.max_target_tokens], is_bound=True)
        pairs = _pairs(encoder, draw(data.train, SAMPLE, self.training.seed))
        return _Lengths([len(pair.prompt) for pair in pairs], [len(pair.target) for pair in pairs])

    def _task(self, task: TrainingTask, data: Task | None, lengths: _Lengths) -> PlannedTask:
        gates = self.gates
        examples = task.entry.train_examples if data is None else len(data.train)
        training = self.training if examples is None else self.training.on(examples)
        gate_steps = 0 if gates.joint else gates.gate_steps
        trained = training.batch_size * (training.steps + gate_steps)
        most = training.eval_examples
        validated = most if data is None else min(most, len(data.validation))
        read = min(gates.statistics_examples, examples or gates.statistics_examples)
        forward = validated * math.ceil(training.steps / training.eval_every)
        forward += read * (gates.means + gates.readings)
        prompt, target = fmean(lengths.prompts), fmean(lengths.targets)
        vectors = self._gate * (1 + gates.means)
        vectors += readings_size(self._model.config) * gates.readings
        vectors += EMBEDDING_DIMS * min(MOST_EMBEDDINGS, read) * gates.embeddings
        return PlannedTask(
            name=task.name,
            source=task.entry.source or task.named,
            examples=examples,
            steps=training.steps,
            gate_steps=gate_steps,
            tokens=round((trained + forward) * (prompt + target)),
            is_bound=lengths.is_bound,
            seconds=(trained + forward / 2) * self._seconds(prompt, target),
            disk_bytes=self._adapter + FLOAT32 * vectors,
        )

    def _seconds(self, prompt: float, target: float) -> float:
        if self.speed is not None:
            return (prompt + target) / self.speed.tokens_per_second
        passed = {"encoder": 0, "decoder": 0}
        for site in find_sites(self._model).values():
            passed[site.stream] += site.in_features * site.out_features
        # Logits are computed for targets only; an encoder-decoder reads prompts in its encoder.
        operations = prompt * (passed["encoder"] or passed["decoder"])
        operations += target * (passed["decoder"] + math.prod(self._logits))
        return OPERATIONS * operations / (1e12 * (self.tflops or TFLOPS))

    def _memory(
        self,
        batches: Sequence[tuple[_Lengths, int]],
        most_rows: int | None = None,
        *,
        itemsize: int | None = None,
        packed: bool | None = None,
        most_tokens: int | None = None,
    ) -> Memory:
        """The memory of a process, without attention's probabilities, as settings make it.

        None are the settings; `packed` means 4 bits, `most_tokens` limits inputs.
        """
        itemsize = itemsize or self._computed.itemsize
        features = {"encoder": 0, "decoder": 0}
        for site in self._sites:
            features[site.stream] += site.in_features + site.out_features
        # An encoder-decoder reads prompts in its encoder.
        reading = features["encoder"] or features["decoder"]
        activations = [0]
        for lengths, rows in batches:
            size = min(rows, most_rows or rows)
            prompts = [min(prompt, most_tokens or prompt) for prompt in lengths.prompts]
            pairs = zip(prompts, lengths.targets, strict=True)
            longest = max(reading * prompt + features["decoder"] * each for prompt, each in pairs)
            kept = KEPT * itemsize * size * longest
            activations.append(kept + LOGIT_BYTES * self._logits[0] * size * max(lengths.targets))
        packed = self.dtype == FOUR_BITS if packed is None else packed
        base = base_bytes(self._model, itemsize, packed=packed)
        return Memory(base, TRAINABLE_COPIES * FLOAT32 * self._learnt, max(activations))

    def _memory_notes(self, batches: Sequence[tuple[_Lengths, int]]) -> list[str]:
        here, most = memory_here(), max((rows for _, rows in batches), default=1)
        parts = self._memory(batches)
        notes = [
            f"Memory is the peak in a training step, with micro_batch_size {most} and the longest "
            f"sequences of a sample: base {format_sizeof(parts.base)}B, activations "
            f"{format_sizeof(parts.activations)}B, expert and optimiser "
            f"{format_sizeof(parts.learnt)}B; --measure finds it."
        ]
        needs = {rows: self._memory(batches, rows).total for rows in range(most, 0, -1)}
        notes += [self._cards(needs)]
        if needs[most] > min(USABLE * CARDS[0] * 10**9, here or math.inf):
            notes += self._smaller(batches, parts.total)
        fitting = [rows for rows in needs if here is None or needs[rows] <= here]
        if fitting[:1] == [most]:
            return notes
        remedy = "cut inputs (max_input_tokens), choose bfloat16 or a smaller base"
        if fitting:
            needed = format_sizeof(needs[fitting[0]])
            remedy = f"with micro_batch_size {fitting[0]} it takes {needed}B"
        return [*notes, f"This machine has {format_sizeof(here or 0)}B of memory: {remedy}."]

    def _smaller(self, batches: Sequence[tuple[_Lengths, int]], now: int) -> list[str]:
        """The settings that need less memory than `now`, each with what it then takes."""
        half = max(1, self.formatting.max_input_tokens // 2)
        changes: dict[str, dict[str, Any]] = {
            "--micro-batch-size 1": {"most_rows": 1},
            "--dtype bfloat16": {"itemsize": torch.bfloat16.itemsize},
            "--load-in-4bit": {"packed": True, "itemsize": choose_dtype(FOUR_BITS).itemsize},
            f"--max-input-tokens {half}": {"most_tokens": half},
        }
        if not kind_for(self.peft).new_modules.on_packed:
            del changes["--load-in-4bit"]
        needs = {flag: self._memory(batches, **change).total for flag, change in changes.items()}
        able = {flag: need for flag, need in needs.items() if need < now}
        if not able:
            return []
        told = ", ".join(f"{flag} {format_sizeof(need)}B" for flag, need in able.items())
        every = {name: value for flag in able for name, value in changes[flag].items()}
        least = self._memory(batches, **every).total
        return [f"Settings that take less: {told}; together {format_sizeof(least)}B."]

    def _cards(self, needs: Mapping[int, int]) -> str:
        """What fits on GPUs of usual sizes; `needs` are bytes by micro-batch, the largest first."""
        most, told = max(needs), []
        for size in CARDS:
            fitting = (rows for rows, need in needs.items() if need <= USABLE * size * 10**9)
            rows = next(fitting, None)
            words = "is too small" if rows is None else f"fits micro_batch_size {rows}"
            told.append(f"{size} GB {'fits' if rows == most else words}")
        return f"GPUs: {', '.join(told)}."

    def _notes(self, planned: Sequence[PlannedTask]) -> list[str]:
        notes = []
        if bound := sum(task.is_bound for task in planned):
            notes.append(
                f"For {bound} of {len(planned)} tasks data or tokenizer aren't on this machine: "
                f"sequences count with the {self.formatting.max_input_tokens} + "
                f"{self.formatting.max_target_tokens} tokens to which they are cut."
            )
        if self.training.epochs is not None and any(task.examples is None for task in planned):
            notes.append(
                f"Where the number of examples isn't known, {self.training.steps} steps are "
                f"planned, whatever --epochs says."
            )
        if self.speed is not None:
            how = "measured here on a few steps" if self.speed.memory_bytes else "as given"
            speed = f"{self.speed.tokens_per_second:.4g} trained tokens a second, {how}"
        else:
            assumed = "" if self.tflops else ", assumed of an A100- or H100-class GPU in bfloat16"
            speed = f"{self.tflops or TFLOPS:g} TFLOP/s sustained{assumed}"
        return [*notes, f"Time is at {speed}."]

    def measure(self, tasks: Sequence[TrainingTask]) -> Speed:
        """The speed and peak memory of two micro-batches: one drawn, the longest of a sample.

        Raises TaskError when no task has its data on this machine, and what training raises.
        """
        here = [task for task in tasks if task.origin != "hub"]
        if not here:
            raise TaskError("No task has its data on this machine: no speed can be measured here.")
        base = load_base(self.base, dtype=self.dtype)
        encoder, times = Encoder.of(base, self.formatting), list[float]()
        trials = (
            _trial(task.load(), _rows(task.settings(self.training)), encoder) for task in here
        )
        task, _ = max(trials, key=lambda trial: trial[1])
        short = replace(
            self.training,
            steps=TRIAL_STEPS,
            epochs=None,
            eval_every=TRIAL_STEPS,
            batch_size=len(task.train),
            micro_batch_size=len(task.train) // 2,
        )
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as folder:
            expert = train_expert(
                base,
                task,
                out=Path(folder) / "trial",
                peft=self.peft,
                training=short,
                gate_training=replace(self.gates, gate_steps=1, embeddings=False),
                formatting=self.formatting,
                callback=TrainingCallback(on_steps=lambda _: times.append(time.perf_counter())),
            )
        tokens = expert.info.metrics["expert_tokens"] * (TRIAL_STEPS - 1) / TRIAL_STEPS
        return Speed(tokens / (times[TRIAL_STEPS] - times[1]), most_memory())


class Memory(NamedTuple):
    """Bytes of a process: the base, what is trained with its optimiser, and activations."""

    base: int
    learnt: int
    activations: int

    @property
    def total(self) -> int:
        return RUNTIME_BYTES + sum(self)


class _Lengths(NamedTuple):
    """Tokens of some prompts and targets; `is_bound` means the most there can be."""

    prompts: Sequence[int]
    targets: Sequence[int]
    is_bound: bool = False


def _skeleton(base: str) -> PreTrainedModel:
    try:
        return load_skeleton(base)
    except BaseModelError as error:
        if base in KNOWN_BASES:
            return load_skeleton(KNOWN_BASES[base])
        hint = "Nothing is downloaded here: have the base's config.json at hand."
        raise BaseModelError(f"{error} {hint}") from error


def base_bytes(model: PreTrainedModel, itemsize: int, *, packed: bool) -> int:
    """The memory of a base, of which `model` may be the skeleton; `packed` means 4 bits."""
    found = itemsize * sum(int(parameter.numel()) for parameter in model.parameters())
    linear = sum(site.in_features * site.out_features for site in find_sites(model).values())
    return found - round((itemsize - BYTES_OF_4_BITS) * linear) if packed else found


def _rows(training: Training) -> int:
    return min(training.micro_batch_size, training.batch_size)


def _pairs(encoder: Encoder, examples: Sequence[Example]) -> Sequence[TokenPair]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encoder.pairs(examples)


def _trial(task: Task, rows: int, encoder: Encoder) -> tuple[Task, int]:
    """The longest micro-batch of a sample of `task`, after as many examples drawn."""
    sample = draw(task.train, SAMPLE, seed=0)
    lengths = [pair.length for pair in _pairs(encoder, sample)]
    order = sorted(range(len(sample)), key=lambda row: -lengths[row])
    longest = tuple(sample[row] for row in order[: 2 * rows])
    train = (*sample[:rows], *longest[:rows])
    return replace(task, train=train, validation=longest), sum(lengths[r] for r in order[:rows])


def most_memory() -> int | None:
    """The peak memory of this process, or of its GPU, in bytes; None if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    try:  # rather than getrusage, which tells a new process what its parent held
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        if platform.system() != "Darwin":
            return None
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)
    return 1024 * int(found[1]) if found else None


def memory_here() -> int | None:
    """The memory of this machine, or of its GPU, in bytes; None if unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else None
