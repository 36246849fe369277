"""Beside PEFT's own token routing, Arrow, on the same experts.

PEFT computes every expert's output for every token. Loading many experts into a whole model takes
it many minutes, since each looks at all those before it; so its model is made with one expert by
`create_arrow_model`, and the others are put where it would have put them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import ArrowConfig, create_arrow_model
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import phatgoose as pg
from bench import Bench
from findings import Finding, row
from measuring import side_by_side
from phatgoose.base.identity import twin
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from routed_speed import prefill

MOST_ROUNDS = 2  # a pass of PEFT's takes up to a minute


@row("arrow", "PEFT's Arrow / routed")
def measure_arrow(bench: Bench) -> Iterator[Finding]:
    """The time of a prefill; both route by Arrow."""
    sizes = bench.sizes
    for count in sizes.pools:
        pool = pg.Pool.open(bench.experts(count))
        models = {
            "peft": arrow_of_peft(twin(bench.base).model, bench.experts(count), sizes.k),
            "routed": pg.compose(pool, twin(bench.base), router="arrow", k=sizes.k),
        }
        batch = bench.prompts(*sizes.prefill)
        contenders = {name: prefill(model, batch) for name, model in models.items()}
        with torch.inference_mode():
            for model in models.values():
                model(**bench.prompts(1, 2))  # sets up what is lazy
        timings = side_by_side(contenders, min(sizes.rounds, MOST_ROUNDS), warm=0)
        yield Finding.of(f"{sizes.prefilled}, E = {count}", timings, "peft", "routed")


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
