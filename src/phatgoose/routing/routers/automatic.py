"""Router auto: the first router of a list that a base and its experts allow (docs/routers.md)."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import Routing
from ...errors import PoolError
from ...experts.pool import Pool
from ...tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed
from .registry import AUTO, ROUTERS

ENCODER_DECODER: tuple[str, ...] = ("phatgoose", "average-activation", "arrow", "merged")
# A decoder's token is routed before the prompt has said its task: who reads all of it comes first.
# Two kinds of reading come before one, where the embedder is on this machine.
DECODER_ONLY: tuple[str, ...] = ("joint-discriminant", "discriminant", *ENCODER_DECODER)
BY_PROMPT = ("joint-discriminant", "discriminant", "retrieval")  # by the prompt alone

logger = logging.getLogger(__name__)


def settled(
    routing: Routing,
    pool: Pool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Routing:
    """`routing` with the first router that the experts of `pool` allow in the place of auto."""
    if routing.router != AUTO:
        return routing
    order = ENCODER_DECODER if model.config.is_encoder_decoder else DECODER_ONLY
    if tokenizer is None:
        order = tuple(name for name in order if not ROUTERS[name].per_input)
    name = next(name for name in order if _allows(pool, name))
    if routing.k is not None and ROUTERS[name].k is None:
        warnings.warn(f"Router auto is {name}, which doesn't use k.", stacklevel=3)
    passed = [f"{each} ({', '.join(ROUTERS[each].needs)})" for each in order[: order.index(name)]]
    lacks = f"; what these need isn't all there: {', '.join(passed)}" if passed else ""
    logger.info("Router auto is %s%s.", name, lacks)
    return replace(routing, router=name)


def settled_by_prompt(routing: Routing, pool: Pool) -> Routing:
    """`routing` with the first of `BY_PROMPT` that the experts of `pool` allow in place of auto.

    Raises PoolError when they allow none.
    """
    if routing.router != AUTO:
        return routing
    for name in BY_PROMPT:
        if _allows(pool, name):
            return replace(routing, router=name)
    raise PoolError(
        "Nothing that these experts share lets a router choose by a prompt alone; run 'phatgoose "
        "measure' on each, with its data, for readings and embeddings."
    )


def _allows(pool: Pool, router: str) -> bool:
    needs = ROUTERS[router].needs
    if "embeddings" in needs and not _embeds_here(pool):
        return False
    return all(expert.has(need) for expert in pool.experts for need in needs)


def _embeds_here(pool: Pool) -> bool:
    made = {(expert.info.embedder, expert.info.embedding_form) for expert in pool.experts}
    return can_embed() and made == {(DEFAULT_EMBEDDER, PROMPT)}
