"""What a router is: `Router` for a whole model, `SiteRouter` at each of its sites."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Routing
from ...errors import ConfigError, PoolError
from ...experts.pool import Pool
from ..kernels.choice import Kernel
from .decision import RoutingDecision
from .lookup import Lookup, SavedLookup
from .registry import RouterSpec, spec_of
from .scores import Scores

__all__ = ["Router", "RouterSite", "SiteRouter", "check_needs", "check_routing"]
__all__ += ["router_of", "warn_of_constant_vectors", "warn_of_lowered_k"]

OWN_EXPERTS = "experts"  # the folder, in a site's name, of a mixture of experts of the base's own


class SiteRouter(nn.Module):
    """Chooses the experts of every token at one site.

    `kept` names the buffers that belong to the routed model: they are saved with it and change when
    experts join or leave. `one_call` says that the router is nothing but the top k of an affinity,
    so that a kernel can choose experts and add their updates in one call.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    unsigned: ClassVar[bool] = False  # only the lines of its vectors matter, not their signs
    one_call: ClassVar[bool] = False

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for activations u [T, n]."""
        raise NotImplementedError

    def distribution(self, u: Tensor) -> Tensor:
        """The probabilities of all experts of the site before the choice of k, [T, E]."""
        raise NotImplementedError

    def restart(self) -> None:
        """New examples begin; a router that draws lots begins its sequence again."""

    def state(self) -> dict[str, Tensor]:
        """The buffers in `kept`, by name."""
        return {name: getattr(self, name) for name in self.kept}


@dataclass(frozen=True)
class RouterSite:
    """What a router is given to make its `SiteRouter` at one site.

    `experts` [E] are the pool's indices of those that act there, `state` what `Router.state_at`
    gave, and `lookup` what `Router.lookup_of` gave for the whole model.
    """

    name: str
    experts: Tensor
    pool_size: int
    state: Mapping[str, Tensor]
    lookup: Lookup | None

    @property
    def sees_all(self) -> bool:
        """False inside one of the base's own experts, which sees some of a batch's tokens only."""
        return OWN_EXPERTS not in self.name.split(".")


class Router:
    """How a routed model chooses experts, made of its settings; one subclass for each router."""

    product: Kernel | None = None  # computes the LoRAs' sum in another way than the kernels
    folds = False  # True: the same weights for all tokens, which can be folded into the base's

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    @property
    def spec(self) -> RouterSpec:
        """Its record in the registry."""
        return spec_of(self.routing.router)

    @property
    def uses_k(self) -> bool:
        """True where the number of experts a token gets is `k`."""
        return self.spec.uses_k

    @property
    def grows(self) -> str | None:
        """None where experts can join and leave, else why not and what to do, as a sentence."""
        each = all(letters.startswith("E") for letters in self.form.values())
        if self.spec.grows and each:
            return None
        return (
            f"Router {self.spec.name} is made for the experts that it has; compose the pool anew."
        )

    def check(self, pool: Pool) -> None:
        """Raise PoolError, naming them, when experts of `pool` lack what the router needs."""
        check_needs(pool, self.spec.needs, f"Router {self.spec.name} needs")

    def read_base(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pool: Pool
    ) -> None:
        """Look at the base that `pool` is composed with, before `state_at`; nothing by default.

        Raises ConfigError without a `tokenizer` where one is needed.
        """

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The experts of `pool` that can ever be chosen; all of them by default.

        Raises PoolError or ConfigError when what the user hands over is missing or unknown.
        """
        return pool

    @property
    def form(self) -> Mapping[str, str]:
        """A letter for each size of what `state_at` gives (see `soundness`), by name."""
        return {}

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The tensors that the router needs at `site`, made of the experts of `pool`, by name."""
        return {}

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """The same of the lookup's own tensors, by what follows "lookup." in their names.

        The first letter is E for tensors with a row for each expert, M for those with rows that
        the indices "owners" [M] give to experts. (`phatgoose-input` saves its votes site by site.)
        """
        return {}

    def lookup_rows(self, pool: Pool, info: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The rows of these tensors for the experts of `pool`, under their whole names.

        `info` is what the lookup that they join saves beside its tensors. Raises PoolError when an
        expert lacks what it needs.
        """
        return {}

    def lookup_of(
        self, pool: Pool, scores: Scores | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup | None:
        """What all sites share, made of `pool`; None by default.

        Raises PoolError when an expert lacks what it needs, ConfigError without `scores` or a
        `tokenizer` where these are needed.
        """
        return None

    def saved_lookup(
        self, saved: SavedLookup, tokenizer: PreTrainedTokenizerBase | None
    ) -> Lookup | None:
        """The same, read from a saved model."""
        return None

    def at(self, site: RouterSite) -> SiteRouter:
        """The router's module at one site."""
        raise NotImplementedError


def router_of(routing: Routing) -> Router:
    """The router that `routing` asks for. Raises ConfigError when there is none of that name."""
    found: Router = spec_of(routing.router).router(routing)
    return found


def check_routing(router: Router, pool: Pool) -> None:
    """Refuse a routing that can't be; warn when `k` exceeds the pool.

    Raises ConfigError for settings that don't go together, PoolError naming the experts that lack
    what the router needs.
    """
    routing = router.routing
    if routing.expert is not None and "expert" not in router.spec.given:
        raise ConfigError(f"expert is for router single; the router is {routing.router}.")
    router.check(pool)
    warn_of_lowered_k(router, len(pool), "the pool has", stacklevel=4)


def warn_of_lowered_k(router: Router, size: int, of: str, stacklevel: int) -> None:
    """Warn when `k` or `input_k`, where the router uses it, exceeds the `size` of the pool.

    Not of the default, which nobody may have asked for. `of` begins what is said of the size.
    """
    uses = {"k": router.uses_k, "input_k": "input_k" in router.spec.settings}
    experts = "1 expert" if size == 1 else f"{size} experts"
    for name, used in uses.items():
        asked = getattr(router.routing, name)
        if used and asked not in (None, getattr(Routing, name)) and asked > size:
            warnings.warn(
                f"{name} is {asked}, but {of} {experts}; {name} is lowered.", stacklevel=stacklevel
            )


def check_needs(pool: Pool, needs: tuple[str, ...], what: str) -> None:
    """Raise PoolError, naming them, when experts of `pool` lack one of `needs`.

    `what` begins the sentence about factors of LoRAs, which only LoRAs have.
    """
    for need in needs:
        if need == "lora":
            without = [f"{e.name!r} ({e.kind})" for e in pool.experts if not e.lora]
            if without:
                raise PoolError(
                    f"{what} the factors of LoRAs, and there are none in {', '.join(without)}: "
                    f"leave these out, or use another router."
                )
        else:
            pool.check_vectors(need)


def warn_of_constant_vectors(pool: Pool, router: Router, constant: Mapping[str, Tensor]) -> None:
    """Warn once of each expert whose vectors have no direction: where `constant`, by site [E]."""
    found = Counter[str]()
    for site, rows in constant.items():
        if rows.any():
            present = [expert.name for expert in pool.experts if site in expert.modules]
            found.update(present[row] for row in rows.nonzero().flatten().tolist())
    for name in pool.names:
        if found[name]:
            warnings.warn(
                f"Expert {name!r} has a constant vector for router {router.spec.name!r} at "
                f"{found[name]} of {len(constant)} sites (never trained?); it scores 0 there.",
                stacklevel=3,
            )
