"""One routed linear on a GPU: the base alone, routed by torch's operations, routed by Triton.

    python benchmarks/gpu_kernels.py [--models t5-xl llama-7b] [--experts 8 36 166 1024]
        [--tokens 1 16 128 1024 4096] [--k 2] [--rank 16] [--dtype bfloat16] [--graphs]
        [--rounds 20] [--out benchmarks/results/gpu-kernels.json]

Times are medians of CUDA events in microseconds, after warming up. A routed linear is all that a
`RoutedLinear` adds to its base: scores, top k, softmax and the product. `torch` is the fastest of
the kernels concat, gather and grouped, each with torch's own scores and top k; `triton` what "auto"
takes; `one by one` and `in blocks` are its two bodies, from which LEAST_PAIRS of
`kernels.triton_gpu` follows. With --graphs every way is captured in a CUDA graph, which
leaves out the time of launching and shows that none of it waits for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from phatgoose.experts.kinds.kind import is_one_call
from phatgoose.routing.kernels.choice import KERNELS, Kernel
from phatgoose.routing.kernels.plain import concat, gather, grouped
from phatgoose.routing.kernels.triton_gpu import (
    in_blocks,
    one_by_one,
    runs_on_triton,
    top_experts,
    triton_gpu,
)
from phatgoose.routing.routers.phatgoose import PhatgooseRouter, standardise
from phatgoose.routing.routers.router import highest
from report import circumstances

SHAPES = {  # inputs and outputs of the linears in a block
    "t5-xl": ((2048, 2048), (2048, 5120), (5120, 2048)),
    "llama-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
}
WARM_UPS, MOST_BYTES = 5, 8 * 2**30  # of one intermediate result; what needs more is left out
EPS = 1e-5


@dataclass(frozen=True)
class Row:
    """The times of one linear in microseconds; None was not measured."""

    model: str
    n: int
    d: int
    experts: int
    tokens: int
    base: float
    concat: float | None
    gather: float | None
    grouped: float | None
    triton: float | None
    one_by_one: float | None
    in_blocks: float | None

    @property
    def torch(self) -> float | None:
        """The fastest of torch's ways."""
        return min((t for t in (self.concat, self.gather, self.grouped) if t), default=None)


@dataclass(frozen=True)
class Linear:
    """A base weight, the experts at it, and tokens to pass through."""

    weight: Tensor
    A: Tensor
    B: Tensor
    router: PhatgooseRouter
    u: Tensor

    def passed(self) -> Tensor:
        """The base's output."""
        return functional.linear(self.u, self.weight)

    def routed_by_torch(self, kernel: Kernel) -> Callable[[], Tensor]:
        """What adds the experts' part by `kernel` and a top k of torch's operations."""

        def run() -> Tensor:
            affinities = self.router.affinities(self.u)
            experts = highest(affinities, self.router.k)
            weights = affinities.gather(-1, experts).softmax(dim=-1)
            return self.passed() + kernel(self.u, experts, weights, self.A, self.B)

        return run

    def routed_by_triton(self, kernel: Kernel) -> Callable[[], Tensor]:
        """What adds the experts' part by `kernel` and Triton's top k."""

        def run() -> Tensor:
            experts, weights = top_experts(self.u, self.router.vectors, self.router.k, EPS)
            return self.passed() + kernel(self.u, experts, weights, self.A, self.B)

        return run


def make_linear(n: int, d: int, tokens: int, settings: argparse.Namespace, experts: int) -> Linear:
    """Random numbers of the sizes asked for, on the GPU."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(shape, device="cuda", dtype=settings.dtype)
        return numbers.mul_(shape[-1] ** -0.5)

    A, B = normal(experts, settings.rank, n), normal(experts, settings.rank, d)
    vectors = standardise(torch.randn(experts, n))
    router = PhatgooseRouter(vectors, settings.k, EPS).to("cuda", settings.dtype)
    u = torch.randn(tokens, n, device="cuda", dtype=settings.dtype)
    return Linear(normal(d, n), A, B, router, u)


def ways_of(linear: Linear) -> dict[str, Callable[[], Tensor]]:
    """What to measure for `linear`, by its name in Row."""
    (tokens, _), (E, r, n), d = linear.u.shape, linear.A.shape, linear.B.shape[2]
    size, pairs = linear.u.itemsize, tokens * linear.router.k
    ways: dict[str, Callable[[], Tensor]] = {"base": linear.passed}
    if tokens * E * r * size <= MOST_BYTES:
        ways["concat"] = linear.routed_by_torch(concat)
    if pairs * r * (n + d) * size <= MOST_BYTES:
        ways["gather"] = linear.routed_by_torch(gather)
    if is_one_call(linear.A, linear.B):  # else it waits for the device
        ways["grouped"] = linear.routed_by_torch(grouped)
    if runs_on_triton(linear.u, linear.A, linear.B):
        for name, kernel in {"one_by_one": one_by_one, "in_blocks": in_blocks}.items():
            ways[name] = linear.routed_by_triton(kernel)
        ways["triton"] = linear.routed_by_triton(triton_gpu)
    return ways


def captured(run: Callable[[], Tensor]) -> Callable[[], object]:
    """`run` as one CUDA graph; it has to be warm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """The median time of one call on the device."""
    for _ in range(WARM_UPS):
        run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1000 for begin, end in marks)


def rows_of(settings: argparse.Namespace) -> Iterator[Row]:
    """Every combination that was asked for, measured; checks that all ways agree."""
    for model in settings.models:
        for n, d in SHAPES[model]:
            for experts in settings.experts:
                for tokens in settings.tokens:
                    linear = make_linear(n, d, tokens, settings, experts)
                    times = dict.fromkeys((*KERNELS, "one_by_one", "in_blocks"), None)
                    del times["reference"], times["native"]
                    times |= measured(linear, settings)
                    yield Row(model, n, d, experts, tokens, **times)


def measured(linear: Linear, settings: argparse.Namespace) -> dict[str, float]:
    """The time of each way, all of which must come to the same numbers."""
    ways = ways_of(linear)
    wanted = ways["concat" if "concat" in ways else "gather"]().float()
    slack = 8 * torch.finfo(linear.u.dtype).eps * float(wanted.abs().max())
    times = {}
    for name, run in ways.items():
        right = ((run().float() - wanted).abs() <= slack).all(dim=-1)
        off = int((~right).sum())  # one token in a thousand may have two experts of equal score
        if name != "base" and off > len(right) // 1000:
            sys.exit(f"{name} is wrong for {off} of {len(right)} tokens at {linear.A.shape}.")
        times[name] = microseconds(captured(run) if settings.graphs else run, settings.rounds)
    return times


def table_line(row: Row) -> str:
    """Times in µs, and those of torch and Triton over the base's."""
    cells = [row.base, row.torch, row.triton, row.one_by_one, row.in_blocks]
    times = "".join(f"{'-' if cell is None else format(cell, '.1f'):>11}" for cell in cells)
    ratios = "".join(
        f"{'-' if cell is None else format(cell / row.base, '.2f'):>8}" for cell in cells[1:3]
    )
    sizes = f"{row.model:>9}{row.n:>7}{row.d:>7}{row.experts:>6}{row.tokens:>6}"
    return sizes + times + ratios


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 36, 166, 1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--graphs", action="store_true", help="capture every way in a CUDA graph")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu-kernels.json"))
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    settings = arguments()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py measures on a GPU, and torch finds none (torch.cuda) here.")
    name = torch.cuda.get_device_name()
    facts = {"device": name, "torch": torch.__version__, "commit": circumstances()["commit"]}
    facts |= {key: str(value) for key, value in vars(settings).items()}
    settings.dtype = getattr(torch, settings.dtype)
    print(f"{name}, torch {torch.__version__}, {settings.dtype}, k {settings.k}; times in µs")
    heads = ["base", "torch", "triton", "one by one", "in blocks"]
    print("    model      n      d     E     T" + "".join(f"{head:>11}" for head in heads), end="")
    print("  torch/  triton/base")
    rows = []
    with torch.no_grad():
        for row in rows_of(settings):
            print(table_line(row), flush=True)
            rows.append(asdict(row))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
