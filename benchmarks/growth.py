"""Growth with the number of experts: the gate product, the LoRA part, and memory; with a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import Bench, Sizes
from findings import Finding, row
from floors import Work
from measuring import Timing, linear_fit, peak_memory, side_by_side
from phatgoose.routing.kernels import choose_kernel
from phatgoose.routing.layers import RoutedLinear
from routed_speed import random_layer

__all__ = ["measure_growth"]

PARTS = ("base", "gates", "lora", "routed")


@row("growth", "growth with E")
def measure_growth(bench: Bench) -> Iterator[Finding]:
    """One linear layer among 8 to 1024 experts, its parts alone and all of it."""
    sizes = bench.sizes
    width, tokens = sizes.growth_width, sizes.linear_tokens
    u = torch.randn(tokens, width, dtype=sizes.torch_dtype)
    medians: dict[str, list[float]] = {part: [] for part in PARTS}
    memory: dict[str, list[int]] = {"experts": [], "pass": []}
    for count in sizes.growth:
        layer = random_layer(width, width, count, sizes)
        timings = side_by_side(_parts(layer, u), sizes.rounds, calls=sizes.calls)
        for part, timing in timings.items():
            medians[part].append(timing.median)
        memory["experts"].append(sum(b.numel() * b.element_size() for b in layer.buffers()))
        memory["pass"].append(peak_memory(_first_pass, count, sizes).peak)
    yield from _findings(bench, medians, memory)


def _findings(
    bench: Bench, medians: dict[str, list[float]], memory: dict[str, list[int]]
) -> Iterator[Finding]:
    sizes = bench.sizes
    counts = [float(count) for count in sizes.growth]
    base = Timing(tuple(medians["base"])).median
    added = [
        routed - alone for routed, alone in zip(medians["routed"], medians["base"], strict=True)
    ]
    gates, _, straight = linear_fit(counts, medians["gates"])
    whole, _, _ = linear_fit(counts, added)
    lora, _, _ = linear_fit(counts, medians["lora"])
    site = random_layer(sizes.growth_width, sizes.growth_width, 1, sizes).site
    work = Work.at([site], sizes.rank)
    what = f"{sizes.growth_width}→{sizes.growth_width}, {sizes.linear_tokens} tokens"
    span = f"E = {sizes.growth[0]} … {sizes.growth[-1]}"
    yield Finding(
        f"{what}: slope of what routing adds / slope of the gate product, {span}",
        whole / gates,
        floor=1.0,
        note="1 was wanted",
        details={"E": sizes.growth, "seconds": medians, "bytes": memory},
    )
    yield Finding(
        f"{what}: gate product, per expert / base layer",
        gates / base,
        floor=work.inputs / work.base(),
        note=f"a straight line explains {straight:.3f} of the variance; linear was wanted",
    )
    yield Finding(
        f"{what}: LoRA part, slope / slope of the gate product",
        lora / gates,
        floor=0.0,
        note=f"{medians['lora'][0] * 1e3:.1f} ms at E = {sizes.growth[0]}, "
        f"{medians['lora'][-1] * 1e3:.1f} ms at E = {sizes.growth[-1]}; flat was wanted",
    )


def _parts(layer: RoutedLinear, u: Tensor) -> dict[str, Callable[[], object]]:
    """What a routed layer does, bit by bit, and at once as it does it."""

    def inferring(action: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(action)

    with torch.inference_mode():
        decision = layer.router(u)
        kernel = choose_kernel("auto", u, decision.experts, layer.A, layer.B)
    return {
        "base": inferring(lambda: layer.base(u)),
        "gates": inferring(lambda: layer.router(u)),
        "lora": inferring(lambda: kernel(u, decision.experts, decision.weights, layer.A, layer.B)),
        "routed": inferring(lambda: layer(u)),
    }


def _first_pass(experts: int, sizes: Sizes) -> Callable[[], object]:
    """An action in a process of its own: one pass, after one of two tokens."""
    width = sizes.growth_width
    layer = random_layer(width, width, experts, sizes)
    u = torch.randn(sizes.linear_tokens, width, dtype=sizes.torch_dtype)
    action = _parts(layer, u)["routed"]
    with torch.inference_mode():
        layer(u[:2])
    return action
