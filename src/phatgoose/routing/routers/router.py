"""What a router is: one class for a whole model, and a module at each site with its table there."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...config import Kernel, Routing, Settings, from_mapping, read_pairs, settings_of
from ...entry_points import add_entry_points
from ...errors import ConfigError, PoolError
from ...experts.pool import REMEDIES, Pool
from ...files import one_line, shortened
from ..choice import NOBODY
from ..kernels import top_experts_for
from .registry import AUTO, ENTRY_POINTS, OURS, Listed, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..context import RoutingContext

Scores = Mapping[str, Mapping[str, float]]  # of single experts: expert -> task -> score
PLURAL = {"lora": "LoRAs"}  # needs that are no words themselves
CHOSEN = ("kernel", "embedder", "reader", "reader_device")  # by the user, for any router
OWN_EXPERTS = "experts"  # the folder, in a site's name, of a mixture of experts of the base's own
STANDARDISED = "v̄ᵀū/√n"  # scores that kernels know, and the next
ABSOLUTE = "|vᵀu|"


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


def products(u: Tensor, vectors: Tensor) -> Tensor:
    """vᵀu for each token of u [T, n] and each of `vectors` [E, n], float32 [T, E]; ties stay so."""
    if u.device.type == "cpu":
        # Equal vectors must score equally, but how BLAS rounds in float32 depends on a vector's
        # place. Float64's roundings don't show in float32.
        return (u.double() @ vectors.double().T).float()
    # On a GPU only single tokens are rounded by place (gemv): so one goes as two.
    tokens = u.float() if len(u) != 1 else u.float().expand(2, -1)
    return (tokens @ vectors.float().T)[: len(u)]


@dataclass(frozen=True)
class Router(Settings):
    """How a routed model chooses experts: the base of all routers, whose settings are fields.

    A router says which `table` it makes of the experts at each site, and how it `scores` tokens by
    that. The k best act, of equals the first, weighted by the softmax of their scores. A subclass
    changes what it does otherwise; its settings may not be called as anything here is.
    (`prompt.ByPrompt` is the base of routers that choose for whole prompts.)

    `k`, `kernel`, `embedder`, `reader` and `reader_device` are the user's choices for any router
    (`config.Routing`), and no settings of this one: k is 0 where it can't be chosen.
    """

    defined: ClassVar[dict[str, type[Router]]] = {}  # all that are imported, by name

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""  # in tables
    needs: ClassVar[tuple[str, ...]] = ()  # of Expert.has
    given: ClassVar[tuple[str, ...]] = ()  # of scores, expert, weights, task, examples: by the user
    usual_k: ClassVar[int | None] = None  # experts a token or, if `per_input`, an input
    per_input: ClassVar[bool] = False
    grows: ClassVar[bool] = True  # experts can join and leave without composing again
    folds: ClassVar[bool] = False  # the same weights for all tokens, to be folded into the base's
    unserved: ClassVar[str | None] = None  # why a prompt alone isn't enough, as a sentence

    # A letter for each size of the table's tensors, by name: E experts, n inputs.
    sizes: ClassVar[Mapping[str, str]] = {}
    fused: ClassVar[str] = ""  # scores that are STANDARDISED or ABSOLUTE, by the table's "vectors"
    equal: ClassVar[bool] = False  # the chosen weigh 1/k each
    by_token: ClassVar[bool] = True  # a token's decision depends on nothing but the token

    k: int = 0
    kernel: Kernel = "auto"
    embedder: str | None = None
    reader: str | None = None
    reader_device: str = "cpu"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "scores" in vars(cls) and "fused" not in vars(cls):
            cls.fused = ""  # kernels have the scores of the class that it comes from
        if "name" in vars(cls):
            cls.defined[cls.name] = cls

    def __post_init__(self) -> None:
        super().__post_init__()
        k = self.k or self.usual_k
        object.__setattr__(self, "k", k if self.usual_k else 0)

    # As text.

    @classmethod
    def listed(cls) -> Listed:
        """What lists show; of another package's router the first line of its docstring."""
        summary = (cls.__doc__ or cls.name).partition("\n")[0].rstrip(".")
        return OURS.get(cls.name) or Listed("", summary, " ".join(cls.needs), cls.usual_k)

    @classmethod
    def read(cls, text: str) -> Self:
        """The router with the settings in "SETTING=VALUE,SETTING=VALUE". Raises ConfigError."""
        refusal = (
            f"router is {shortened(f'{cls.name}:{text}')}, but must be a name, or a name and "
            f"settings, each once: {cls.name}:SETTING=VALUE,SETTING=VALUE."
        )
        return from_mapping(cls, read_pairs(text, refusal), f"router {cls.name}")

    @property
    def text(self) -> str:
        """As the user writes it: settings that aren't the usual ones, in the order of the class."""
        changed = []
        for setting in settings_of(type(self)):
            value = getattr(self, setting.name)
            if value != setting.default:
                changed.append(f"{setting.name}={written(value)}")
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @cached_property
    def routing(self) -> Routing:
        """How experts are chosen, as `compose` takes it."""
        chosen = {name: getattr(self, name) for name in CHOSEN}
        return Routing(self.text, self.k or None, **chosen)

    # What it is made of.

    def check(self, pool: Pool) -> None:
        """Raise PoolError, naming them, when experts of `pool` lack what the router needs."""
        for need in self.needs:
            lacking = pool.lacking(need)
            if lacking:
                names = ", ".join(map(repr, lacking))
                who = f"Expert {names} has"
                if len(lacking) > 1:
                    who = f"Experts {names} have"
                remedy = ""
                if need in REMEDIES:
                    remedy = f"run 'phatgoose {REMEDIES[need]}' with the data of the training, "
                raise PoolError(
                    f"{who} no {PLURAL.get(need, need)}: {remedy}leave such experts out, or "
                    f"compose the pool by a router that needs none, such as merged."
                )

    def narrow(self, pool: Pool, scores: Scores | None) -> Pool:
        """The experts of `pool` that can ever be chosen; all of them by default.

        Raises PoolError or ConfigError when what the user hands over is missing or unknown.
        """
        return pool

    def fitted(
        self, pool: Pool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> Self:
        """The router after a look at the base that `pool` is composed with; itself by default."""
        return self

    def used(self, pool: Pool) -> tuple[str, ...]:
        """The parts of the experts of `pool` that its choices depend on."""
        return self.needs

    @property
    def why_fixed(self) -> str | None:
        """None where experts can join and leave, else why not and what to do, as a sentence."""
        is_by_expert = all(letters.startswith("E") for letters in self.sizes.values())
        if self.grows and is_by_expert:
            return None
        return f"Router {self.name} is made for the experts that it has; compose the pool again."

    def table(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The tensors to choose by at `site`, of the experts of `pool` that act there."""
        return {}

    # How it chooses. `at_site` is its module there, with the table's tensors by name.

    def scores(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        """The scores of all experts for each token of u [T, n], float32 [T, E]."""
        raise NotImplementedError

    def constant(self, at_site: RouterAtSite) -> Tensor | None:
        """The weights [E], float32, that all tokens have; None where experts are chosen."""
        return None

    def decision(
        self, u: Tensor, at_site: RouterAtSite, active: Tensor | None = None
    ) -> RoutingDecision:
        """The experts of each token of u [T, n], of those that are `active` [T, E] if given."""
        constant = self.constant(at_site)
        if constant is not None:
            weights = constant.expand(len(u), -1)
            experts = torch.arange(at_site.E, device=u.device).expand_as(weights)
            return RoutingDecision(experts, weights if active is None else weights * active)
        if self.fused and active is None:
            vectors = at_site.vectors
            top_experts = top_experts_for(u, vectors)
            if top_experts is not None:
                return RoutingDecision(*top_experts(u, vectors, at_site.k, at_site.eps))
        scores = self.scores(u, at_site)
        if active is not None:
            scores = scores.masked_fill(~active, -torch.inf)
        experts = highest(scores, at_site.k)  # E_t
        highest_scores = scores.gather(-1, experts)
        if self.equal:  # softmax of equal numbers
            highest_scores = highest_scores.masked_fill(highest_scores != -torch.inf, 0.0)
        weights = highest_scores.softmax(dim=-1)
        return RoutingDecision(experts, weights if active is None else weights.nan_to_num(0.0))

    def distribution(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        """The probabilities of all experts before the choice of k, [T, E]."""
        constant = self.constant(at_site)
        if constant is not None:
            return constant.expand(len(u), -1)
        return self.scores(u, at_site).softmax(dim=-1)

    def restart(self, at_site: RouterAtSite) -> None:
        """Reset the random state for a new dataset."""


class RouterAtSite(nn.Module):
    """A router at one site, where E experts of the pool act: its table, and where they are.

    `names` are the pool's, `members` [E] the indices of its experts here, and `position` [pool + 1]
    the other way round. The `context` has the choice for whole prompts.
    """

    members: Tensor
    position: Tensor
    generator: torch.Generator  # of router random
    vectors: Tensor
    context: RoutingContext | None = None

    def __init__(
        self,
        router: Router,
        place: str,
        members: Tensor,
        names: Sequence[str],
        table: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.router = router
        self.place = place
        self.names = tuple(names)
        self.pool_size = len(names)
        self.E = len(members)
        self.k = min(router.k, self.E)
        self.eps: float | None = getattr(router, "eps", None)
        # Inside one of the base's own experts, which sees some of a batch's tokens only.
        self.sees_all = OWN_EXPERTS not in place.split(".")
        position = torch.full((len(names) + 1,), NOBODY)
        position[members.cpu()] = torch.arange(self.E)
        for name, tensor in {**table, "members": members, "position": position}.items():
            self.register_buffer(name, tensor, persistent=False)
        self.restart()

    def forward(self, u: Tensor, active: Tensor | None = None) -> RoutingDecision:
        return self.router.decision(u, self, active)

    def distribution(self, u: Tensor) -> Tensor:
        return self.router.distribution(u, self)

    def restart(self) -> None:
        self.router.restart(self)

    def state(self) -> dict[str, Tensor]:
        """The table, which is saved with the model and changes when experts join or leave."""
        return {name: getattr(self, name) for name in self.router.sizes}


# Routers by what a user writes.


def all_routers() -> dict[str, type[Router]]:
    """The classes of all routers by name, ours first. What can't be loaded is a warning."""
    kinds: dict[str, type] = {AUTO: Router}
    for name in OURS:
        kinds[name] = class_of(name)
    add_entry_points(ENTRY_POINTS, kinds, type)
    for name, kind in Router.defined.items():
        kinds.setdefault(name, kind)
    return {name: kind for name, kind in kinds.items() if issubclass(kind, Router) and kind.name}


def class_of(router: str) -> type[Router]:
    """The class of a router, named with or without settings. Raises ConfigError without one."""
    name = router.partition(":")[0]
    if name in OURS:
        module = importlib.import_module(f".{OURS[name].place}", __package__)
        # Not by `defined`, which another package may have changed.
        ours: type[Router] = next(
            kind for kind in vars(module).values() if getattr(kind, "name", None) == name
        )
        return ours
    kinds = all_routers()
    if name not in kinds:
        named = [AUTO, *kinds]
        raise unknown(router, [kind for kind in named if kind != name])
    return kinds[name]


def router_of(routing: Routing) -> Router:
    """The router that `routing` asks for, such as "arrow:form=peft".

    Raises ConfigError, in a line, for unknown routers and settings and for values that can't be.
    """
    _, _, rest = routing.router.partition(":")
    router = class_of(routing.router).read(rest)
    chosen = {name: getattr(routing, name) for name in CHOSEN}
    return replace(router, k=routing.k or 0, **chosen)


def canonical(router: str) -> str:
    """`router` with settings that aren't the usual ones, in the order of its class."""
    return router_of(Routing(router)).text


def written(value: object) -> str:
    """The `value` of a setting as users write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)


def check_served(router: Router) -> None:
    """Raise ConfigError for a router that a server can't serve."""
    if router.unserved:
        raise ConfigError(router.unserved)


def check_routing(router: Router, pool: Pool) -> None:
    """Raise PoolError for experts that lack what `router` needs; warn when `k` exceeds the pool."""
    router.check(pool)
    check_measured(router, pool.records())
    warn_of_lowered_k(router, len(pool), "the pool has", stacklevel=4)


def check_measured(router: Router, records: Iterable[Mapping[str, Any]]) -> None:
    """Raise PoolError where `router` would compare means of plain and quantised bases.

    `records` are of all experts. A reader makes prompt statistics, whatever the base is.
    """
    if "means" not in router.needs:
        return
    kinds = set[str]()
    for record in records:
        dtype, _, quantised = (record.get("measured_in") or "").partition(", ")
        if dtype:  # bfloat16, float16 and float32 differ by rounding only
            kinds.add(one_line(quantised, 80) or "not quantised")
    if len(kinds) > 1:
        raise PoolError(
            f"Router {router.name} compares the experts' statistics, but they were measured on a "
            f"base in different precisions ({', '.join(sorted(kinds))}). Measure them again on one "
            f"base: phatgoose stats EXPERT --task ITS-DATA --no-embeddings."
        )


def warn_of_lowered_k(router: Router, size: int, of: str, stacklevel: int) -> None:
    """Warn if a `k` that the user chose is more than the `size` experts of `of`."""
    if router.k not in (0, router.usual_k) and router.k > size:
        experts = "1 expert" if size == 1 else f"{size} experts"
        warnings.warn(f"k is {router.k}, but {of} {experts}; k is lowered.", stacklevel=stacklevel)
