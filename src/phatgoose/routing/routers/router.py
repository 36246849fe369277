"""What a router is: for a whole model, at each site, and what sites share.

What every router answers, experts and weights for each token, and the rule for ties.
"""

from __future__ import annotations

import math
import threading
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
from ...files.strict import read_json_object, reason, shortened
from ...tasks.embeddings import PAPER_TEXT, PROMPT, TEXTS
from ...tasks.task import Example
from ..kernels.choice import Kernel
from .registry import choice_of, spec_of


@dataclass(frozen=True)
class RoutingDecision:
    """The experts chosen for each of T tokens, best first where there is a best.

    `experts` [T, k] are rows of the site's stack, `weights` [T, k] float32. They sum to 1, or to
    less for looked-up and merged experts of which some do not act at the site.
    """

    experts: Tensor
    weights: Tensor


def highest(scores: Tensor, k: int) -> Tensor:
    """Where the k highest of each row of `scores` [T, E] are, highest first: int64 [T, k].

    Of equals the first wins, which `torch.topk` doesn't promise; the kernels in C++ and Triton keep
    the same rule. The maximum, twice, of a thousand scores costs what topk does; sorting them costs
    thirty times as much, and pays only for many of few.
    """
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


# -------------------------------------------------------------------------------------------------
# Mixtures: the experts that act on whole inputs, and with which weights.
# -------------------------------------------------------------------------------------------------

NOBODY = -1  # stands among experts for none: the base's own output


@dataclass(frozen=True)
class Mixtures:
    """The experts of some inputs: `experts` [rows, k], the pool's indices, best first.

    `weights` [rows, k], float32, say how much each adds. Most rows have one expert of weight 1.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def alone(cls, experts: Tensor) -> Mixtures:
        """Each of `experts` [rows] alone, with the weight 1; NOBODY is the base."""
        return cls(experts[:, None], torch.ones(len(experts), 1, device=experts.device))

    @classmethod
    def best(cls, scores: Tensor, k: int, temperature: float) -> Mixtures:
        """The k highest of each row of `scores` [rows, E], softmax of score / temperature.

        `k` is lowered to E. With k = 1 the weight is 1 exactly.
        """
        experts = highest(scores, min(k, scores.shape[-1]))
        weights = (scores.gather(-1, experts).float() / temperature).softmax(dim=-1)
        return cls(experts, weights)

    @classmethod
    def joined(cls, parts: Iterable[Mixtures]) -> Mixtures:
        """The rows of all `parts`, which have the same k, in turn."""
        held = list(parts)
        experts = torch.cat([part.experts for part in held])
        return cls(experts, torch.cat([part.weights for part in held]))

    def lone(self) -> Tensor | None:
        """The expert of each row [rows], where each has one of weight 1; else None."""
        alone = self.experts.shape[1] == 1 and bool((self.weights == 1).all())
        return self.experts[:, 0] if alone and bool((self.experts >= 0).all()) else None

    def __len__(self) -> int:
        return len(self.experts)

    def of(self, rows: Sequence[int]) -> Mixtures:
        """Those of some rows."""
        return Mixtures(self.experts[list(rows)], self.weights[list(rows)])

    def each(self) -> list[Mixtures]:
        """Every row on its own."""
        return [self.of([row]) for row in range(len(self))]

    def shared_out(self, tokens: int) -> Mixtures:
        """A row for each of so many tokens: tokens / rows in turn for each row, which fits."""
        count = tokens // len(self)
        return Mixtures(
            self.experts.repeat_interleave(count, dim=0),
            self.weights.repeat_interleave(count, dim=0),
        )


# -------------------------------------------------------------------------------------------------
# Lookups: which experts serve each whole input, shared by all sites of a model.
#
# A `Lookup` holds the experts of the rows of the present batch, for each thread its own. Code that
# runs known examples announces them (`composition.announcing`).
# -------------------------------------------------------------------------------------------------


class _Turn(threading.local):
    """The present batch of one thread."""

    mixtures: Mixtures | None = None  # as `Lookup.mixtures`
    announced = False  # by somebody, rather than read
    prompt: Tensor | None = None  # read last
    length = 0  # of that prompt by now
    given: int | None = None  # columns of the prompt that `generate` was given, until it is read
    depth = 0  # of calls inside calls of the model
    encoded: Tensor | None = None  # what the encoder made of the prompts read last
    checked: Tensor | None = None  # encoder outputs found to be those


class Lookup:
    """Which experts serve each row of the present batch; all sites of a model share one.

    Every thread has a batch of its own. A copy, in memory or from a file, has none yet.
    """

    unknown = "Nothing has told the router yet what its inputs are."
    chooses = True  # False where its mixtures are scores of all experts, not a choice among them

    def __init__(self) -> None:
        self._turn = _Turn()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the threads' batches."""
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore what `__getstate__` gave, with no batch."""
        self.__dict__.update(state, _turn=_Turn())

    @property
    def mixtures(self) -> Mixtures | None:
        """The experts of the rows of this thread's batch; None while nothing is known.

        A single row serves batches of any size.
        """
        return self._turn.mixtures

    def of_each(self, u: Tensor, sees_all: bool = True) -> Mixtures:
        """The experts of each token of u [T, n], on its device: T / rows tokens in turn for a row.

        A row's beams and tokens stand together, so this holds for generation too. `sees_all` False
        says that u holds some of the rows' tokens only, nobody knows whose: all rows must then have
        the same experts. Raises RoutingError when no expert is known, when T is no multiple of the
        rows, or such rows differ.
        """
        known = self.mixtures
        if known is None:
            raise RoutingError(self.unknown)
        if not sees_all:
            known = _of_any(known)
        if len(u) % len(known):
            raise RoutingError(f"{len(u)} tokens can't be shared out to {len(known)} inputs.")
        here = Mixtures(known.experts.to(u.device), known.weights.to(u.device))
        return here.shared_out(len(u))

    def begin_task(self, name: str) -> None:
        """The examples to come belong to the task called `name`."""

    def find(
        self, prompts: Sequence[Sequence[int]], examples: Sequence[Example] | None = None
    ) -> Mixtures:
        """The experts of each prompt, given by its tokens as the model reads them.

        `examples` are what the prompts were made of; None where only the prompts are known.
        """
        raise NotImplementedError

    def serve(self, mixtures: Mixtures | None) -> None:
        """Use `mixtures` for the rows of the next passes, until the next call."""
        self._turn.mixtures = mixtures

    def attach(self, model: PreTrainedModel) -> None:
        """Watch `model` for inputs that are not announced."""

    def detach(self) -> None:
        """Stop watching."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved with a model, by name (docs/format.md)."""
        return {}

    def info(self) -> dict[str, Any]:
        """What is saved beside the tensors, as JSON."""
        return {}

    def grown(self, pool: Pool, first: int) -> Lookup:
        """The lookup with the experts of `pool` too, which get indices from `first` on."""
        return self

    def shrunk(self, place: Tensor) -> Lookup:
        """The lookup of the experts whose new index `place` [E] gives; -1 for those that leave."""
        return self


def _of_any(known: Mixtures) -> Mixtures:
    """The one row that all rows are. Raises RoutingError where they differ."""
    if not all((part == part[0]).all() for part in (known.experts, known.weights)):
        raise RoutingError(
            "Inputs that choose different experts can't share a batch here: some of the layers are "
            "inside the base's own experts, which see some of the tokens only. Use a router for "
            "every token, such as phatgoose, or pass inputs one by one (token_budget=1 in Python)."
        )
    return known.of([0])


@dataclass(frozen=True)
class SavedLookup:
    """What a saved model holds of a lookup.

    `info` is what `Lookup.info` gave, `tensors` all tensors of the model by name; `experts` counts
    the pool and `inputs` gives n of every site.
    """

    info: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    experts: int
    inputs: Mapping[str, int]

    def embedder_for(self, router: str, form: str = PROMPT) -> str:
        """The embedder that made what is looked up.

        Raises RoutingError when none is named, or when it embedded another text than `form` says.
        """
        if "embedder" not in self.info:
            raise RoutingError(f"Router {router} needs lookup.embedder in routed.json.")
        found = self.info.get("embedding_form", PAPER_TEXT)
        if found != form:
            raise RoutingError(
                f"This model's embeddings are {TEXTS.get(found, found)}, but router {router} "
                f"compares {TEXTS[form]}. Measure its experts' embeddings again (phatgoose "
                f"measure), then compose and save the pool again."
            )
        return str(self.info["embedder"])


# -------------------------------------------------------------------------------------------------
# Scores of every single expert on every task, which Oracle and Best Individual choose by.
# -------------------------------------------------------------------------------------------------

Scores = Mapping[str, Mapping[str, float]]  # expert -> task -> score
EXPERTS = "experts"  # the key under which a comparison's JSON file holds them


def read_scores(path: str | Path) -> Scores:
    """The single experts' scores in the JSON file that `phatgoose compare` wrote.

    Raises PoolError when the file can't be read or holds none.
    """
    path = Path(path)
    try:
        scores = read_json_object(path, PoolError)[EXPERTS]
        found = {
            str(expert): {str(task): float(score) for task, score in tasks.items()}
            for expert, tasks in scores.items()
        }
        numbers = [list(tasks.values()) for tasks in found.values()]
        if not numbers or not all(row and all(map(math.isfinite, row)) for row in numbers):
            raise ValueError("no finite scores")
        return found
    except OSError as error:
        raise PoolError(f"Scores {path} can't be read: {reason(error)}.") from error
    except (PoolError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PoolError(
            f"{path} holds no scores of single experts; wanted the comparison.json of a 'phatgoose "
            f"compare' that ran every single expert."
        ) from error


def given_scores(scores: Scores | None, routing: Routing) -> Scores:
    """`scores`, which the router can't do without.

    Raises ConfigError when there are none, PoolError when they are none by expert and task.
    """
    if scores is None:
        raise ConfigError(
            f"Router {routing.name} needs the scores of every single expert: those of a finished "
            f"'phatgoose compare' (--scores comparison.json)."
        )
    if not isinstance(scores, Mapping) or not all(isinstance(s, Mapping) for s in scores.values()):
        raise PoolError(f"scores are {shortened(scores)}; wanted expert -> task -> score.")
    return scores


def best_expert(scores: Scores, names: Sequence[str]) -> str:
    """The one of `names` with the best mean over all tasks; the first of equals.

    Raises PoolError when an expert was not scored, or not on the same tasks as the others.
    """
    tasks = _common_tasks(scores, names)
    return max(names, key=lambda name: sum(scores[name][task] for task in tasks))


def best_expert_by_task(scores: Scores, names: Sequence[str]) -> dict[str, str]:
    """For each task the one of `names` with the best score; the first of equals.

    Raises PoolError when an expert was not scored, or not on the same tasks as the others.
    """
    tasks = _common_tasks(scores, names)
    return {task: max(names, key=lambda name: scores[name][task]) for task in tasks}


def _common_tasks(scores: Scores, names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in scores:
            raise PoolError(f"Expert {name!r} has no scores; they are of {', '.join(scores)}.")
        if set(scores[name]) != set(scores[names[0]]):
            raise PoolError(f"Experts {names[0]!r} and {name!r} were scored on different tasks.")
    return list(scores[names[0]])


# -------------------------------------------------------------------------------------------------
# What a router is: `Router` for a whole model, `SiteRouter` at each of its sites.
# -------------------------------------------------------------------------------------------------

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
        """A letter for each size of what `state_at` gives (see `checks`), by name."""
        return {}

    def state_at(self, pool: Pool, site: str) -> dict[str, Tensor]:
        """The tensors that the router needs at `site`, made of the experts of `pool`, by name."""
        return {}

    @property
    def lookup_form(self) -> Mapping[str, str]:
        """The same of the lookup's own tensors, by what follows "lookup." in their names.

        The first letter is E for tensors with a row for each expert, M for those with rows that
        the indices "owners" [M] give to experts.
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

    Raises PoolError naming the experts that lack what the router needs.
    """
    router.check(pool)
    warn_of_lowered_k(router, len(pool), "the pool has", stacklevel=4)


def warn_of_lowered_k(router: Router, size: int, of: str, stacklevel: int) -> None:
    """Warn when `k`, if the router uses it, exceeds the `size` of the pool.

    Not of the router's own, which nobody may have asked for. `of` begins what is said of the size.
    """
    if router.uses_k and router.k != router.spec.k and router.k > size:
        experts = "1 expert" if size == 1 else f"{size} experts"
        warnings.warn(f"k is {router.k}, but {of} {experts}; k is lowered.", stacklevel=stacklevel)


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
