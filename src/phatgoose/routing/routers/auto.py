"""Router auto, the default: the first of a list that base and experts allow (docs/routers.md)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...config import Routing
from ...errors import PoolError
from ...experts.pool import REMEDIES, Pool
from ...tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed
from .registry import AUTO, OURS
from .router import PLURAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A decoder's token is routed before the prompt has said its task: who reads all of it comes first.
BY_PROMPT = ("discriminant", "retrieval")  # by the prompt alone
NO_CHOICE = (
    "Nothing that these experts share lets a router choose by a prompt alone; run 'phatgoose "
    "stats' on each, with its data, for prompt statistics and embeddings."
)
BY_TOKEN = ("phatgoose", "average-activation", "arrow", "merged")

FEW_DO = (
    ", hardly better than the base alone on small models; three example prompts an adapter change "
    "that: phatgoose stats EXPERT --prompts …, or prompts.txt beside it"
)

logger = logging.getLogger(__name__)


def resolved(routing: Routing, pool: Pool, tokenizer: PreTrainedTokenizerBase | None) -> Routing:
    """`routing` with the first router that the experts allow, if it is auto.

    Without a tokenizer no prompt can be read.
    """
    return first_allowed(routing, pool, BY_TOKEN if tokenizer is None else (*BY_PROMPT, *BY_TOKEN))


def first_allowed(routing: Routing, pool: Pool, order: Iterable[str]) -> Routing:
    """`routing` with the first router of `order` that the experts of `pool` allow, if it is auto.

    The choice is logged in one line. Raises PoolError when they allow none.
    """
    if routing.router != AUTO:
        return routing
    missing: dict[str, None] = {}
    for name in order:
        if unmet := _unmet(pool, name):
            missing |= dict.fromkeys(unmet)
            continue
        if routing.k is not None and OURS[name].k is None:
            warnings.warn(f"Router auto is {name}, which doesn't use k.", stacklevel=4)
        commands = {need: f" (phatgoose {REMEDIES[need]})" for need in REMEDIES}
        needs = ", ".join(PLURAL.get(need, need) + commands.get(need, "") for need in missing)
        why = f"; routers tried before it need {needs} of all experts" if missing else ""
        if "prompt_statistics" in missing and name in ("arrow", "merged"):
            why = FEW_DO
        logger.info("Router auto is %s%s.", name, why)
        return replace(routing, router=name)
    raise PoolError(NO_CHOICE)


def allows_choice_by_prompt(pool: Pool) -> bool:
    """Whether experts and machine allow a router that looks at the prompt alone."""
    experts = pool.experts
    has_prompts = all(expert.has("prompt_statistics") or expert.prompts for expert in experts)
    return has_prompts or any(not _unmet(pool, name) for name in BY_PROMPT)


def _unmet(pool: Pool, router: str) -> list[str]:
    """What `router` needs that not every expert has, or this machine."""
    needs = OURS[router].needs
    unmet = [need for need in needs if pool.lacking(need)]
    made = {(expert.info.embedder, expert.info.embedding_form) for expert in pool.experts}
    embeds_here = can_embed() and made == {(DEFAULT_EMBEDDER, PROMPT)}
    if needs == ("embeddings",) and not unmet and not embeds_here:
        unmet.append("their embedder on this machine")
    return unmet
