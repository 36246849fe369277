"""Beside PEFT's own token routing, Arrow, on the same experts: time and memory.

PEFT computes every expert's output for every token, and takes minutes to load many experts into a
whole model; so both are measured on the first blocks of the base (`Sizes.arrow_layers`). All blocks
have the same sizes, and what lies outside them weighs more the fewer there are: the ratios of the
whole model are not smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model
from peft.peft_model import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import phatgoose as pg
from bench import Bench, Sizes, twin
from findings import Finding, at_least, at_most, row
from floors import Work
from measuring import peak_memory, ratio, side_by_side
from routed_speed import prefill

__all__ = ["measure_arrow"]

TIMES, SHARE = {"few": 10, "many": 25}, 0.1


@row("arrow", "PEFT's Arrow / routed")
def measure_arrow(bench: Bench) -> Iterator[Finding]:
    """The time of a prefill, and the memory it takes on top of the loaded model's."""
    sizes = bench.sizes
    for target, count, layers in zip(TIMES.values(), sizes.pools, sizes.arrow_layers, strict=True):
        base = twin(bench.base, layers)
        work, head = Work.of(base.model, sizes.rank), 1 / sizes.prefill[1]
        theirs, ours = (load(bench, count, layers) for load in (_theirs, _ours))
        batch = bench.prompts(*sizes.prefill)
        timings = side_by_side(
            {"peft": prefill(theirs, batch), "routed": prefill(ours, batch)}, sizes.rounds
        )
        where = f"first {layers} of {bench.base.model.config.num_hidden_layers} blocks"
        what = f"{sizes.base}, {sizes.prefill[0]} × {sizes.prefill[1]} tokens, E = {count}"
        yield Finding.of(
            f"{what}: time",
            ratio(timings["peft"], timings["routed"]),
            target=at_least(target),
            floor=(work.base(head) + work.arrow_of_peft(count))
            / (work.base(head) + work.routed(count, sizes.k)),
            note=f"{where}; both route by Arrow; the floor is the ratio of multiply-adds",
            details={"seconds": {name: timing.median for name, timing in timings.items()}},
        )
        del theirs, ours
        peft, routed = (
            peak_memory(_first_prefill, load, sizes, bench.pools, count, layers)
            for load in (_theirs, _ours)
        )
        yield Finding(
            f"{what}: peak extra memory, routed / PEFT's",
            routed.peak / peft.peak,
            target=at_most(SHARE) if count == sizes.pools[-1] else None,
            note=f"{where}; {routed.peak / 1e6:.0f} and {peft.peak / 1e6:.0f} MB over the loaded "
            f"model's, the base's own activations among them",
            details={"bytes": {"routed": routed.peak, "peft": peft.peak}},
        )


def _theirs(bench: Bench, count: int, layers: int) -> PeftModel:
    """PEFT's Arrow model."""
    base = twin(bench.base, layers)
    paths = [str(path) for path in bench.experts(count, base, f"-{layers}-blocks")]
    config = ArrowConfig(top_k=bench.sizes.k, rng_seed=0)
    model = create_arrow_model(base.model, paths, config, autocast_adapter_dtype=False)
    return model.eval()


def _ours(bench: Bench, count: int, layers: int) -> PreTrainedModel:
    """The same experts routed by phatgoose's Arrow."""
    base = twin(bench.base, layers)
    pool = pg.Pool.open(bench.experts(count, base, f"-{layers}-blocks"))
    return pg.compose(pool, base, router="arrow", k=bench.sizes.k)


Load = Callable[[Bench, int, int], PeftModel | PreTrainedModel]


def _first_prefill(
    load: Load, sizes: Sizes, pools: Path, count: int, layers: int
) -> Callable[[], Tensor]:
    """An action in a process of its own: a prefill after a tiny one, which sets up what is lazy."""
    bench = Bench(sizes, pools)
    model = load(bench, count, layers)
    with torch.inference_mode():
        model(**bench.prompts(1, 2))
    return prefill(model, bench.prompts(*sizes.prefill))
