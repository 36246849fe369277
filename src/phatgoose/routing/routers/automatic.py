"""Router auto, the default: the first of a list that base and experts allow (docs/routers.md)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Routing
from ...errors import PoolError
from ...experts.pool import REMEDIES, Pool
from ...tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed
from .registry import AUTO, ROUTERS

# A decoder's token is routed before the prompt has said its task: who reads all of it comes first.
BY_PROMPT = ("discriminant", "retrieval")  # by the prompt alone
NO_CHOICE = (
    "Nothing that these experts share lets a router choose by a prompt alone; run 'phatgoose "
    "stats' on each, with its data, for readings and embeddings."
)
BY_TOKEN = ("phatgoose", "average-activation", "arrow", "merged")
ENCODER_DECODER: tuple[str, ...] = BY_TOKEN
DECODER_ONLY: tuple[str, ...] = (*BY_PROMPT, *BY_TOKEN)

logger = logging.getLogger(__name__)


def settled(
    routing: Routing,
    pool: Pool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Routing:
    """`routing` with the first router that the experts of `pool` allow in place of auto.

    The choice is logged in one line. Each list ends with a router that needs nothing.
    """
    order = ENCODER_DECODER if model.config.is_encoder_decoder else DECODER_ONLY
    if tokenizer is None:
        order = BY_TOKEN
    return _settled(routing, pool, order)


def settled_by_token(routing: Routing, pool: Pool) -> Routing:
    """As `settled`, by a router that looks at tokens only."""
    return _settled(routing, pool, BY_TOKEN)


def settled_by_prompt(routing: Routing, pool: Pool) -> Routing:
    """As `settled`, by a router that looks at the prompt alone.

    Raises PoolError when the experts allow none.
    """
    return _settled(routing, pool, BY_PROMPT)


def _settled(routing: Routing, pool: Pool, order: Iterable[str]) -> Routing:
    if routing.router != AUTO:
        return routing
    missing: dict[str, None] = {}
    for name in order:
        if unmet := _unmet(pool, name):
            missing |= dict.fromkeys(unmet)
            continue
        if routing.k is not None and ROUTERS[name].k is None:
            warnings.warn(f"Router auto is {name}, which doesn't use k.", stacklevel=4)
        logger.info("Router auto is %s%s.", name, _why(missing, pool))
        return replace(routing, router=name)
    raise PoolError(NO_CHOICE)


def allows_choice_by_prompt(pool: Pool) -> bool:
    """Whether experts and machine allow a router that looks at the prompt alone."""
    return any(not _unmet(pool, name) for name in BY_PROMPT)


def _unmet(pool: Pool, router: str) -> list[str]:
    """What `router` needs that not every expert has, or this machine."""
    needs = ROUTERS[router].needs
    unmet = [need for need in needs if pool.lacking(need)]
    if "embeddings" in needs and "embeddings" not in unmet and not _embeds_here(pool):
        unmet.append("their embedder on this machine")
    return unmet


def _why(missing: Iterable[str], pool: Pool) -> str:
    def told(need: str) -> str:
        lack = len(pool.lacking(need)) if need in REMEDIES else 0
        some = f" of all experts ({lack} of {len(pool)} lack them)" if 0 < lack < len(pool) else ""
        return {"lora": "LoRAs"}.get(need, need) + some

    named = [told(need) for need in missing]
    commands = dict.fromkeys(f"phatgoose {REMEDIES[need]}" for need in missing if need in REMEDIES)
    adds = f" ({', '.join(commands)})" if commands else ""
    return f"; routers tried before it need {', '.join(named)}{adds}" if named else ""


def _embeds_here(pool: Pool) -> bool:
    made = {(expert.info.embedder, expert.info.embedding_form) for expert in pool.experts}
    return can_embed() and made == {(DEFAULT_EMBEDDER, PROMPT)}
