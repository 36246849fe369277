"""Opening a model from any place: a routed model's folder, a pool, an expert, a base."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import Base, closest_beside, load_base
from ..config import Routing, RoutingSettings, from_mapping
from ..errors import ConfigError
from ..experts.hub import HubReference
from ..experts.pool import MANIFEST, Pool
from .compose import composed
from .routers.auto import BY_PROMPT, first_allowed
from .routers.prompt import ByPrompt, PromptRouter
from .routers.registry import router_of
from .routers.router import check_routing, check_served
from .routers.scores import Scores
from .saved import CONFIG, ROUTED_INFO, load, read_saved


@dataclass(frozen=True)
class OpenedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def is_routed(place: str | Path) -> bool:
    """True for a folder that `save` of a routed model wrote."""
    return os.path.isfile(os.path.join(place, ROUTED_INFO))


def is_pool(place: str | Path) -> bool:
    """True for a manifest, an expert's directory, a folder of such, or a reference to the Hub."""
    if HubReference.is_one(place) or Path(place).suffix == MANIFEST:
        return True
    is_model = os.path.isfile(os.path.join(place, CONFIG)) or is_routed(place)
    return os.path.isdir(place) and not is_model


def require_pool(place: str | Path) -> None:
    """Raise ConfigError unless `place` is a pool."""
    if not is_pool(place):
        there = Path(place).exists()
        gone = "" if there else f" No folder {place} is here.{closest_beside(place)}"
        raise ConfigError(
            f"{place} is not a pool: a routed model has its own router and experts, and a base "
            f"alone has none. Name the pool to choose them.{gone}"
        )


def open_model(
    place: str | Path,
    base: Base | str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    scores: Scores | str | Path | None = None,
    may_fold: bool = True,
) -> OpenedModel:
    """The model at `place`: a routed one, a pool composed by `routing`, or a base model alone.

    `base`, a loaded one or a name, serves pools and routed models; None loads the one they name.
    `keep`, `leave_out` and `scores` are those of `compose`, for pools alone; of `routing` a routed
    model takes the embedder. Without `may_fold` a pool's experts keep their factors.
    Raises ConfigError when another place is given them, and what loading or composing does.
    """
    if keep or leave_out or scores:
        require_pool(place)
    if is_routed(place):
        embedder = routing.embedder if routing else None
        routed = load(place, base, dtype=dtype, embedder=embedder)
    elif is_pool(place):
        pool = Pool.open(place).select(keep, leave_out)
        loaded = loaded_base(pool, base, dtype)
        routed = composed(pool, loaded, routing, scores=scores, may_fold=may_fold)
    else:
        alone = load_base(place, dtype=dtype)
        return OpenedModel(alone.model, alone.tokenizer)
    return OpenedModel(routed, routed.phatgoose.tokenizer)


def open_prompt_router(
    place: Pool | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    routing: Routing | None = None,
    **settings: Unpack[RoutingSettings],
) -> PromptRouter:
    """What chooses the experts of a pool or a saved model for a prompt; no base is loaded.

        chooser = open_prompt_router("experts/", router="retrieval")
        chooser.choose(["What is 12 + 7?"]).named(chooser.experts)

    `routing` and `settings` are those of `compose`; of a saved model's only the embedder counts.
    Prompts are as a `PromptRouter` takes them: text without a `tokenizer` for routers that go by
    embeddings alone; those that go by what the base makes of a prompt are handed `base` in
    `choose`. Raises ConfigError for a router that looks at no prompt,
    and what composing or loading raises of the experts.
    """
    routing = routing or Routing()
    if settings:
        routing = from_mapping(Routing, {**vars(routing), **settings}, "open_prompt_router")
    if not isinstance(place, Pool) and is_routed(place):
        saved = read_saved(Path(place))
        routing = replace(saved.router.routing, embedder=routing.embedder)
        router, tables = _by_prompt(routing), saved.tables
    else:
        pool = Pool.open(place)
        router = _by_prompt(first_allowed(routing, pool, BY_PROMPT))
        check_routing(router, pool)
        tables = router.tables(pool)
    return PromptRouter(router, tables, tokenizer)


def _by_prompt(routing: Routing) -> ByPrompt:
    router = router_of(routing)
    if not isinstance(router, ByPrompt):
        raise ConfigError(
            f"Router {routing.router} doesn't choose by a prompt alone; use retrieval, centroid "
            f"or discriminant."
        )
    check_served(router)
    return router


def loaded_base(pool: Pool, base: Base | str | None = None, dtype: str = "auto") -> Base:
    """`base`, or the one that `pool` names; loaded in `dtype` unless it is loaded already."""
    if isinstance(base, Base):
        return base
    revision = None if base else pool.base.revision
    return load_base(base or pool.base.id, dtype=dtype, revision=revision)
