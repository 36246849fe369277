"""Beside PEFT's own token routing, Arrow, on the same experts: time and memory.

PEFT computes every expert's output for every token. Loading many experts into a whole model takes
it many minutes, since each looks at all those before it; so its model is made with one expert by
`create_arrow_model`, and the others are put where it would have put them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import phatgoose as pg
from bench import Bench, Sizes
from findings import Finding, at_least, at_most, row
from floors import Work
from measuring import peak_memory, ratio, side_by_side
from phatgoose.base import twin
from phatgoose.experts.peft_files import ADAPTER_WEIGHTS
from routed_speed import prefill

__all__ = ["arrow_of_peft", "measure_arrow"]

TIMES, SHARE = {"few": 10, "many": 25}, 0.1
MOST_ROUNDS = 2  # a pass of PEFT's takes up to a minute


@row("arrow", "PEFT's Arrow / routed")
def measure_arrow(bench: Bench) -> Iterator[Finding]:
    """The time of a prefill, and the memory it takes on top of the loaded model's."""
    sizes = bench.sizes
    work, head = Work.of(bench.base.model, sizes.rank), 1 / sizes.prefill[1]
    for name, count in zip(TIMES, sizes.pools, strict=True):
        contenders = {
            "peft": _warm_prefill(_theirs(bench, count), bench),
            "routed": _warm_prefill(_ours(bench, count), bench),
        }
        timings = side_by_side(contenders, min(sizes.rounds, MOST_ROUNDS), warm=0)
        what = f"{sizes.base}, {sizes.prefill[0]} × {sizes.prefill[1]} tokens, E = {count}"
        yield Finding.of(
            f"{what}: time",
            ratio(timings["peft"], timings["routed"]),
            target=at_least(TIMES[name]),
            floor=(work.base(head) + work.arrow_of_peft(count))
            / (work.base(head) + work.routed(count, sizes.k)),
            note="both route by Arrow; the floor is the ratio of multiply-adds",
            details={"seconds": {name: timing.median for name, timing in timings.items()}},
        )
        contenders.clear()
        peft, routed = (
            peak_memory(_first_prefill, load, sizes, bench.pools, count)
            for load in (_theirs, _ours)
        )
        yield Finding(
            f"{what}: peak extra memory, routed / PEFT's",
            routed.peak / peft.peak,
            target=at_most(SHARE) if count == sizes.pools[-1] else None,
            note=f"{routed.peak / 1e6:.0f} and {peft.peak / 1e6:.0f} MB over the loaded model's, "
            f"the base's own activations among them",
            details={"bytes": {"routed": routed.peak, "peft": peft.peak}},
        )


def _theirs(bench: Bench, count: int) -> PeftModel:
    """PEFT's Arrow model."""
    return arrow_of_peft(twin(bench.base).model, bench.experts(count), bench.sizes.k)


def arrow_of_peft(model: PreTrainedModel, experts: list[Path], k: int) -> PeftModel:
    """What `create_arrow_model` makes of `experts` that have the same sites, rank and scale.

    Their factors keep the type that they are stored in.
    """
    first = [str(experts[0])]
    config = ArrowConfig(top_k=k, rng_seed=0)
    routed = create_arrow_model(model, first, config, autocast_adapter_dtype=False)
    layers = [
        (name, layer) for name, layer in routed.named_modules() if isinstance(layer, LoraLayer)
    ]
    (known,) = config.task_adapter_names
    for z in range(1, len(experts)):
        _add(layers, known, f"task_{z}", load_file(experts[z] / ADAPTER_WEIGHTS))
    for _, layer in layers:
        for router in layer.lora_arrow.values():
            router.task_adapter_names = [f"task_{z}" for z in range(len(experts))]
    return routed.eval()


def _add(
    layers: list[tuple[str, LoraLayer]], known: str, name: str, tensors: dict[str, Tensor]
) -> None:
    """Enter one more expert into each layer, beside the one called `known` and alike."""
    for site, layer in layers:
        for factor, modules in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            weight = tensors[f"{site}.{factor}.weight"]
            linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            modules[name] = linear
        layer.lora_dropout[name] = nn.Identity()
        for settings in (
            *(layer.r, layer.lora_alpha, layer.scaling),
            *(layer.use_rslora, layer.use_dora, layer.lora_bias),
        ):
            settings[name] = settings[known]


def _ours(bench: Bench, count: int) -> PreTrainedModel:
    """The same experts routed by phatgoose's Arrow."""
    pool = pg.Pool.open(bench.experts(count))
    return pg.compose(pool, twin(bench.base), router="arrow", k=bench.sizes.k)


def _warm_prefill(model: PreTrainedModel | PeftModel, bench: Bench) -> Callable[[], object]:
    """An action: the row `prefill`'s, after a tiny one here, which sets up what is lazy."""
    with torch.inference_mode():
        model(**bench.prompts(1, 2))
    return prefill(model, bench.prompts(*bench.sizes.prefill))


Load = Callable[[Bench, int], PeftModel | PreTrainedModel]


def _first_prefill(load: Load, sizes: Sizes, pools: Path, count: int) -> Callable[[], object]:
    """An action in a process of its own."""
    bench = Bench(sizes, pools)
    return _warm_prefill(load(bench, count), bench)
