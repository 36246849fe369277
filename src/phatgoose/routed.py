"""The routed model: a transformers model whose linear layers pick their experts for every token.

W u + sum over z in E_t of w_z B_z A_z u                                     (METHOD section 4)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import check_fit
from .bases import Base, BaseReference, fingerprint, load_base
from .config import Routing
from .errors import RoutingError, WrongBaseError
from .kernels import choose_kernel
from .pool import Pool, SiteStack
from .recording import Recording, Watcher
from .routers import make_router, router_vectors, warn_of_untrained
from .sites import ROUTED, Site, TokenMasks, WrappedLinear, find_sites, replace_module

__all__ = ["Composition", "RoutedLinear", "compose", "composition_of", "detach", "record"]


class RoutedLinear(WrappedLinear):
    """A linear layer (of any make) with a pool of experts and a router.

    Experts and router are buffers that stay out of the model's state dict.
    """

    A: Tensor
    B: Tensor
    experts: Tensor

    def __init__(
        self, base: nn.Module, site: Site, stack: SiteStack, router: nn.Module, kernel: str
    ) -> None:
        super().__init__(base, site.in_features, site.out_features)
        self.site = site
        self.register_buffer("A", stack.A, persistent=False)
        self.register_buffer("B", stack.B, persistent=False)
        self.register_buffer("experts", stack.experts, persistent=False)
        self.router = router
        self.kernel = kernel
        self.masks = TokenMasks()
        self.watcher: Watcher | None = None

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]."""
        y: Tensor = self.base(u)
        tokens = u.reshape(-1, u.shape[-1])
        decision = self.router(tokens)
        real = self.masks.real_tokens(u, self.site.stream)
        weights = decision.weights
        if real is not None:
            weights = weights * real.reshape(-1, 1)
        if self.watcher is not None:
            self.watcher(self.site, self.experts[decision.experts], weights, real, u.shape[:-1])
        kernel = choose_kernel(
            self.kernel, len(tokens), decision.experts.shape[1], len(self.experts)
        )
        delta = kernel(tokens.to(self.A.dtype), decision.experts, weights, self.A, self.B)
        return y + delta.view(*u.shape[:-1], self.out_features).to(y.dtype)


@dataclass
class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site.
    """

    base: BaseReference
    tokenizer: PreTrainedTokenizerBase | None
    experts: tuple[str, ...]
    records: list[dict[str, Any]]
    routing: Routing
    layers: dict[str, RoutedLinear]
    masks: TokenMasks = field(default_factory=TokenMasks)


def compose(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    router: str = "phatgoose",
    k: int = 2,
    kernel: str = "auto",
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    eps: float = 1e-5,
) -> PreTrainedModel:
    """The base model of `pool` with routed linears: still a PreTrainedModel, changed in place.

    `base` is a name, a loaded `Base` or a transformers model; None loads the one the pool was
    trained on. `router` is one of `phatgoose.routers.ROUTERS`; `k` experts act per token, lowered
    with a warning when the pool has fewer. `keep` and `leave_out` select experts by name. `kernel`
    is "auto" or a name in `phatgoose.kernels.KERNELS`. Undo with `detach`.

    Raises WrongBaseError when the base is not the experts' own, ExpertError when one doesn't fit
    it, PoolError for unknown experts or missing vectors, ConfigError for an unknown router or
    kernel, RoutingError when the base is routed already.
    """
    pool = pool if isinstance(pool, Pool) else Pool.open(pool)
    pool = pool.select(keep, leave_out)
    routing = Routing(router=router, k=k, kernel=kernel, eps=eps)
    choose_kernel(kernel, 1, 1, 1)
    vectors = {name: router_vectors(pool, name, router) for name in pool.sites}
    if k > len(pool) and router != "merged":
        warnings.warn(
            f"k is {k}, but the pool has {len(pool)} experts; k is lowered.", stacklevel=2
        )
    found = resolve_base(base, pool.base)
    check_fingerprint(pool.base, found.reference)
    sites = find_sites(found.model)
    for expert in pool.experts:
        check_fit(expert.name, expert.lora, sites)
    layers = {}
    for name in pool.sites:
        original = found.model.get_submodule(name)
        dtype = original.weight.dtype if original.weight.is_floating_point() else found.model.dtype
        stack = pool.stack(name, dtype, original.weight.device)
        module = make_router(vectors[name], len(stack.experts), routing).to(original.weight.device)
        layers[name] = RoutedLinear(original, sites[name], stack, module, kernel)
    warn_of_untrained(pool, router, vectors)
    parts = Composition(
        base=found.reference,
        tokenizer=found.tokenizer,
        experts=pool.names,
        records=pool.records(),
        routing=routing,
        layers=layers,
    )
    return install(found.model, parts)


def install(model: PreTrainedModel, parts: Composition) -> PreTrainedModel:
    """Put the routed layers of `parts` into `model` and return it."""
    for name, layer in parts.layers.items():
        layer.masks = parts.masks
        replace_module(model, name, layer)
    parts.masks.attach(model)
    setattr(model, ROUTED, parts)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base model again, exactly as it was before `compose`, which changed it in place.

    Raises RoutingError when `model` is not routed.
    """
    parts = composition_of(model)
    parts.masks.detach()
    for name, layer in parts.layers.items():
        replace_module(model, name, layer.base)
    delattr(model, ROUTED)
    return model


def composition_of(model: PreTrainedModel) -> Composition:
    """What `model` was composed of. Raises RoutingError when it is not routed."""
    parts = getattr(model, ROUTED, None)
    if not isinstance(parts, Composition):
        raise RoutingError("This model is not routed; make one with compose(pool).")
    return parts


@contextmanager
def record(model: PreTrainedModel) -> Iterator[Recording]:
    """A `Recording` that fills with every routing decision of `model` while the context is open.

    Raises RoutingError when `model` is not routed.
    """
    parts = composition_of(model)
    recording = Recording(parts.experts)
    for layer in parts.layers.values():
        layer.watcher = recording.add
    try:
        yield recording
    finally:
        for layer in parts.layers.values():
            layer.watcher = None


@dataclass(frozen=True)
class ResolvedBase:
    """A base model to route in, not routed yet; `tokenizer` None means that none came with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    reference: BaseReference


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference
) -> ResolvedBase:
    """The base given as a name, a `Base` or a model, loaded if need be; None means `wanted`.

    Raises RoutingError when the model is routed already.
    """
    if base is None:
        base = load_base(wanted.id, revision=wanted.revision)
    elif isinstance(base, str | Path):
        base = load_base(base)
    model = base.model if isinstance(base, Base) else base
    if hasattr(model, ROUTED):
        raise RoutingError("This base model is routed already; detach it first.")
    if isinstance(base, Base):
        return ResolvedBase(model, base.tokenizer, base.reference)
    return ResolvedBase(model, None, BaseReference(wanted.id, wanted.revision, fingerprint(model)))


def check_fingerprint(wanted: BaseReference, found: BaseReference) -> None:
    """Raise WrongBaseError unless both are one base; warn when `wanted` has no fingerprint."""
    if wanted.fingerprint is None:
        warnings.warn(
            f"The experts don't record their base's fingerprint; taking {found.id!r} on trust.",
            stacklevel=4,
        )
    elif wanted.fingerprint != found.fingerprint:
        raise WrongBaseError(
            f"The experts were trained on {wanted.id!r} with fingerprint "
            f"{wanted.fingerprint[:19]}…, but the base model {found.id!r} has "
            f"{str(found.fingerprint)[:19]}…."
        )
