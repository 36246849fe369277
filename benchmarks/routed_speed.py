"""A routed model beside its base: prefill, one linear layer, decoding; and beside a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bench import Bench, Sizes
from findings import Finding, at_least, at_most, row
from floors import Work
from measuring import Timing, ratio, side_by_side
from phatgoose.base import twin
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.phatgoose import Phatgoose, standardise
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.routing.stacks import SiteStack
from phatgoose.sites import Site
from phatgoose.tasks.batching import contiguous_head

__all__ = ["decoder", "prefill", "random_layer"]

TARGETS = {  # at few and many experts, in bfloat16 and in float32
    ("prefill", "bfloat16"): (1.7, 2.2),
    ("prefill", "float32"): (1.3, 1.5),
    ("linear", "bfloat16"): (1.35, 1.6),
    ("linear", "float32"): (1.2, 1.3),
    ("decoding", "bfloat16"): (1.6, 1.8),
    ("decoding", "float32"): (1.3, 1.4),
}


@row("prefill", "prefill, routed / base")
def measure_prefill(bench: Bench) -> Iterator[Finding]:
    """Logits of the last position for a batch of prompts without padding."""
    sizes = bench.sizes
    few, many = sizes.pools
    lora = PeftModel.from_pretrained(
        twin(bench.base).model, bench.experts(1)[0], autocast_adapter_dtype=False
    )
    batch = bench.prompts(*sizes.prefill)
    timings = side_by_side(
        {
            "base": prefill(bench.base.model, batch),
            "peft": prefill(lora, batch),
            "few": prefill(bench.routed(few), batch),
            "many": prefill(bench.routed(many), batch),
            "ends": prefill(bench.routed(many, at_ends=True), batch),
        },
        sizes.rounds,
    )
    work = Work.of(bench.base.model, sizes.rank)
    base = work.base(1 / sizes.prefill[1])
    what = f"{sizes.base}, {sizes.prefill[0]} × {sizes.prefill[1]} tokens"
    note = f"base {timings['base'].median * 1e3:.0f} ms"
    targets = TARGETS["prefill", sizes.dtype]
    for name, count, target in zip(("few", "many"), sizes.pools, targets, strict=True):
        yield Finding.of(
            f"{what}, E = {count}",
            ratio(timings[name], timings["base"]),
            target=at_most(target),
            floor=1 + work.routed(count, sizes.k) / base,
            note=note,
            details=_medians(timings),
        )
    yield Finding.of(
        f"{what}, E = {many}, which act on the last {sizes.tail} tokens",
        ratio(timings["ends"], timings["base"]),
        target=at_most(1.05),
        floor=1 + work.routed(many, sizes.k) * sizes.tail / sizes.prefill[1] / base,
    )
    yield Finding.of(
        f"{what}, one PEFT LoRA, not merged",
        ratio(timings["peft"], timings["base"]),
        floor=1 + work.lora / base,
        note="for comparison; an earlier measurement: 1.15",
    )


@row("linear", "one linear layer, routed / base")
def measure_linear(bench: Bench) -> Iterator[Finding]:
    """One layer at T5-XL's sizes."""
    sizes = bench.sizes
    few = sizes.pools[0]
    for n, d in sizes.linears:
        u = torch.randn(sizes.linear_tokens, n, dtype=sizes.torch_dtype)
        layers = {count: random_layer(n, d, count, sizes) for count in sizes.pools}
        contenders = {"base": _applied(layers[few].base, u)}
        contenders |= {str(count): _applied(layer, u) for count, layer in layers.items()}
        timings = side_by_side(contenders, sizes.rounds, calls=sizes.calls)
        work = Work.at([layers[few].site], sizes.rank)
        for count, target in zip(sizes.pools, TARGETS["linear", sizes.dtype], strict=True):
            yield Finding.of(
                f"{n}→{d}, {sizes.linear_tokens} tokens, E = {count}",
                ratio(timings[str(count)], timings["base"]),
                target=at_most(target),
                floor=1 + work.routed(count, sizes.k) / work.base(),
                note=f"base {timings['base'].median * 1e3:.1f} ms",
                details=_medians(timings),
            )


@row("decoding", "decoding, routed / base")
def measure_decoding(bench: Bench) -> Iterator[Finding]:
    """Time per token with a KV cache, one prompt."""
    sizes = bench.sizes
    few, many = sizes.pools
    models = {"base": bench.base.model, str(few): bench.routed(few), str(many): bench.routed(many)}
    prompt = bench.prompts(1, sizes.decoded_after)
    timings = side_by_side(
        {name: decoder(model, prompt, sizes.decoded) for name, model in models.items()},
        sizes.rounds,
    )
    work = Work.of(bench.base.model, sizes.rank)
    for count, target in zip(sizes.pools, TARGETS["decoding", sizes.dtype], strict=True):
        yield Finding.of(
            f"{sizes.base}, batch 1, {sizes.decoded} tokens, E = {count}",
            ratio(timings[str(count)], timings["base"]),
            target=at_most(target),
            floor=1 + work.routed(count, sizes.k) / work.base(1),
            note=f"base {timings['base'].median / sizes.decoded * 1e3:.1f} ms a token",
            details=_medians(timings),
        )


@row("reference", "a loop over experts / routed, decoding")
def measure_reference(bench: Bench) -> Iterator[Finding]:
    """The kernel `reference`, which computes every expert as the released code does."""
    sizes = bench.sizes
    many, tokens = sizes.pools[-1], sizes.decoded_by_reference
    prompt = bench.prompts(1, 2)  # the loop reads the prompt too, outside the clock
    timings = side_by_side(
        {
            "loop": decoder(bench.routed(many, kernel="reference"), prompt, tokens),
            "routed": decoder(bench.routed(many), prompt, tokens),
        },
        sizes.rounds,
    )
    work = Work.of(bench.base.model, sizes.rank)
    base = work.base(1)
    yield Finding.of(
        f"{sizes.base}, batch 1, {tokens} tokens, E = {many}",
        ratio(timings["loop"], timings["routed"]),
        target=at_least(30),
        floor=(base + work.dense(many)) / (base + work.routed(many, sizes.k)),
        note="the floor is the ratio of multiply-adds",
        details=_medians(timings),
    )


def prefill(model: PreTrainedModel | PeftModel, batch: dict[str, Tensor]) -> Callable[[], object]:
    """An action: the logits of the last position, as our server and evaluation compute them.

    Else torch copies the output matrix once per row. That costs the same with and without routing,
    so it would hide what routing adds.
    """

    @torch.inference_mode()
    def action() -> Tensor:
        with contiguous_head(model):
            logits: Tensor = model(**batch, use_cache=False, logits_to_keep=1).logits
        return logits

    return action


def decoder(model: PreTrainedModel, prompt: dict[str, Tensor], tokens: int) -> Callable[[], object]:
    """An action: the next `tokens` tokens, greedily, the prompt's keys and values being there.

    They are computed once, outside the action, and cut back to the prompt after it.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = first.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def action() -> None:
        token = start
        for _ in range(tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        cache.crop(-tokens)

    return action


def random_layer(n: int, d: int, experts: int, sizes: Sizes) -> RoutedLinear:
    """A linear layer [n] to [d] without bias, routed among random experts by random gates."""
    generator, rank, dtype = torch.Generator().manual_seed(0), sizes.rank, sizes.torch_dtype

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    base = nn.Linear(n, d, bias=False, dtype=dtype)
    loras = LoraStack(normal(experts, rank, n), normal(experts, rank, d))
    stack = SiteStack(torch.arange(experts), {"lora": loras})
    gates = standardise(torch.randn(experts, n, generator=generator))
    table = {"vectors": gates}
    router = SiteRouter(Phatgoose(k=sizes.k), "layer", torch.arange(experts), experts, table)
    router.to(dtype)
    layer = RoutedLinear(base, Site("layer", n, d, "decoder"), stack, router)
    return layer.requires_grad_(False)


def _applied(layer: nn.Module, u: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def action() -> Tensor:
        y: Tensor = layer(u)
        return y

    return action


def _medians(timings: dict[str, Timing]) -> dict[str, object]:
    return {"seconds": {name: timing.median for name, timing in timings.items()}}
