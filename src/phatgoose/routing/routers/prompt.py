"""Routers that choose for a whole prompt: features of its texts, scores of them, experts, weights.

A `PromptChooser` needs no composed model and no base (`compose.open_chooser` makes one of a pool).
In a routed model the sites follow it through a `RoutingContext`.

What fits no expert is left to the base. So a router that falls back scores, beside the experts,
the base's classes of texts (`conversation.base_texts`). Not in the paper.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...config import RATIO
from ...errors import PoolError, RoutingError
from ...experts.pool import Pool
from ...experts.sums import dense_weights
from ...tasks.encoding import said_in_tokens
from ..choice import BASE, Choice, Chosen
from ..conversation import MARGIN, ChatTexts, ScoredText, Views, deciding_text
from .router import Router, RouterAtSite, RoutingDecision, Scores, highest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWNERS = "owners"  # among tables, whose experts the rows of the others are
OFF = "off"
REMEMBERED = 1 << 24  # numbers at most: scores of texts
NEAREST = 3  # example prompts that are shown
AROUND = 256  # numbers' worth of memory around those of one text
Prompt = str | Sequence[int] | ChatTexts  # text, tokens as the model reads them, or a chat
Prompts = Sequence[Prompt]
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
Names: TypeAlias = "Collection[str] | None"
Known = Mapping[str, Any]  # what else is said of prompts: their task and examples, or their client


@dataclass(frozen=True)
class Tables:
    """What a prompt router knows of its experts, as it is saved with a model (docs/format.md).

    `names` are the pool's in order. `tensors` have a row for each expert, or any number of rows
    whose experts are `owners` among them; `info`, JSON, says who made them.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def saved(self) -> dict[str, Tensor]:
        return {f"lookup.{name}": tensor for name, tensor in self.tensors.items()}

    def grown(self, more: Tables) -> Tables:
        """These experts and `more`, in order. Raises PoolError when they can't be compared."""
        if (theirs := more._form) != (ours := self._form):
            raise PoolError(
                f"The new experts' statistics are {theirs}, those there {ours}; measure them again."
            )
        # Owners are indices, which go on from the experts before.
        owners = {OWNERS: len(self.names)}
        tensors = {
            name: torch.cat([rows, more.tensors[name] + owners.get(name, 0)])
            for name, rows in self.tensors.items()
        }
        return Tables((*self.names, *more.names), tensors, self.info)

    @property
    def _form(self) -> dict[str, object]:
        sizes = {name: [*tensor.shape[1:]] for name, tensor in self.tensors.items()}
        return {**sizes, **self.info}

    def shrunk(self, place: Tensor) -> Tables:
        """The tables with experts at their new index in `place` [E]; -1 if an expert leaves."""
        names = tuple(name for name, z in zip(self.names, place.tolist(), strict=True) if z >= 0)
        owners = place[self.tensors[OWNERS]] if OWNERS in self.tensors else place
        tensors = {name: rows[owners >= 0] for name, rows in self.tensors.items()}
        if OWNERS in tensors:
            tensors[OWNERS] = owners[owners >= 0]
        return Tables(names, tensors, self.info)


Fallback: TypeAlias = Annotated[
    Literal["off"] | Annotated[float, RATIO],
    "By how much the base may score more than the best expert before it answers alone; off: an "
    "expert answers whatever comes, by the last message alone.",
]


@dataclass(frozen=True)
class ByPrompt(Router):
    """The base of routers that choose experts for a whole prompt.

    They make `tables` of a pool, which are saved with a model; `ready` turns them into whatever
    scores are made with. Of prompts they make `features`, and of these `prompt_scores`. The k best
    act, weighted by the softmax of their scores over the setting `temperature`, if there is one.
    """

    per_input, by_token = True, False
    prompt_sizes: ClassVar[Mapping[str, str]] = {}  # of the tables, as `sizes`; M if by "owners"
    chooses: ClassVar[bool] = True  # False where weights are scores of all experts

    @property
    def falls_back(self) -> bool:
        """Whether the base may answer alone."""
        return bool(getattr(self, "fallback", OFF) != OFF)

    @property
    def prompt_k(self) -> int:
        """How many experts a prompt gets."""
        return self.k

    def tables(self, pool: Pool, scores: Scores | None = None) -> Tables:
        """What there is to know of the experts of `pool`.

        Raises PoolError when an expert lacks what it needs, ConfigError without `scores` where they
        are needed.
        """
        return Tables(pool.names)

    def ready(self, tables: Tables) -> Any:
        """What to score with. Raises RoutingError and ConfigError for tables that are no use."""
        return tables

    def allowances(self, tables: Tables, ready: Any) -> Tensor:
        """By how much the base may score more than each expert before it answers, [E]."""
        return torch.full((len(tables.names),), float(getattr(self, "fallback", 0)))

    def helpers_score(self, ready: Any) -> float:
        """What a text in the middle of the helpers' class scores; infinite where there is none."""
        return float("inf")

    def features(self, chooser: PromptChooser, texts: Sequence[str]) -> Any:
        """What the scores of these texts go by: a tensor [texts, ..], or a pair of them."""
        raise NotImplementedError

    def prompt_scores(self, features: Any, ready: Any) -> Tensor:
        """The score of each text and expert, float32 [texts, E].

        After the experts those of the base's classes, if the router falls back.
        """
        raise NotImplementedError

    def score(self, chooser: PromptChooser, texts: Sequence[str]) -> Tensor:
        return self.prompt_scores(self.features(chooser, texts), chooser.ready)

    def choice(self, scores: Tensor) -> Choice:
        """The k best of each of `scores` [prompts, E], at most E. One has weight 1 exactly."""
        return best_of(scores, self.prompt_k, getattr(self, "temperature", 1.0))

    def choose(self, chooser: PromptChooser, prompts: Prompts, known: Known) -> Choice:
        """The choice for each prompt; evaluations say what else is `known` of them."""
        deciding = chooser.deciding_scores(prompts, known)
        scores = torch.stack([scores[: len(chooser.experts)] for scores in deciding])
        return self.choice(scores).left_to_base(scores.isneginf().all(dim=1))

    # At a site: the experts that the context has for each row, as it weighs them.

    def decision(
        self, u: Tensor, at_site: RouterAtSite, active: Tensor | None = None
    ) -> RoutingDecision:
        choice = choice_at(u, at_site)
        experts = at_site.position[choice.experts]
        # Absent here, or NOBODY (the base): row 0 with weight 0.
        weights, experts = choice.weights * (experts >= 0), experts.clamp(min=0)
        if active is not None:
            weights = weights * active.gather(1, experts)
        return RoutingDecision(experts, weights)

    def distribution(self, u: Tensor, at_site: RouterAtSite) -> Tensor:
        decision = self.decision(u, at_site)
        return dense_weights(decision.experts, decision.weights, at_site.E)


def choice_at(u: Tensor, at_site: RouterAtSite) -> Choice:
    """The experts that were chosen for the prompt of each token of u [T, n]."""
    context = at_site.context
    if context is None:
        raise RoutingError(
            "This layer is in no routed model, so nothing was chosen for its inputs."
        )
    return context.choice_by_token(u, at_site.sees_all)


def best_of(scores: Tensor, k: int, temperature: float = 1.0) -> Choice:
    """The k best of `scores` [.., E], by the softmax of these over the `temperature`."""
    experts = highest(scores, min(k, scores.shape[-1]))
    return Choice(experts, (scores.gather(-1, experts).float() / temperature).softmax(dim=-1))


class Deciding(NamedTuple):
    """The text by which a prompt gets experts, None for the base, and the last that was said."""

    text: ScoredText | None
    last: ScoredText | None = None


class PromptChooser:
    """Chooses experts for prompts by a `router`, among the experts in `tables`.

    Prompts are text, chats (`ChatTexts`), or tokens as a base's `tokenizer` makes them, which are
    read as the text that they stand for, without special tokens and chat template.
    """

    def __init__(self, router: ByPrompt, tables: Tables, tokenizer: Tokenizer = None) -> None:
        self.router = router
        self.tables = tables
        self.tokenizer = tokenizer
        self.ready: Any = router.ready(tables)
        self.name = router.name
        self.k = router.prompt_k
        self.unserved = router.unserved
        self.left: Collection[str] = ()  # experts whose prompts the base answers
        self._scores: dict[bytes, Tensor] = {}  # of texts that were read, by their hash

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts whose indices a choice has."""
        return self.tables.names

    def score(self, prompts: Prompts) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]; of a chat's last message."""
        chats = [self._chat(prompt) for prompt in prompts]
        if not chats or not all(chat.messages for chat in chats):
            raise RoutingError(f"Router {self.name} can't score an empty prompt, or none.")
        texts = [chat.messages[-1].wholes[0] for chat in chats]
        return self.router.score(self, texts)[..., : len(self.experts)]

    def choose(self, prompts: Prompts, allowed: Names = None, **known: Any) -> Choice:
        """The experts of each prompt and their weights, [prompts, k]; `Choice.named` names them.

        `allowed` names those of all experts that may act; None allows all. Evaluations hand over
        what else is `known`, the `task` and its `examples`; a server its `client`. Raises
        RoutingError for no prompts, and for tokens without a tokenizer.
        """
        limited = self._limited(known, allowed)
        choice = self.router.choose(self, prompts, limited)
        acts = torch.tensor([name not in self.left for name in self.experts])
        acts &= limited.get("allowed", acts)
        return choice.left_to_base(~acts[choice.experts.clamp(min=0)])  # whatever the router does

    def explained(
        self, choice: Choice, prompts: Prompts, allowed: Names = None, **known: Any
    ) -> list[Chosen]:
        """The `choice` that was made of all this, with the texts that decided and their scores.

        Routers that read no prompts have neither.
        """
        chosen = []
        deciding = [Deciding(None)] * len(choice)
        if self.router.per_input:
            deciding = self._deciding(prompts, self._limited(known, allowed))
        for weights, decided in zip(choice.named(self.experts), deciding, strict=True):
            text = decided.text or decided.last
            if text is None:
                chosen.append(Chosen(weights))
                continue
            scores = dict(zip(self.experts, text.scores.tolist(), strict=False))
            of_base = text.scores[len(self.experts) : -1]
            if len(of_base):
                scores[BASE] = float(of_base.max())
            best_first = sorted(scores, key=scores.__getitem__, reverse=True)
            known_scores = {name: scores[name] for name in best_first if scores[name] > -inf}
            chosen.append(Chosen(weights, known_scores, text.view))
        return chosen

    def nearest(self, text: str, examples: Sequence[str]) -> list[str]:
        """The NEAREST of `examples` that the router finds most like the `text`, best first."""
        features = self.router.features(self, [text, *examples])
        if isinstance(features, tuple):
            features = features[0]
        rows = features.flatten(1)
        rows = normalize(rows - rows.mean(dim=0), dim=1)
        best = (rows[1:] @ rows[0]).argsort(descending=True, stable=True)
        return [examples[number] for number in best[:NEAREST].tolist()]

    def _limited(self, known: Known, allowed: Names) -> Known:
        """What is known, with a mask of the experts that are `allowed` unless all are."""
        if allowed is None or set(self.experts) <= set(allowed):
            return known
        mask = torch.tensor([name in allowed for name in self.experts])
        return {**known, "allowed": mask}

    def deciding_scores(self, prompts: Prompts, known: Known) -> list[Tensor]:
        """The scores [E + classes] by which each prompt gets experts; all are -inf for the base.

        Where nobody says anything the base answers, by [E].
        """
        nobody = torch.full((len(self.experts),), -torch.inf)
        scores = []
        for text, last in self._deciding(prompts, known):
            if text is not None:
                scores.append(text.scores)
            elif last is not None:
                scores.append(torch.full_like(last.scores, -torch.inf))
            else:
                scores.append(nobody)
        return scores

    def _deciding(self, prompts: Prompts, known: Known) -> list[Deciding]:
        """The text by which each prompt gets experts.

        A chat's texts are read from the last one backwards, until one is decided by itself.
        """
        chats = [self._chat(prompt) for prompt in prompts]
        if not chats:
            raise RoutingError(f"Router {self.name} can't choose: there is no prompt.")
        texts = [[*reversed(chat.messages), *filter(None, [chat.system])] for chat in chats]
        scored = [list[ScoredText]() for _ in chats]
        undecided = [row for row, chat in enumerate(chats) if chat.messages]
        depth = 0
        while undecided:
            now = self._scored([texts[row][depth] for row in undecided], known)
            for row, text in zip(undecided, now, strict=True):
                scored[row].append(text)
            depth += 1
            open_ones = [row for row in undecided if not scored[row][-1].decides]
            undecided = [row for row in open_ones if depth < len(texts[row])]
        deciding = []
        for chat, newest_first in zip(chats, scored, strict=True):
            count = len(chat.messages)
            messages = newest_first[count - 1 :: -1]
            by = deciding_text(messages, *newest_first[count:])
            deciding.append(Deciding(by, *newest_first[:1]))
        return deciding

    def _scored(self, texts: Sequence[Views], known: Known) -> list[ScoredText]:
        """What each text is most like. Parts are read where they could be ahead of wholes."""
        falls_back = self.router.falls_back
        allowances = torch.full((len(self.experts),), torch.inf)
        if falls_back:
            allowances = self.router.allowances(self.tables, self.ready)
        helpers = self.router.helpers_score(self.ready)
        wholes = self._read([text.wholes for text in texts], known)
        scored = []
        unsure = []
        for row, (text, scores) in enumerate(zip(texts, wholes, strict=True)):
            scored.append(ScoredText(scores, allowances, None, helpers, text.wholes))
            is_sure = falls_back and scored[row].lead > MARGIN
            if text.parts and not is_sure:
                unsure.append(row)
        parts = self._read([texts[row].parts for row in unsure], known)
        for row, scores in zip(unsure, parts, strict=True):
            views = texts[row].wholes + texts[row].parts
            every = torch.cat([wholes[row], scores])
            scored[row] = ScoredText(every, allowances, len(wholes[row]), helpers, views)
        return scored

    def _read(self, texts: Sequence[Sequence[str]], known: Known) -> list[Tensor]:
        """The scores [V, E + classes] of the views of each of `texts`.

        A client's distinct ones are read once. Those of others are read again: the time would tell
        what they asked.
        """
        if not texts:
            return []
        client = known.get("client")
        scored = self._scores
        views = list(itertools.chain.from_iterable(texts))
        keys = [hashlib.sha256(repr((client, view)).encode()).digest() for view in views]
        new = {key: view for key, view in zip(keys, views, strict=True) if key not in scored}
        fresh = dict[bytes, Tensor]()
        if new:
            scores = self.router.score(self, list(new.values()))
            fresh = dict(zip(new, scores, strict=True))
        rows = torch.stack([fresh[key] if key in fresh else scored[key] for key in keys])
        scored.update(fresh)
        if len(scored) * (AROUND + rows.shape[1]) > REMEMBERED:
            self._scores = {}
        allowed = known.get("allowed")
        if allowed is not None:
            others = torch.ones(rows.shape[1] - len(allowed), dtype=torch.bool)
            rows = rows.where(torch.cat([allowed, others]), -torch.inf)
        return list(torch.split(rows, [len(text) for text in texts]))

    def _chat(self, prompt: Prompt) -> ChatTexts:
        if isinstance(prompt, ChatTexts):
            chat = prompt
        elif isinstance(prompt, str):
            chat = ChatTexts.of([("user", prompt)])
        elif self.tokenizer is not None:
            chat = ChatTexts.of([("user", said_in_tokens(self.tokenizer, prompt))])
        else:
            raise RoutingError(
                f"Router {self.name} reads text, and was given tokens without the tokenizer that "
                f"made them."
            )
        return chat
