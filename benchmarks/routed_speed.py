"""A routed model beside its base: prefill, one linear layer, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bench import Bench, Sizes
from findings import Finding, row
from measuring import Timing, ratio, side_by_side
from phatgoose.base import twin
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.layers import RoutedLinear, SiteStack
from phatgoose.routing.routers.phatgoose import Phatgoose, standardise
from phatgoose.routing.routers.router import SiteRouter
from phatgoose.sites import Site, find_sites
from phatgoose.tasks.batching import contiguous_head


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
    what = f"{sizes.base}, {sizes.prefill[0]} × {sizes.prefill[1]} tokens"
    note = f"base {timings['base'].median * 1e3:.0f} ms"
    for name, count in zip(("few", "many"), sizes.pools, strict=True):
        yield Finding.of(
            f"{what}, E = {count}",
            ratio(timings[name], timings["base"]),
            note=note,
            details=_medians(timings),
        )
    yield Finding.of(
        f"{what}, E = {many}, which act on the last {sizes.tail} tokens",
        ratio(timings["ends"], timings["base"]),
    )
    yield Finding.of(
        f"{what}, one PEFT LoRA, not merged",
        ratio(timings["peft"], timings["base"]),
    )


@row("growth", "prefill, routed / base, as the pool grows")
def measure_growth(bench: Bench) -> Iterator[Finding]:
    """As `prefill`, with experts that are made here."""
    sizes = bench.sizes
    batch = bench.prompts(*sizes.prefill)
    contenders = {"base": prefill(bench.base.model, batch)}
    for count in sizes.growing:
        contenders[str(count)] = prefill(random_model(bench, count), batch)
    timings = side_by_side(contenders, sizes.rounds)
    for count in sizes.growing:
        yield Finding.of(
            f"{sizes.base}, {sizes.prefill[0]} × {sizes.prefill[1]} tokens, E = {count}",
            ratio(timings[str(count)], timings["base"]),
            note=f"base {timings['base'].median * 1e3:.0f} ms",
            details=_medians(timings),
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
        for count in sizes.pools:
            yield Finding.of(
                f"{n}→{d}, {sizes.linear_tokens} tokens, E = {count}",
                ratio(timings[str(count)], timings["base"]),
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
    for count in sizes.pools:
        yield Finding.of(
            f"{sizes.base}, batch 1, {sizes.decoded} tokens, E = {count}",
            ratio(timings[str(count)], timings["base"]),
            note=f"base {timings['base'].median / sizes.decoded * 1e3:.1f} ms a token",
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
    base = nn.Linear(n, d, bias=False, dtype=sizes.torch_dtype)
    return _routed(
        base, Site("layer", n, d, "decoder"), _random_experts(n, d, experts, sizes), sizes
    )


def random_model(bench: Bench, experts: int) -> PreTrainedModel:
    """A twin of the base with random experts, of which blocks share some.

    So 1,000 fit into memory, and are still more than a cache holds until they are met again.
    """
    model: PreTrainedModel = twin(bench.base).model
    blocks = max(1, 1000 // experts)  # with experts of their own
    met: dict[str, int] = {}
    made: dict[tuple[str, int], tuple[LoraStack, Tensor]] = {}
    for name, site in find_sites(model).items():
        parent, _, leaf = name.rpartition(".")
        met[leaf] = met.get(leaf, -1) + 1
        key, n, d = (leaf, met[leaf] % blocks), site.in_features, site.out_features
        if key not in made:
            made[key] = _random_experts(n, d, experts, bench.sizes)
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, _routed(base, site, made[key], bench.sizes))
    return model


def _random_experts(n: int, d: int, experts: int, sizes: Sizes) -> tuple[LoraStack, Tensor]:
    generator, rank, dtype = torch.Generator().manual_seed(0), sizes.rank, sizes.torch_dtype

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    loras = LoraStack(normal(experts, rank, n), normal(experts, rank, d))
    return loras, standardise(torch.randn(experts, n, generator=generator))


def _routed(
    base: nn.Module, site: Site, made: tuple[LoraStack, Tensor], sizes: Sizes
) -> RoutedLinear:
    loras, gates = made
    numbers = torch.arange(len(gates))
    stack = SiteStack(numbers, {"lora": loras})
    router = SiteRouter(Phatgoose(k=sizes.k), site.name, numbers, len(gates), {"vectors": gates})
    router.to(sizes.torch_dtype)
    return RoutedLinear(base, site, stack, router).requires_grad_(False)


def _applied(layer: nn.Module, u: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def action() -> Tensor:
        y: Tensor = layer(u)
        return y

    return action


def _medians(timings: dict[str, Timing]) -> dict[str, object]:
    return {"seconds": {name: timing.median for name, timing in timings.items()}}
