"""What the Triton programs must move and multiply, and the time that an H100 takes for it at best.

    python benchmarks/roofline.py

prints the tables of docs/performance.md. Nothing is measured and no GPU needed: the calls that
route are made with tensors without numbers, and what they would launch is noted down. A launch
moves every tensor that it is given once; of the factors those of experts that somebody chose, when
tokens choose at random. It takes as long as its bytes or its multiply-adds, whichever is longer,
so no time of starting it, no half-filled blocks and no cache are in this.

Glossary of `kernels.choice`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phatgoose.routing.kernels import triton_gpu as kernel

BANDWIDTH = 3.35e12  # bytes a second of an H100 SXM
TENSOR_CORES, PLAIN = 989e12 / 2, 67e12 / 2  # multiply-adds a second, bfloat16 and float32
K, RANK, EPS = 2, 16, 1e-5
POOLS = (36, 166)
PHASES = {"Prefill, 2,048 tokens": 2048, "Decoding, a batch of 16": 16}
BLOCKS = {  # linears of one block by (n, d), and how many inputs they share
    "T5-XL": {(2048, 2048): 4, (2048, 5120): 2, (5120, 2048): 1},
    "Llama-7B": {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1},
}
INPUTS = 4  # of a block's seven linears: q, k, v; o; gate, up; down
FREE = {"empty", "new_empty", "empty_like", "view", "split", "split_with_sizes", "_unsafe_view"}


@dataclass(frozen=True)
class Linear:
    """A routed linear layer and its tokens."""

    n: int
    d: int
    tokens: int
    experts: int

    @property
    def chosen_share(self) -> float:
        """The share of the experts that at least one token chose, at random."""
        return 1 - (1 - K / self.experts) ** self.tokens

    def tensors(self) -> tuple[Tensor, ...]:
        """y, u, vectors, A and B without numbers."""
        sizes = (
            (self.tokens, self.d),
            (self.tokens, self.n),
            (self.experts, self.n),
            (self.experts, RANK, self.n),
            (self.experts, RANK, self.d),
        )
        return tuple(torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)

    def products(self, program: str) -> int:
        """The multiply-adds of one of the programs."""
        pairs = self.tokens * K
        kinds = {
            "score": self.tokens * self.experts * self.n,
            "shrink": pairs * RANK * self.n,
            "expand": pairs * RANK * self.d,
        }
        return kinds.get(program.split("_")[0], 0)


@dataclass(frozen=True)
class Launch:
    """One launch, or several of one program together: bytes moved, multiply-adds, seconds."""

    program: str
    moved: float
    products: float
    seconds: float
    count: int = 1

    @classmethod
    def of(cls, program: str, moved: float, products: float, on_tensor_cores: bool) -> Launch:
        """The launch with the time that it takes at best."""
        speed = TENSOR_CORES if on_tensor_cores else PLAIN
        return cls(program, moved, products, max(moved / BANDWIDTH, products / speed))

    def times(self, count: int) -> Launch:
        """So many of it."""
        numbers = (self.moved * count, self.products * count, self.seconds * count)
        return Launch(self.program, *numbers, self.count * count)

    def plus(self, other: Launch) -> Launch:
        """Both, under the name of this one."""
        return replace(
            self,
            moved=self.moved + other.moved,
            products=self.products + other.products,
            seconds=self.seconds + other.seconds,
            count=self.count + other.count,
        )


class _Programs:
    """Stands for `triton_programs`: notes down what would be launched."""

    def __init__(self, linear: Linear, launches: list[Launch]) -> None:
        self.linear, self.launches = linear, launches

    def __getattr__(self, program: str) -> Any:
        return mock.MagicMock(**{"__getitem__.side_effect": lambda _: self._launcher(program)})

    def _launcher(self, program: str) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            tensors = {id(each): each for each in arguments if isinstance(each, Tensor)}
            moved = sum(self._moved(tensor) for tensor in tensors.values())
            if constants.get("ADDED"):  # the last is read and written
                moved += list(tensors.values())[-1].nbytes
            on_tensor_cores = program not in ("shrink_pair", "expand_token")
            products = self.linear.products(program)
            self.launches.append(Launch.of(program, moved, products, on_tensor_cores))

        return launch

    def _moved(self, tensor: Tensor) -> float:
        is_factor = tensor.dim() == 3
        return tensor.nbytes * (self.linear.chosen_share if is_factor else 1.0)


class _Operations(TorchDispatchMode):
    """Notes down what torch's own operations would launch."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            moved = sum(each.nbytes for each in (*args, made) if isinstance(each, Tensor))
            self.launches.append(Launch.of(f"torch.{name}", moved, 0, False))
        return made


def in_one_call(y: Tensor, u: Tensor, vectors: Tensor, A: Tensor, B: Tensor) -> None:
    """What a routed linear does beside its base."""
    kernel.add_routed(y, u, vectors, A, B, K, EPS)


def apart(y: Tensor, u: Tensor, vectors: Tensor, A: Tensor, B: Tensor) -> None:
    """What it does where its decisions are watched: choose, multiply, add."""
    y + kernel.triton_gpu(u, *kernel.top_experts(u, vectors, K, EPS), A, B)


def launches_of(way: Callable[..., None], linear: Linear) -> list[Launch]:
    """What `way` launches for `linear`, in order."""
    launches: list[Launch] = []

    @contextmanager
    def programs_for(_: Tensor) -> Iterator[_Programs]:
        yield _Programs(linear, launches)

    tensors = linear.tensors()
    patches = {"_programs_for": programs_for, "_takes": lambda *_: True}
    with mock.patch.multiple(kernel, **patches), _Operations(launches):
        way(*tensors)
    return launches


def base_of(linear: Linear) -> Launch:
    """The base's own product."""
    n, d, tokens = linear.n, linear.d, linear.tokens
    moved = 2 * (n * d + tokens * (n + d))
    return Launch.of("base", moved, tokens * n * d, on_tensor_cores=True)


@dataclass(frozen=True)
class Block:
    """All linears of one block of a model together: the base's, and launches by program."""

    base: Launch
    programs: dict[str, Launch]

    @classmethod
    def of(cls, way: Callable[..., None], model: str, experts: int, tokens: int) -> Block:
        """What `way` takes for a block of `model`."""
        base = Launch("base", 0, 0, 0, 0)
        programs: dict[str, Launch] = {}
        for (n, d), count in BLOCKS[model].items():
            linear = Linear(n, d, tokens, experts)
            base = base.plus(base_of(linear).times(count))
            for launch in launches_of(way, linear):
                name, several = launch.program, launch.times(count)
                programs[name] = programs[name].plus(several) if name in programs else several
        return cls(base, programs)

    @property
    def ratio(self) -> float:
        """Routed over base, at best."""
        return 1 + sum(each.seconds for each in self.programs.values()) / self.base.seconds

    @property
    def launches(self) -> int:
        """How many there are beside the base's."""
        return sum(each.count for each in self.programs.values())

    @property
    def launches_scored_together(self) -> int:
        """How many there would be if linears that share an input were scored together."""
        linears = self.base.count
        names = ("score_and_choose", "score_experts")
        scoring = sum(self.programs[name].count for name in names if name in self.programs)
        return self.launches - scoring * (linears - INPUTS) // linears


def table(tokens: int) -> str:
    """Markdown: bytes, multiply-adds and time of each program, and what they come to."""
    cases = [(model, experts) for model in BLOCKS for experts in POOLS]
    now = [Block.of(in_one_call, *case, tokens) for case in cases]
    before = [Block.of(apart, *case, tokens) for case in cases]
    heads = [f"{model}, E = {experts}" for model, experts in cases]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    lines.append(_line("base", [_cell(block.base) for block in now]))
    names = dict.fromkeys(name for block in now for name in block.programs)
    for name in sorted(names, key=lambda name: not name.startswith(("score", "choose"))):
        cells = [_cell(b.programs[name]) if name in b.programs else "" for b in now]
        lines.append(_line(f"`{name}`", cells))
    lines.append(_line("**routed / base at best**", [f"**{b.ratio:.2f}**" for b in now]))
    lines.append(_line("the same, watched", [f"{b.ratio:.2f}" for b in before]))
    counts = [f"{b.base.count} + {b.launches}" for b in now]
    lines.append(_line("launches: base + routing", counts))
    lines.append(_line("the same, watched", [f"{b.base.count} + {b.launches}" for b in before]))
    together = [f"{b.base.count} + {b.launches_scored_together}" for b in now]
    lines.append(_line("if linears of one input were scored together", together))
    return "\n".join(lines)


def _cell(launch: Launch) -> str:
    by_bytes = math.isclose(launch.seconds, launch.moved / BANDWIDTH)
    time = f"{launch.seconds * 1e6:.1f} µs {'b' if by_bytes else 'm'}"
    return f"{launch.moved / 1e6:.1f} MB, {launch.products / 1e9:.1f} G, {time}"


def _line(head: str, cells: list[str]) -> str:
    return f"| {head} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for phase, tokens in PHASES.items():
        print(f"{phase}:\n\n{table(tokens)}\n")
