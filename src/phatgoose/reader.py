"""Readers: small frozen models that turn texts into states, for any base.

Routers by prompt compare a prompt with each expert's own, and nothing of that needs the experts'
base. So a reader is one small model for all of them, of which only the first blocks are loaded. It
reads plain text: no chat template, no tokens of a base's. Not in the paper.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn

from .base import NO_CODE
from .base.identity import Text, fingerprint, recorded_id
from .base.loading import check_weight_files, choose_dtype, load_tokenizer, loading
from .config import EMBEDDER, READER
from .e5 import BLOCKS, PACKAGE, Tokens, load_e5
from .errors import ConfigError
from .files import shortened
from .names import SMOLLM2, packaged
from .sites import Stack, stack_of
from .tasks.batching import batches_of_tokens, pad_right, padded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_CHARACTERS = 16_384  # of a text are read, from both ends
PASS_TOKENS = 2048  # of a batch, padding included
MOST_PADDING = 32  # tokens

Block = Annotated[int, Interval(ge=0, le=999)]


@dataclass(frozen=True)
class ReaderReference:
    """Which reader made statistics: a model, and its blocks `first` to `last`, counted from 0.

    `id` is one of KNOWN, a Hub id or a folder. `fingerprint` is of the blocks that are loaded.
    """

    id: Text
    first: Block
    last: Block
    revision: Text | None = None
    fingerprint: Text | None = None

    def __str__(self) -> str:
        return f"{self.id}:{self.first}-{self.last}"


E5 = "e5"
# Those that are loaded on a record's word, as a model and its blocks.
KNOWN: Mapping[str, ReaderReference] = {
    E5: ReaderReference(PACKAGE, 4, 11),  # on PyPI
    "minilm": ReaderReference(EMBEDDER, 2, 5),
    "smollm2": ReaderReference(SMOLLM2, 12, 19),
    "gemma": ReaderReference("google/gemma-3-270m", 5, 12),
    "qwen": ReaderReference("Qwen/Qwen2.5-Coder-0.5B", 10, 17),
}


class Reader:
    """A loaded reader. `states` is all that it does."""

    def __init__(self, stack: Stack, tokens: Tokens, reference: ReaderReference) -> None:
        self.reference = reference
        self._tokens_of = tokens
        self._stack = stack
        self._read = stack.blocks[reference.first : reference.last + 1]
        self._positions = stack.positions or PASS_TOKENS

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> Tensor:
        """What the blocks make of each text, the mean over its tokens: float32 [texts, blocks, d].

        Of a longer text MOST_CHARACTERS are read, in pieces that the model can hold. On the CPU,
        wherever the reader is. Raises ConfigError for no texts, and for an empty one.
        """
        pieces = list[list[int]]()
        owners = list[int]()
        for number, tokens in enumerate(self._tokens(texts)):
            for at in range(0, len(tokens), self._positions):
                pieces.append(tokens[at : at + self._positions])
                owners.append(number)
        sums = self._sums(pieces)
        lengths = torch.tensor([float(len(piece)) for piece in pieces])
        shape = torch.Size([len(texts), *sums.shape[1:]])
        index = torch.tensor(owners)
        totals = torch.zeros(shape).index_add_(0, index, sums)
        counts = torch.zeros(len(texts)).index_add_(0, index, lengths)
        return totals / counts[:, None, None]

    def check_fits(self, means: Tensor) -> None:
        """Raise ConfigError for statistics [.., blocks, d] of other sizes than its states have."""
        sizes = [len(self._read), self._stack.width]
        if list(means.shape[-2:]) != sizes:
            raise ConfigError(
                f"Reader {self.reference} has states of {sizes}, the experts' prompt statistics "
                f"are of {list(means.shape[-2:])}; run 'phatgoose stats' on the experts again."
            )

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        half = MOST_CHARACTERS // 2
        fitted = [t if len(t) <= MOST_CHARACTERS else f"{t[:half]} {t[-half:]}" for t in texts]
        rows = [self._tokens_of(in_small_letters(text)) for text in fitted]
        if not rows or not all(rows) or not all(map(str.strip, texts)):
            raise ConfigError("A reader can't read an empty prompt, or none.")
        return rows

    def _sums(self, pieces: Sequence[list[int]]) -> Tensor:
        """The sums over each piece's tokens, float32 [pieces, blocks, d]."""
        order = list[int]()
        parts = list[Tensor]()
        stack = self._stack.module
        device = next(stack.parameters()).device
        for rows in batches_of_tokens(list(map(len, pieces)), PASS_TOKENS, MOST_PADDING):
            ids, mask = padded_rows(pad_right, [pieces[row] for row in rows], 0, device)
            with _watched(self._read) as outputs:
                stack(input_ids=ids, attention_mask=mask)
            real = mask[..., None].float()
            sums = [(output.float() * real).sum(dim=1) for output in outputs]
            parts.append(torch.stack(sums, dim=1).cpu())
            order += rows
        read = torch.cat(parts)
        # Batches came by length; rows go back to the order of the pieces.
        return torch.empty_like(read).index_copy_(0, torch.tensor(order), read)


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What these blocks put out in this thread while the context is open, in order."""
    outputs = list[Tensor]()
    reading = threading.get_ident()

    def see(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # Threads share the model, and so the hooks.
        if threading.get_ident() == reading:
            outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(see) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def reference_of(name: str) -> ReaderReference:
    """The reader that a user names: one of KNOWN, or a model and its blocks, as ID:5-12.

    Raises ConfigError for what is neither.
    """
    if name in KNOWN:
        return replace(KNOWN[name], id=name)
    place, _, blocks = name.rpartition(":")
    first, _, last = blocks.partition("-")
    if not place or not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
        raise ConfigError(
            f"There is no reader {shortened(name)}. There are {', '.join(KNOWN)}; any other is a "
            f"model and its blocks, as Qwen/Qwen2.5-0.5B:10-17."
        )
    identity = place if place in KNOWN else recorded_id(place)
    return ReaderReference(identity, int(first), int(last))


def in_small_letters(text: str) -> str:
    """`text`, in small letters if it is SHOUTED: readers know few words in capitals."""
    return text.lower() if text.isupper() else text


def usable_reader(recorded: ReaderReference, named: str | None = None) -> ReaderReference:
    """The reader to load for statistics that `recorded` made, according to an untrusted record.

    Only readers in KNOWN are loaded on a record's word; the user must have `named` any other. Their
    usual revision is, since strangers' pull requests are revisions too. Raises ConfigError if a
    name is missing or differs.
    """
    is_known = named is None and recorded.id in KNOWN
    if is_known or (named is not None and str(reference_of(named)) == str(recorded)):
        return replace(recorded, revision=None)
    raise ConfigError(
        f"The experts' prompts were read by {shortened(str(recorded))}, and only "
        f"{', '.join(KNOWN)} are loaded on a record's word. If you trust that one, name it "
        f"(--reader); otherwise run 'phatgoose stats' on the experts."
    )


def open_reader(wanted: str | ReaderReference = READER, device: str = "cpu") -> Reader:
    """The reader of that name or record, loaded once per process and `device`.

    No code of the model's repository runs, and nothing is unpickled. Raises ConfigError when there
    is no such reader, when it isn't the one recorded, or when it has too few blocks; BaseModelError
    when it can't be loaded.
    """
    reference = reference_of(wanted) if isinstance(wanted, str) else wanted
    bare = replace(reference, fingerprint=None)
    reader = _loaded(bare, device)
    if reference.fingerprint not in (None, reader.reference.fingerprint):
        raise ConfigError(
            f"Reader {reference} isn't the one that the experts' prompts were read by: its "
            f"fingerprint is {str(reader.reference.fingerprint)[:19]}…, wanted "
            f"{str(reference.fingerprint)[:19]}…. Run 'phatgoose stats' on the experts again."
        )
    return reader


@cache
def _loaded(reference: ReaderReference, device: str) -> Reader:
    if reference.id == E5:
        _check_blocks(reference, BLOCKS)
        # In bfloat16 scores move by 0.006 at most, and batches move them by less.
        e5, tokens = load_e5(reference.last + 1, dtype=choose_dtype("auto", device))
        stack = e5.stack
        of_weights = fingerprint(e5)
    else:
        model, tokens = _by_transformers(reference, device)
        stack = stack_of(model)
        of_weights = fingerprint(model)
    stack.module.to(device).eval().requires_grad_(False)
    return Reader(stack, tokens, replace(reference, fingerprint=of_weights))


def _by_transformers(reference: ReaderReference, device: str) -> tuple[PreTrainedModel, Tokens]:
    from transformers import AutoConfig, AutoModel

    place = _place(reference.id)
    with loading(place) as found:
        config = AutoConfig.from_pretrained(found, revision=reference.revision, **NO_CODE)
        check_weight_files(found, config, reference.revision)
        _cut(config, reference)
        # What is published in float32 is small enough for it, and batches then hardly matter.
        is_exact = config.dtype in (None, torch.float32)
        dtype = torch.float32 if is_exact else choose_dtype("auto", device)
        model = AutoModel.from_pretrained(
            found,
            config=config,
            revision=reference.revision,
            dtype=dtype,
            use_safetensors=True,
            adapter_kwargs={"subfolder": "config.json"},  # as `load_base` does
            **NO_CODE,
        )
    tokenizer = load_tokenizer(place, revision=reference.revision)
    model.config.use_cache = False
    return model, lambda text: tokenizer(text, verbose=False)["input_ids"]


def _place(name: str) -> str:
    """The Hub id or folder of a reader; of a known one what is on this machine, if it is."""
    known = KNOWN.get(name)
    return packaged(known.id) if known else name


def _cut(config: Any, reference: ReaderReference) -> None:
    """Leave the blocks after the last that is read out of `config`."""
    text = config.get_text_config()
    count = reference.last + 1
    _check_blocks(reference, text.num_hidden_layers)
    text.num_hidden_layers = count
    kinds = vars(text).get("layer_types")  # some configs work it out
    if kinds:
        text.layer_types = kinds[:count]


def _check_blocks(reference: ReaderReference, count: int) -> None:
    if not reference.first <= reference.last < count:
        raise ConfigError(f"Reader {reference.id} has {count} blocks, wanted {reference}.")
