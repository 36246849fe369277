"""What a router is, for a whole model and at each site: experts and weights for each token."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Routing
from ...errors import ConfigError, PoolError, RoutingError
from ...experts.pool import Pool
from ...files import one_line, read_json_object, reason, shortened
from ..context import RoutingContext
from .registry import choice_of, spec_of


@dataclass(frozen=True)
class RoutingDecision:
    """The experts chosen for each of T tokens, best first where there is a best.

    `experts` [T, k] are rows of the site's stack, `weights` [T, k] float32. They sum to 1, or to
    less for experts of a whole prompt, and merged ones, of which some do not act at the site.
    """

    experts: Tensor
    weights: Tensor


def highest(scores: Tensor, k: int) -> Tensor:
    """Where the k highest of each row of `scores` [T, E] are, [T, k]; of equals the first."""
    if k * k > 4 * scores.shape[-1]:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    left = scores.detach()
    if k > 1:  # experts that are out of the question (-inf) stay before those that are taken
        left = left.clamp(min=torch.finfo(left.dtype).min)
    chosen: list[Tensor] = []
    for _ in range(k):
        if chosen:
            left = left.scatter(-1, chosen[-1], -torch.inf)
        chosen.append(left.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=-1)


def highest_active(scores: Tensor, k: int, active: Tensor) -> tuple[Tensor, Tensor]:
    """As `highest`, of the experts that are `active` [T, E], and which of the k are, [T, k]."""
    experts = highest(scores.masked_fill(~active, -torch.inf), k)
    return experts, active.gather(1, experts)


def equal_shares(active: Tensor) -> Tensor:
    """The weights [T, k], float32, that are equal for all active experts; 0 for the others."""
    return active.float() / active.sum(dim=-1, keepdim=True).clamp(min=1)


# Scores of every single expert on every task, which Oracle and Best Individual choose by.

Scores = Mapping[str, Mapping[str, float]]  # expert -> task -> score
EXPERTS = "experts"  # the key under which a comparison's JSON file holds them


def read_scores(path: str | Path) -> Scores:
    """Single experts' scores, expert -> task -> score, of a comparison.json. Raises PoolError."""
    path = Path(path)
    try:
        scores = read_json_object(path, PoolError)[EXPERTS]
        return _finite(scores)
    except OSError as error:
        raise PoolError(f"Scores {path} can't be read: {reason(error)}.") from error
    except (PoolError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(
            f"{path} holds no scores of single experts; wanted the comparison.json of a 'phatgoose "
            f"compare' that ran every single expert."
        ) from error


def given_scores(scores: Scores | None, routing: Routing) -> Scores:
    """`scores`, checked. Raises ConfigError if missing, PoolError if they are no scores."""
    if scores is None:
        raise ConfigError(
            f"Router {routing.name} needs the scores of every single expert: those of a finished "
            f"'phatgoose compare' (--scores comparison.json)."
        )
    try:
        return _finite(scores)
    except (ValueError, TypeError, AttributeError) as error:
        told = f"scores are {shortened(scores)}; wanted expert -> task -> score, finite numbers."
        raise PoolError(told) from error


def _finite(scores: Any) -> Scores:
    """`scores` as Scores. Raises ValueError, TypeError or AttributeError if they are none."""
    found = {
        str(expert): {str(task): float(score) for task, score in tasks.items()}
        for expert, tasks in scores.items()
    }
    numbers = [list(tasks.values()) for tasks in found.values()]
    if not numbers or not all(row and all(map(math.isfinite, row)) for row in numbers):
        raise ValueError("no finite scores")
    return found


def best_expert(scores: Scores, names: Sequence[str]) -> str:
    """The one of `names` with the best mean over all tasks; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return max(names, key=lambda name: sum(scores[name][task] for task in tasks))


def best_expert_by_task(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """For each task the best one of `names`; PoolError where scores are missing."""
    tasks = _common_tasks(scores, names)
    return {task: max(names, key=lambda name: scores[name][task]) for task in tasks}


def _common_tasks(scores: Scores, names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in scores:
            raise PoolError(f"Expert {name!r} has no scores; they are of {', '.join(scores)}.")
        if set(scores[name]) != set(scores[names[0]]):
            raise PoolError(f"Experts {names[0]!r} and {name!r} were scored on different tasks.")
    return list(scores[names[0]])


# What a router is: `Router` for a whole model, `SiteRouter` at each of its sites.

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
    by_token: ClassVar[bool] = False  # a token's decision depends on nothing but the token

    context: RoutingContext | None = None

    @property
    def idle(self) -> bool:
        """Whether no expert acts in the present pass, whatever its tokens are."""
        return self.context is not None and self.context.no_expert_acts

    def forward(self, u: Tensor) -> RoutingDecision:
        """The decision for activations u [T, n]."""
        raise NotImplementedError

    def among(self, u: Tensor, active: Tensor) -> RoutingDecision:
        """The decision where only the experts that are `active` [T, E] may act on each token.

        By default that of `forward`, in which the others weigh 0; routers that score each token
        choose among the active ones.
        """
        decision: RoutingDecision = self(u)
        return RoutingDecision(
            decision.experts, decision.weights * active.gather(1, decision.experts)
        )

    def distribution(self, u: Tensor) -> Tensor:
        """The probabilities of all experts of the site before the choice of k, [T, E]."""
        raise NotImplementedError

    def sums(self, u: Tensor) -> Tensor:
        """What `decide` needs of a share of the features, float64 [T, ..].

        For layers whose input is split over processes: u [T, n'] is one's share, `kept` holds the
        same share of n, and the sums of all processes are added before `decide`. Raises
        RoutingError where the rule needs all features at once.
        """
        raise RoutingError(f"{type(self).__name__} can't choose by shares of an activation.")

    def decide(self, sums: Tensor, n: int) -> RoutingDecision:
        """The decision of `forward` by the `sums` over all n features."""
        raise NotImplementedError

    def over(self, state: Mapping[str, Tensor]) -> SiteRouter:
        """The same rule over other tensors, those of `kept` by name; copies nothing."""
        twin: SiteRouter = object.__new__(type(self))
        twin.__dict__ = {**self.__dict__, "_buffers": dict(state)}
        return twin

    def restart(self) -> None:
        """Reset the random state for a new dataset."""

    def state(self) -> dict[str, Tensor]:
        """The buffers in `kept`, by name."""
        return {name: getattr(self, name) for name in self.kept}


@dataclass(frozen=True)
class RouterSite:
    """What a router is given to make its `SiteRouter` at one site.

    `experts` [E] are the pool's indices of those that act there, `state` what `Router.state_at`
    gave, and `context` what all sites share where experts are chosen for whole prompts.
    """

    name: str
    experts: Tensor
    pool_size: int
    state: Mapping[str, Tensor]
    context: RoutingContext | None

    @property
    def sees_all(self) -> bool:
        """False inside one of the base's own experts, which sees some of a batch's tokens only."""
        return OWN_EXPERTS not in self.name.split(".")

    @property
    def block(self) -> int:
        """The index of the block that holds the site: the first number in its name."""
        return int(next(part for part in self.name.split(".") if part.isdigit()))


class Router:
    """How a routed model chooses experts, made of its settings; one subclass for each router."""

    unserved: str | None = None  # why it can't choose by a prompt alone, as a sentence
    folds = False  # True: the same weights for all tokens, which can be folded into the base's

    config: Any  # its own settings, of the class that its record in the registry names

    def __init__(self, routing: Routing) -> None:
        choice = choice_of(routing.router)
        self.spec, self.config = choice
        self.routing = replace(routing, router=choice.text, k=routing.k or self.spec.k)

    @property
    def uses_k(self) -> bool:
        """True if the user can choose the number of experts that a token, or an input, gets."""
        return self.spec.k is not None

    @property
    def k(self) -> int:
        """That number, as set or the router's own; 0 if the user can't choose it."""
        return (self.routing.k or 0) if self.uses_k else 0

    @property
    def why_fixed(self) -> str | None:
        """None where experts can join and leave, else why not and what to do, as a sentence."""
        each = all(letters.startswith("E") for letters in self.form.values())
        if self.spec.grows and each:
            return None
        return (
            f"Router {self.spec.name} is made for the experts that it has; compose the pool again."
        )

    def check(self, pool: Pool) -> None:
        """Raise PoolError, naming them, when experts of `pool` lack what the router needs."""
        check_needs(pool, self.spec.needs, f"Router {self.spec.name} needs")

    def used(self, pool: Pool) -> tuple[str, ...]:
        """The parts of the experts of `pool` that its choices depend on; its needs by default."""
        return self.spec.needs

    @property
    def file_digest(self) -> str | None:
        """A hash of what is in the file that a setting names; None by default."""
        return None

    @property
    def recorded(self) -> Routing:
        """What files and clients see of its `routing`: nothing of the user's own machine."""
        return self.routing

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
        """A letter for each size of what `state_at` gives (see `checks`), by name."""
        return {}

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The tensors that the router needs at `site`, made of the experts of `pool`, by name."""
        return {}

    def at(self, site: RouterSite) -> SiteRouter:
        """The module that chooses experts at `site`."""
        raise NotImplementedError


def router_of(routing: Routing) -> Router:
    """The router that `routing` asks for. Raises ConfigError when there is none of that name."""
    found: Router = spec_of(routing.router).router(routing)
    return found


def check_served(router: Router) -> None:
    """Raise ConfigError for a router that a server can't serve."""
    if router.unserved:
        raise ConfigError(router.unserved)


def check_routing(router: Router, pool: Pool) -> None:
    """Refuse a routing that can't be; warn when `k` exceeds the pool.

    Raises PoolError naming the experts that lack what the router needs.
    """
    router.check(pool)
    check_measured(router, pool, pool.records())
    warn_of_lowered_k(router, len(pool), "the pool has", stacklevel=4)


def check_measured(router: Router, pool: Pool, records: Iterable[Mapping[str, Any]]) -> None:
    """Raise PoolError where `router` would compare statistics of plain and quantised bases.

    `records` are of all experts, those of `pool` among them. Warns where some don't tell.
    """
    if not {"means", "readings"} & set(router.used(pool)):
        return
    named: dict[str | None, list[str]] = {}
    for record in records:
        found = record.get("measured_in")
        # bfloat16, float16 and float32 differ by rounding only.
        kind = one_line(str(found).partition(", ")[2], 80) or "not quantised" if found else None
        named.setdefault(kind, []).append(shortened(record["name"]))
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in named.items() if kind)
    if len(named.keys() - {None}) > 1:
        raise PoolError(
            f"Router {router.spec.name} compares the experts' statistics, but they were measured "
            f"on a base in different precisions ({told}). Measure those of one kind again, on a "
            f"base of the other: phatgoose stats EXPERT --task ITS-DATA --no-embeddings."
        )
    if len(named) > 1:
        warnings.warn(
            f"Nothing records in which precision the statistics of {', '.join(named[None])} were "
            f"measured, but of others ({told}). If it differs, wrong experts are chosen: "
            f"phatgoose stats measures again.",
            stacklevel=4,
        )


def warn_of_lowered_k(router: Router, size: int, of: str, stacklevel: int) -> None:
    """Warn if a `k` that the user chose is more than the `size` experts of `of`."""
    if router.uses_k and router.k != router.spec.k and router.k > size:
        experts = "1 expert" if size == 1 else f"{size} experts"
        warnings.warn(f"k is {router.k}, but {of} {experts}; k is lowered.", stacklevel=stacklevel)


def check_needs(pool: Pool, needs: tuple[str, ...], what: str) -> None:
    """Raise PoolError, naming them, when experts of `pool` lack one of `needs`."""
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
    """Warn of experts whose vectors are 0 at some sites; `constant` marks them by site."""
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
