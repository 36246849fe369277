"""Opening a model from any place: a routed model's folder, a pool, an expert, a base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import WANTED, Base, closest_beside, load_base
from ..config import Routing, RoutingSettings, from_mapping
from ..errors import BaseModelError, ConfigError
from ..experts.hub import HubReference
from ..experts.pool import Pool
from ..files import reason, shortened
from .compose import compose
from .routers.automatic import settled_by_prompt
from .routers.prompt_router import ByPrompt, PromptRouter
from .routers.router import Scores, check_routing, check_served, router_of
from .saved.load import load
from .saved.tensors import ROUTED_INFO, read_saved

ANY_WANTED = (
    "Wanted: a pool (a folder of experts or of PEFT adapters, hub:OWNER/NAME, a manifest), a "
    "routed model's folder, or a base model (a Hub id, a folder, or 'smollm2')."
)


@dataclass(frozen=True)
class OpenedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def is_routed(place: str | Path) -> bool:
    """True for a folder that `save_pretrained` of a routed model wrote."""
    with _looking_at(place):
        return (Path(place) / ROUTED_INFO).is_file()


def is_pool(place: str | Path) -> bool:
    """True for a manifest, an expert's directory, a folder of such, or a reference to the Hub."""
    if HubReference.is_one(place):
        return True
    path = Path(place)
    with _looking_at(place):
        is_model = (path / "config.json").is_file() or is_routed(path)
        return path.suffix == ".json" or (path.is_dir() and not is_model)


@contextmanager
def _looking_at(place: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{shortened(str(place))} can't be opened as a model: {reason(error)}; wanted a pool, "
            f"an expert, the folder of a routed model, or a base."
        ) from error


def require_pool(place: str | Path) -> None:
    """Raise ConfigError unless `place` is a pool."""
    if not is_pool(place):
        there = Path(place).exists()
        gone = "" if there else f" No folder {place} is here.{closest_beside(place)}"
        raise ConfigError(
            f"{place} is not a pool: a routed model has its own router and experts, and a base "
            f"alone has none. Name the pool to choose them.{gone}"
        )


@contextmanager
def naming_all_places(place: str | Path) -> Iterator[None]:
    """Errors of loading the base at `place`, if nothing is there, name all that could be."""
    try:
        yield
    except BaseModelError as error:
        if Path(place).exists():
            raise
        message = str(error).removeprefix("Base model ").replace(WANTED, ANY_WANTED)
        raise BaseModelError(message) from error


def open_model(
    place: str | Path,
    base: Base | str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    scores: Scores | str | Path | None = None,
) -> OpenedModel:
    """The model at `place`: a routed one, a pool composed by `routing`, or a base model alone.

    `base`, a loaded one or a name, serves pools and routed models; None loads the one they name.
    `keep`, `leave_out` and `scores` are those of `compose`, for pools alone; of `routing` a routed
    model takes the embedder. Raises ConfigError when another place is given them, and what loading
    or composing does.
    """
    if keep or leave_out or scores:
        require_pool(place)
    if is_routed(place):
        embedder = routing.embedder if routing else None
        routed = load(place, base, dtype=dtype, embedder=embedder)
    elif is_pool(place):
        pool = Pool.open(place).select(keep, leave_out)
        routed = compose(pool, loaded_base(pool, base, dtype), scores=scores, routing=routing)
    else:
        with naming_all_places(place):
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
        routing = replace(saved.routing, embedder=routing.embedder)
        router, tables = _by_prompt(routing), saved.tables
    else:
        pool = Pool.open(place)
        router = _by_prompt(settled_by_prompt(routing, pool))
        check_routing(router, pool)
        tables = router.tables(pool)
    return router.prompt_router(tables, tokenizer)


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
