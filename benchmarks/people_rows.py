"""Rows of people_table.py: each says which expert answers each chat, or None for the base.

A row is a function of a Pool and of chats, tuples of (role, content). It answers each chat by
itself. Rows of others are written in the same way: `people_table.py --row MODULE:FUNCTION`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from people_cases import Turns
from people_readers import Reader
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool as Experts
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import open_reader
from phatgoose.routing.conversation import ChatTexts
from phatgoose.routing.routers import retrieval
from phatgoose.routing.routers.prompt import ByPrompt, PromptChooser
from phatgoose.routing.routers.registry import known_names
from phatgoose.routing.routers.router import router_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, embed_texts


@dataclass(frozen=True)
class Pool:
    """What a row may know: of each expert some prompts and a description, and texts of nobody's.

    `base` are the package's own texts that no expert is for, by class.
    """

    prompts: Mapping[str, Sequence[str]]
    descriptions: Mapping[str, str]
    base: Mapping[str, Sequence[str]]


FOLLOW_UPS = "follow_ups"  # the class that plain rules leave out: they read the last message alone
Row = Callable[[Pool, Sequence[Turns]], list[str | None]]


class Remembered:
    """States or embeddings of texts, each made once in this process by `make`."""

    def __init__(self, make: Callable[[Sequence[str]], Tensor]) -> None:
        self._make = make
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str], *_: object) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known |= zip(missing, self._make(missing), strict=True)
        return torch.stack([self._known[text] for text in texts])


# Routers of ours: the product's own choosers, of experts that are nothing but their prompts.


@dataclass(frozen=True)
class Stand:
    """What routers by prompt read of a pool of experts."""

    names: tuple[str, ...]
    experts: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.experts)


@cache
def states_by(reader: str) -> Remembered:
    """What the package's reader of that name makes of texts, from benchmarks/.people if there."""
    states = Remembered(Reader.of("taught" if reader == "e5" else reader).states)
    open_reader(reader).states = states  # type: ignore[method-assign]
    return states


@cache
def embeddings() -> Remembered:
    """Embeddings by the usual embedder, MiniLM, for all routers that use one."""
    remembered = Remembered(embed_texts)
    retrieval.embed_texts = remembered  # type: ignore[assignment]
    return remembered


def routed(pool: Pool, chats: Sequence[Turns], router: str, reader: str) -> list[str | None]:
    """What the product's router answers, by its name and settings."""
    states, vectors = states_by(reader), embeddings()
    info = SimpleNamespace(
        reader=open_reader(reader).reference, embedder=DEFAULT_EMBEDDER, embedding_form=PROMPT
    )
    states([text for texts in pool.prompts.values() for text in texts])  # at once, to be fast
    experts = []
    for name, texts in pool.prompts.items():
        told = SimpleNamespace(**vars(info), prompts_read=len(texts))
        statistics = prompt_statistics_of(states(texts))
        expert = SimpleNamespace(name=name, info=told, directory=name, embeddings=vectors(texts))
        expert.prompt_statistics = statistics
        experts.append(expert)
    stand = cast("Experts", Stand(tuple(pool.prompts), tuple(experts)))
    chosen = cast("ByPrompt", router_of(Routing(router=router)))
    chooser = PromptChooser(chosen, chosen.tables(stand))
    answers = chooser.deciding_scores([ChatTexts.of(chat) for chat in chats], {})
    return [_best(scores[: len(stand)], stand.names) for scores in answers]


def _best(scores: Tensor, names: Sequence[str]) -> str | None:
    return None if scores.isneginf().all() else names[int(scores.argmax())]


# Plain rules over an embedding: e5's final one, as published, of the last message.


@cache
def e5_states() -> Remembered:
    return Remembered(Reader.of("e5").states)


def final(texts: Sequence[str]) -> Tensor:
    """The unit mean over tokens of e5's last block, [texts, 384]."""
    return normalize(e5_states()(texts)[:, -1], dim=1)


def groups_of(pool: Pool, is_base_known: bool) -> list[tuple[str | None, Sequence[str]]]:
    """Whose texts there are, and these; with `is_base_known` also those of the base's classes."""
    groups: list[tuple[str | None, Sequence[str]]] = list(pool.prompts.items())
    if is_base_known:
        groups += [(None, texts) for kind, texts in pool.base.items() if kind != FOLLOW_UPS]
    return groups


def _asked(chats: Sequence[Turns]) -> Tensor:
    return final([chat[-1][1] for chat in chats])


def nearest(pool: Pool, chats: Sequence[Turns], is_base_known: bool = True) -> list[str | None]:
    """The owner of the nearest text, by the cosine."""
    groups = groups_of(pool, is_base_known)
    rows = final([text for _, texts in groups for text in texts])
    owners = [owner for owner, texts in groups for _ in texts]
    best = (_asked(chats) @ rows.T).argmax(dim=1)
    return [owners[row] for row in best.tolist()]


def centroid(pool: Pool, chats: Sequence[Turns], is_base_known: bool = True) -> list[str | None]:
    """The owner of the nearest mean; the base has one for each class."""
    groups = groups_of(pool, is_base_known)
    means = normalize(torch.stack([final(texts).mean(dim=0) for _, texts in groups]), dim=1)
    best = (_asked(chats) @ means.T).argmax(dim=1)
    return [groups[row][0] for row in best.tolist()]


def logistic(pool: Pool, chats: Sequence[Turns], is_base_known: bool = True) -> list[str | None]:
    """Logistic regression; the base is a further class."""
    # It comes with sentence-transformers.
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    groups = groups_of(pool, is_base_known)
    names = [*pool.prompts, None]
    rows = final([text for _, texts in groups for text in texts])
    owners = [names.index(owner) for owner, texts in groups for _ in texts]
    model = LogisticRegression(C=100.0, class_weight="balanced", max_iter=300)
    model.fit(rows.numpy(), owners)
    return [names[row] for row in model.predict(_asked(chats).numpy()).tolist()]


# A language model that reads the experts' descriptions.

QUESTION = "Which one should answer the user's request? Reply with its letter.\n"
NONE = "Any other request."


def described(pool: Pool, chats: Sequence[Turns]) -> list[str | None]:
    """SmolLM2-135M-Instruct's letter among the experts' descriptions and "any other request".

    A letter's log-probability counts relative to that after an empty request (Zhao et al. 2021).
    """
    names = [*pool.prompts, None]
    letters = string.ascii_uppercase[: len(names)]
    if len(letters) < len(names):
        raise SystemExit(f"Row described has letters for 25 experts, got {len(names) - 1}.")
    rows = [pool.descriptions[name] if name else NONE for name in names]
    listed = "\n".join(f"{letter}. {row}" for letter, row in zip(letters, rows, strict=True))
    base = _instructed()
    tokenizer = base.tokenizer
    wanted = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]

    def tokens(request: str) -> list[int]:
        turns = [("system", QUESTION + listed), ("user", request)]
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    one, other = tokens("A"), tokens("B")
    shared = next(at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1)
    with torch.inference_mode():
        kept = base.model(input_ids=torch.tensor([one[:shared]]), use_cache=True).past_key_values

        def scores(request: str) -> Tensor:
            ids = torch.tensor([tokens(request)[shared:]])
            logits = base.model(input_ids=ids, past_key_values=kept, logits_to_keep=1).logits
            kept.crop(-ids.shape[1])
            return logits[0, -1].float().log_softmax(dim=-1)[wanted]

        usual = scores("N/A")
        found = [scores(chat[-1][1]) - usual for chat in chats]
    return [names[int(each.argmax())] for each in found]


@cache
def _instructed() -> Any:
    return load_base("smollm2")


OURS: dict[str, Row] = {
    "discriminant, e5": partial(routed, router="discriminant", reader="e5"),
    "discriminant, MiniLM": partial(routed, router="discriminant", reader="minilm"),
    "retrieval": partial(routed, router="retrieval", reader="minilm"),
    "centroid": partial(routed, router="centroid", reader="minilm"),
    "nearest prompt, e5's embedding": nearest,
    "centroid, e5's embedding": centroid,
    "logistic regression, e5's embedding": logistic,
    "nearest prompt, never the base": partial(nearest, is_base_known=False),
    "centroid, never the base": partial(centroid, is_base_known=False),
    "logistic regression, never the base": partial(logistic, is_base_known=False),
    "SmolLM2-135M reads descriptions": described,
}
MORE = ("centroids", "joint-discriminant")  # rows too where examples/more-routers is installed
for more in MORE:
    if more in known_names():
        OURS[f"{more} (more-routers)"] = partial(routed, router=more, reader="e5")
