"""Opening any place: a routed model's folder, a pool, a base; or a pool's chooser alone."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from ..base.identity import Base
from ..config import Routing, RoutingSettings, from_mapping
from ..errors import ConfigError
from ..experts.hub import HubReference
from ..experts.pool import TABLE, Pool
from ..names import CONFIG, ROUTED_INFO, closest_beside
from .routers.auto import BY_PROMPT, first_allowed
from .routers.prompt import ByPrompt, PromptChooser
from .routers.router import Scores, check_routing, check_served, router_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_routed(place: str | Path) -> bool:
    """True for a folder that `save` of a routed model wrote."""
    return os.path.isfile(os.path.join(place, ROUTED_INFO))


def is_pool(place: str | Path) -> bool:
    """True for an expert's directory, a folder or a TABLE of such, or a reference to the Hub."""
    if HubReference.is_one(place):
        return True
    is_model = os.path.isfile(os.path.join(place, CONFIG)) or is_routed(place)
    is_table = str(place).endswith(TABLE) and os.path.isfile(place)
    return is_table or (os.path.isdir(place) and not is_model)


def require_pool(place: str | Path) -> None:
    """Raise ConfigError unless `place` is a pool."""
    if not is_pool(place):
        gone = ""
        if not os.path.exists(place):
            gone = f" No folder {place} is here.{closest_beside(place)}"
        raise ConfigError(
            f"{place} is not a pool: a routed model has its own router and experts, and a base "
            f"alone has none. Name the pool to choose them.{gone}"
        )


def open_model(
    place: Pool | str | Path,
    base: Base | str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    scores: Scores | str | Path | None = None,
) -> Base:
    """The model at `place`: a routed one, a pool composed by `routing`, or a base model alone.

    `base`, a loaded one or a name, serves pools and routed models; None loads the one they name.
    `scores` are those of `compose`, for pools alone; of `routing` a routed model takes the
    embedder. Raises ConfigError when another place is given scores, and what loading or composing
    does.
    """
    # A chooser needs nothing of these, which take seconds.
    from ..base.loading import load_base
    from .compose import compose, composition_of, load, resolve_base

    if isinstance(place, Pool) or is_pool(place):
        pool = Pool.open(place)
        loaded = resolve_base(base, pool.base, dtype)
        model = compose(pool, loaded, routing=routing, scores=scores)
    else:
        if scores:
            require_pool(place)
        if not is_routed(place):
            return load_base(place, dtype=dtype)
        settings = routing or Routing()
        model = load(place, base, dtype=dtype, embedder=settings.embedder, reader=settings.reader)
    parts = composition_of(model)
    return Base(model, parts.tokenizer, **asdict(parts.base))


def open_chooser(
    place: Pool | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    routing: Routing | None = None,
    **settings: Unpack[RoutingSettings],
) -> PromptChooser:
    """What chooses the experts of a pool for a prompt; no base is loaded.

        chooser = open_chooser("experts/")
        chooser.choose(["What is 12 + 7?"]).named(chooser.experts)

    `routing` and `settings` are those of `compose`. Prompts are as a `PromptChooser` takes them;
    those that are tokens need the `tokenizer` that made them. Raises ConfigError for a router that
    looks at no prompt, and what opening a pool raises.
    """
    values = {**vars(routing or Routing()), **settings}
    routing = from_mapping(Routing, values, "open_chooser")
    pool = Pool.open(place).measured(routing.reader)
    router = router_of(first_allowed(routing, pool, BY_PROMPT))
    if not isinstance(router, ByPrompt):
        raise ConfigError(
            f"Router {router.name} doesn't choose by a prompt alone; use retrieval, centroid or "
            f"discriminant."
        )
    check_served(router)
    check_routing(router, pool)
    return PromptChooser(router, router.tables(pool), tokenizer)
