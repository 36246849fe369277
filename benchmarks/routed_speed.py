"""A routed model beside its base: prefill, one linear layer, decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bench import Bench, Sizes
from findings import Finding, row
from measuring import Timing, side_by_side
from phatgoose.base.identity import twin
from phatgoose.experts.lora import LoraStack
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.phatgoose import Phatgoose, standardise
from phatgoose.routing.routers.router import RouterAtSite
from phatgoose.routing.stacks import SiteStack
from phatgoose.sites import Site, find_sites
from phatgoose.tasks.batching import contiguous_head


@row("prefill", "prefill, routed / base")
def measure_prefill(bench: Bench) -> Iterator[Finding]:
    """Logits of the last position for a batch of prompts without padding."""
    sizes, many = bench.sizes, bench.sizes.pools[-1]
    lora = PeftModel.from_pretrained(
        twin(bench.base).model, bench.experts(1)[0], autocast_adapter_dtype=False
    )
    models = {"base": bench.base.model, "peft": lora}
    models |= {str(count): bench.routed(count) for count in sizes.pools}
    models |= {"ends": bench.routed(many, at_ends=True)}
    timings = prefill_times(bench, models)
    yield from beside_base(sizes.prefilled, timings, sizes.pools)
    ends = f"E = {many}, which act on the last {sizes.tail} tokens"
    for name, case in (("ends", ends), ("peft", "one PEFT LoRA, not merged")):
        yield Finding.of(f"{sizes.prefilled}, {case}", timings, name, "base")


@row("growth", "prefill, routed / base, as the pool grows")
def measure_growth(bench: Bench) -> Iterator[Finding]:
    """As `prefill`, with experts that are made here."""
    sizes = bench.sizes
    models = {str(count): random_model(bench, count) for count in sizes.growing}
    timings = prefill_times(bench, {"base": bench.base.model, **models})
    yield from beside_base(sizes.prefilled, timings, sizes.growing)


@row("linear", "one linear layer, routed / base")
def measure_linear(bench: Bench) -> Iterator[Finding]:
    """One layer at T5-XL's sizes."""
    sizes = bench.sizes
    for n, d in sizes.linears:
        u = torch.randn(sizes.linear_tokens, n, dtype=sizes.torch_dtype)
        layers = {str(count): random_layer(n, d, count, sizes) for count in sizes.pools}
        layers = {"base": layers[str(sizes.pools[0])].base, **layers}
        contenders = {name: _applied(layer, u) for name, layer in layers.items()}
        timings = side_by_side(contenders, sizes.rounds, calls=sizes.calls)
        yield from beside_base(f"{n}→{d}, {sizes.linear_tokens} tokens", timings, sizes.pools)


@row("decoding", "decoding, routed / base")
def measure_decoding(bench: Bench) -> Iterator[Finding]:
    """Time per token with a KV cache, one prompt."""
    sizes = bench.sizes
    models = {"base": bench.base.model, **{str(c): bench.routed(c) for c in sizes.pools}}
    prompt = bench.prompts(1, sizes.decoded_after)
    decoders = {name: decoder(model, prompt, sizes.decoded) for name, model in models.items()}
    timings = side_by_side(decoders, sizes.rounds)
    case = f"{sizes.base}, batch 1, {sizes.decoded} tokens"
    yield from beside_base(case, timings, sizes.pools, tokens=sizes.decoded)


def beside_base(
    case: str, timings: dict[str, Timing], counts: Sequence[int], tokens: int = 0
) -> Iterator[Finding]:
    """The times with each count of experts beside the base's, which is noted (by token)."""
    each = timings["base"].median * 1e3 / (tokens or 1)
    note = f"base {each:.4g} ms{' a token' if tokens else ''}"
    for count in counts:
        yield Finding.of(f"{case}, E = {count}", timings, str(count), "base", note=note)


def prefill_times(bench: Bench, models: dict[str, PreTrainedModel]) -> dict[str, Timing]:
    """What a prefill of the same batch takes with each of `models`."""
    batch = bench.prompts(*bench.sizes.prefill)
    contenders = {name: prefill(model, batch) for name, model in models.items()}
    return side_by_side(contenders, bench.sizes.rounds)


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
    names = [str(z) for z in range(len(gates))]
    at_site = RouterAtSite(Phatgoose(k=sizes.k), site.name, numbers, names, {"vectors": gates})
    at_site.to(sizes.torch_dtype)
    return RoutedLinear(base, site, stack, at_site).requires_grad_(False)


def _applied(layer: nn.Module, u: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def action() -> Tensor:
        y: Tensor = layer(u)
        return y

    return action
