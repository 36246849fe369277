"""Routers that choose for a whole prompt: features of it, scores of them, experts and weights.

A `PromptChooser` needs no composed model (`compose.open_chooser` makes one of a pool). In a
routed model the sites follow it through a `RoutingContext`.

What fits no expert is left to the base. So a router that falls back scores, beside the experts,
the base's classes of texts (`conversation.base_texts`). What a router makes of these is read once
and saved with a model. Not in the paper.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...config import RATIO, Formatting
from ...errors import PoolError, RoutingError
from ...experts.kind import dense_weights
from ...experts.pool import Pool
from ...tasks.batching import PromptReading, read_prompts
from ...tasks.embeddings import prompt_texts
from ...tasks.encoding import Encoder
from ..choice import Choice
from ..context import base_alone
from ..conversation import ChatTexts, ScoredText, answer_to, base_texts
from .router import Router, RouterAtSite, RoutingDecision, Scores, highest

OWNERS = "owners"  # among tables, whose experts the rows of the others are
OF_BASE = "base."  # before the names of tables of the base's classes
OFF = "off"
REMEMBERED = 1 << 24  # numbers at most: scores of texts
AROUND = 256  # numbers' worth of memory around those of one text
# Of each base that lives, by its embeddings (else a tokenizer): what routers make of its classes.
of_bases: Any = WeakIdKeyDictionary()

Text = str | Sequence[int]  # text, or tokens as the model reads them
Prompts = Sequence[Text]
Asked = Sequence[Text | ChatTexts]  # prompts, some of them chats
Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"
Names: TypeAlias = "Collection[str] | None"
Then: TypeAlias = "Callable[[Tensor], Tensor] | None"
Base: TypeAlias = "PreTrainedModel | None"
Known = Mapping[str, Any]  # what else is said of prompts: their task and examples, or their client


@dataclass(frozen=True)
class Tables:
    """What a prompt router knows of its experts, as it is saved with a model (docs/format.md).

    `names` are the pool's in order. `tensors` have a row for each expert, or any number of rows
    whose experts are `owners` among them; `info` is JSON. `base` is what there is of the base's
    classes, empty before it is read.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)

    def saved(self) -> dict[str, Tensor]:
        of_base = {OF_BASE + name: tensor for name, tensor in self.base.items()}
        return {f"lookup.{name}": tensor for name, tensor in {**self.tensors, **of_base}.items()}

    def grown(self, more: Tables) -> Tables:
        """These experts and `more`, in order. Raises PoolError when they can't be compared."""
        forms = [
            {n: [*each.tensors[n].shape[1:]] for n in self.tensors}  # older ones have fewer
            | {"by": each.info.get("embedder")}
            for each in (more, self)
        ]
        if forms[0] != forms[1]:
            raise PoolError(
                f"The new experts' statistics are {forms[0]}, those there {forms[1]}; measure them "
                f"again."
            )
        # Owners are indices, which go on from the experts before.
        owners = {OWNERS: len(self.names)}
        tensors = {
            name: torch.cat([rows, more.tensors[name] + owners.get(name, 0)])
            for name, rows in self.tensors.items()
        }
        return Tables((*self.names, *more.names), tensors, self.info, self.base)

    def shrunk(self, place: Tensor) -> Tables:
        """The tables with experts at their new index in `place` [E]; -1 if an expert leaves."""
        names = tuple(name for name, z in zip(self.names, place.tolist(), strict=True) if z >= 0)
        owners = place[self.tensors[OWNERS]] if OWNERS in self.tensors else place
        tensors = {name: rows[owners >= 0] for name, rows in self.tensors.items()}
        if OWNERS in tensors:
            tensors[OWNERS] = owners[owners >= 0]
        return Tables(names, tensors, self.info, self.base)


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
    later_sizes: ClassVar[Mapping[str, Sequence[str | int]]] = {}  # of what older tables lack
    reads_base: ClassVar[bool] = False  # True where `features` need the base
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

    def check_fits(self, base: PreTrainedModel, tables: Tables) -> None:
        """Raise RoutingError for `tables` that can't be of `base`; by default they always can."""

    def base_tables(
        self, chooser: PromptChooser, classes: Sequence[Sequence[Text]], base: Base
    ) -> Mapping[str, Tensor]:
        """What there is to know of the base's classes, by these texts of each.

        It goes by the router's name and the tables' sizes, not by settings.
        """
        return {}

    def allowances(self, tables: Tables) -> Tensor:
        """By how much the base may score more than each expert before it answers, [E]."""
        return torch.full((len(tables.names),), float(getattr(self, "fallback", 0)))

    def features(self, chooser: PromptChooser, prompts: Prompts, base: Base) -> Any:
        """What scores go by: a tensor [prompts, ..], or a pair of them."""
        raise NotImplementedError

    def prompt_scores(self, features: Any, ready: Any) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E].

        After the experts those of the base's classes, if the tables have any.
        """
        raise NotImplementedError

    def score(self, chooser: PromptChooser, prompts: Prompts, base: Base) -> Tensor:
        return self.prompt_scores(self.features(chooser, prompts, base), chooser.ready)

    def choice(self, scores: Tensor) -> Choice:
        """The k best of each of `scores` [prompts, E], at most E. One has weight 1 exactly."""
        return best_of(scores, self.prompt_k, getattr(self, "temperature", 1.0))

    def choose(self, chooser: PromptChooser, prompts: Asked, base: Base, known: Known) -> Choice:
        """The choice for each prompt; evaluations say what else is `known` of them."""
        scores = torch.stack(chooser.answers(prompts, base, known))[..., : len(chooser.experts)]
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
    return context.of_each(u, at_site.sees_all)


def best_of(scores: Tensor, k: int, temperature: float = 1.0) -> Choice:
    """The k best of `scores` [.., E], by the softmax of these over the `temperature`."""
    experts = highest(scores, min(k, scores.shape[-1]))
    return Choice(experts, (scores.gather(-1, experts).float() / temperature).softmax(dim=-1))


@dataclass(frozen=True)
class ReadsBase(ByPrompt):
    """The base of routers whose features are what the base alone makes of a prompt.

    In a routed model every prompt passes once with no expert at work, before it passes with its
    experts.
    """

    reads_base = True

    def reading(self, base: PreTrainedModel, tables: Tables) -> PromptReading:
        """What takes the features from passes of `base`."""
        raise NotImplementedError

    def features(
        self, chooser: PromptChooser, prompts: Prompts, base: Base, then: Then = None
    ) -> Tensor:
        """What the base makes of `prompts`, and `then` of that, batch by batch."""
        tokens = chooser.tokens(prompts)
        if not tokens or not all(tokens):
            raise RoutingError(f"Router {self.name} can't choose for an empty prompt, or for none.")
        with base_alone(base):
            return read_prompts(base, tokens, self.reading(base, chooser.tables), then=then)

    def score(self, chooser: PromptChooser, prompts: Prompts, base: Base) -> Tensor:
        # Batch by batch: the features of a whole dataset can be gigabytes.
        then = partial(self.prompt_scores, ready=chooser.ready)
        return self.features(chooser, prompts, base, then)


class PromptChooser:
    """Chooses experts for prompts by a `router`, among the experts in `tables`.

    Some features are of a prompt's text, others what the base makes of it; only these need `base`,
    a model, which may be routed by this router: it falls back by what the first one makes of the
    base's texts. Prompts are tokens as the model reads them, chats
    `ChatTexts`; text is tokenised plainly, or where there is no `tokenizer` embedded as it is. With
    `in_chats` the experts' prompts were read in the chat template.
    """

    def __init__(
        self,
        router: ByPrompt,
        tables: Tables,
        tokenizer: Tokenizer = None,
        in_chats: bool = False,
    ) -> None:
        self.router, self.tables, self.tokenizer = router, tables, tokenizer
        self.in_chats = in_chats
        # With the base's classes, experts of a single prompt can be compared too.
        self.ready: Any = None if self._waits_for_base else router.ready(tables)
        self.name, self.k, self.unserved = router.name, router.prompt_k, router.unserved
        self._scores: dict[bytes, Tensor] = {}  # of texts that were read, by their hash

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts whose indices a choice has."""
        return self.tables.names

    def score(self, prompts: Prompts, base: Base = None) -> Tensor:
        """The score of each prompt and expert, float32 [prompts, E]."""
        self.read_base(base)
        return self.router.score(self, prompts, base)[..., : len(self.experts)]

    def choose(
        self, prompts: Asked, base: Base = None, allowed: Names = None, **known: Any
    ) -> Choice:
        """The experts of each prompt and their weights, [prompts, k]; `Choice.named` names them.

        `allowed` names those of all experts that may act; None allows all. Evaluations hand over
        what else is `known`, the `task` and its `examples`; a server its `client`. Raises
        RoutingError where `base` is another one than the experts read, or has nothing to read.
        """
        self.read_base(base)
        if allowed is None or set(self.experts) <= set(allowed):
            return self.router.choose(self, prompts, base, known)
        mask = torch.tensor([name in allowed for name in self.experts])
        choice = self.router.choose(self, prompts, base, {**known, "allowed": mask})
        return choice.left_to_base(~mask[choice.experts.clamp(min=0)])  # whatever the router does

    def read_base(self, base: Base = None) -> None:
        """Read the base's classes, if the router falls back and they haven't been read.

        Texts are only read with a tokenizer: without one, no prompt falls back.
        """
        if not self._waits_for_base:
            return
        reader: Any = self.tokenizer if base is None else base.get_input_embeddings().weight
        known: dict[str, Mapping[str, Tensor]] = of_bases.setdefault(reader, {})
        sizes = [tensor.shape[1:] for tensor in self.tables.tensors.values()]
        # So a comparison of many settings reads the texts once.
        template = self.in_chats and self.tokenizer.chat_template  # type: ignore[union-attr]
        key = str((self.router.name, self.router.embedder, template, sizes))
        if key not in known:
            is_encoder_decoder = base is not None and bool(base.config.is_encoder_decoder)
            encoder = Encoder(self.tokenizer, is_encoder_decoder, Formatting(chat=self.in_chats))
            classes = [list(map(encoder.prompt, texts)) for texts in base_texts()]
            known[key] = self.router.base_tables(self, classes, base)
        tables = replace(self.tables, base=known[key])
        self.ready, self.tables = self.router.ready(tables), tables

    @property
    def _waits_for_base(self) -> bool:
        texts_are_read = self.tokenizer is not None and self.router.falls_back
        return texts_are_read and not self.tables.base

    def answers(self, prompts: Asked, base: Base, known: Known) -> list[Tensor]:
        """The scores [E + 3] by which each prompt gets experts; all are -inf for the base.

        A chat's texts are read from the last one backwards, until one is decided by itself.
        """
        chats = [p if isinstance(p, ChatTexts) else ChatTexts((), ((p,),)) for p in prompts]
        knows_base = self.router.falls_back and bool(self.tables.base)
        unbounded = torch.full((len(self.experts),), torch.inf)
        allowances = self.router.allowances(self.tables) if knows_base else unbounded
        texts = [[*reversed(chat.messages), *filter(None, [chat.system])] for chat in chats]
        scored = [list[ScoredText]() for _ in chats]
        undecided = list(range(len(chats)))
        for depth in itertools.count():
            read = self._read([texts[row][depth] for row in undecided], base, known)
            for row, views in zip(undecided, read, strict=True):
                scored[row].append(ScoredText(views, allowances))
            open_ones = [row for row in undecided if not scored[row][-1].decides]
            undecided = [row for row in open_ones if depth + 1 < len(texts[row])]
            if not undecided:
                break
        answers = [torch.full_like(each[0].scores, -torch.inf) for each in scored]
        for row, each in enumerate(scored):
            count = len(chats[row].messages)
            if answer := answer_to(each[count - 1 :: -1], *each[count:]):
                answers[row] = answer.scores
        return answers

    def _read(self, texts: Sequence[Sequence[Text]], base: Base, known: Known) -> list[Tensor]:
        """The scores [V, E + 3] of each text's views; a client's distinct ones are read once.

        Those of others are read again: the time would tell what they asked.
        """
        scored, views = self._scores, [view for each in texts for view in each]
        about = known.get("client"), id(base)  # another base reads for itself
        keys = [hashlib.sha256(repr((*about, view)).encode()).digest() for view in views]
        new = {key: view for key, view in zip(keys, views, strict=True) if key not in scored}
        fresh = dict[bytes, Tensor]()
        if new or not keys:  # of no texts the router says so
            scores = self.router.score(self, list(new.values()), base)
            fresh = dict(zip(new, scores, strict=True))
        every = iter([fresh[key] if key in fresh else scored[key] for key in keys])
        read = [torch.stack(list(itertools.islice(every, len(each)))) for each in texts]
        scored.update(fresh)
        if len(scored) * (AROUND + read[0][0].numel()) > REMEMBERED:
            self._scores = {}
        if (allowed := known.get("allowed")) is None:
            return read
        others = torch.ones(read[0].shape[-1] - len(allowed), dtype=torch.bool)
        return [views.where(torch.cat([allowed, others]), -torch.inf) for views in read]

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        """The prompts' tokens."""
        read: Any = self.tokenizer
        return [list(read(p)["input_ids"] if isinstance(p, str) else p) for p in prompts]

    def texts(self, prompts: Prompts) -> list[str]:
        """The prompts as text without special tokens, which is what was embedded of experts'."""
        if self.tokenizer is None and all(isinstance(prompt, str) for prompt in prompts):
            return [str(prompt) for prompt in prompts]
        return prompt_texts(self.tokenizer, self.tokens(prompts))
